//! Everything at once, at random.

use std::time::Duration;

use anyhow::Result;
use pubsub_tests::{
    admin,
    checker::Gate,
    lab::{Rig, scenario},
    proxy::{At, Cut, Direction, Mode},
    raw,
    seed::Rng,
    wait,
};

use crate::{app::SOON, load::Load};

const WITHIN: Duration = Duration::from_secs(120);
const TOPIC: &str = "orders";

#[test]
fn faults_of_all_kinds_at_random_lose_repeat_and_reorder_nothing() {
    const FAULTS: usize = 40;
    scenario(WITHIN, async |lab| {
        let mut rig = lab.rig().await?;
        admin::create_topic(&raw::connect(&rig.server.url()).await?, TOPIC).await?;
        let mut load = Load::new(rig.url(), TOPIC);
        for _ in 0..3 {
            load.publisher(lab.rng.fork()).await?;
        }
        for subscription in ["billing", "shipping"] {
            load.consumer(subscription, lab.rng.fork()).await?;
        }
        for _ in 0..FAULTS {
            let (stored, delivered) = (lab.rng.between(1, 60), lab.rng.between(1, 120));
            load.progress(usize::try_from(stored)?, usize::try_from(delivered)?).await?;
            break_something(&mut rig, &mut load, &mut lab.rng).await?;
        }
        load.progress(50, 50).await?;
        let gate = Gate { stored: 500, delivered: 1000, faults: FAULTS, in_doubt: FAULTS };
        load.finish(&rig.server.url(), gate).await?;
        Ok(())
    });
}

async fn break_something(rig: &mut Rig, load: &mut Load, rng: &mut Rng) -> Result<()> {
    let cut = if rng.one_in(2) { Cut::Reset } else { Cut::Finish };
    let direction = if rng.one_in(2) { Direction::Up } else { Direction::Down };
    match rng.below(14) {
        0..=2 => {
            load.fault("kill");
            rig.crash().await?;
        }
        3 => {
            load.fault("stop");
            rig.server.begin_stop()?;
            rig.server.exited(SOON).await?;
            rig.revive().await?;
        }
        4 | 5 => load.crash_consumer(rng).await?,
        6 | 7 => load.crash_publisher(rng).await?,
        8 | 9 => {
            load.fault("cut");
            rig.proxy.cut_all(cut);
        }
        10 | 11 => {
            load.fault("cut at a byte");
            rig.proxy.arm(direction, At::Byte(rng.between(1, 5000)), cut);
            rig.proxy.cut_all(cut);
        }
        12 => lose_bytes(rig, load, direction, cut).await?,
        _ => {
            load.fault("a freeze");
            rig.server.freeze()?;
            let before = rig.proxy.bytes(Direction::Up);
            // Until something was sent to it in vain; a second at most, or it is noticed.
            let sent = || rig.proxy.bytes(Direction::Up) > before;
            let _ = wait::until("something sent", Duration::from_secs(1), sent).await;
            rig.server.thaw()?;
        }
    }
    Ok(())
}

/// Bytes of one direction disappear, until some have; then the connections break.
async fn lose_bytes(rig: &Rig, load: &Load, direction: Direction, cut: Cut) -> Result<()> {
    load.fault("bytes lost");
    let before = rig.proxy.bytes(direction);
    rig.proxy.set(direction, Mode::Discard);
    let lost = || rig.proxy.bytes(direction) > before;
    let _ = wait::until("a byte lost", Duration::from_secs(1), lost).await;
    rig.proxy.cut_all(cut);
    rig.proxy.set(direction, Mode::Pass);
    Ok(())
}
