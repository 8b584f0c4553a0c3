//! The faults, spread over the run. Each is told when it comes, and waited out.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use pubsub_client::{Cause, ConnectionState, StateWatch, Subscriber};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::MESSAGES;
use crate::proxy::Proxy;
use crate::publishers::Publishers;
use crate::server::ServerProcess;
use crate::tally::Tally;

#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    Cut,
    Freeze,
}

use Fault::{Cut, Freeze, Kill};

const PLAN: [Fault; 15] =
    [Cut, Kill, Cut, Cut, Kill, Cut, Cut, Freeze, Cut, Kill, Cut, Cut, Kill, Cut, Cut];

/// A kill counts only with so many publishes unanswered and so many deliveries unacked.
const IN_FLIGHT: u64 = 150;
/// How long that may take.
const LOAD_WITHIN: Duration = Duration::from_secs(10);
/// How long the SDK may take to notice a frozen server; with a heartbeat of 1 s it takes 2.5 s.
const NOTICE_WITHIN: Duration = Duration::from_secs(10);
/// How long everyone may take to be back after a fault.
const RECOVER_WITHIN: Duration = Duration::from_secs(20);

/// Injects the faults, and watches the connections.
pub(crate) struct Faults<'a> {
    tally: Arc<Tally>,
    proxy: &'a Proxy,
    subscriber: StateWatch,
    all: Vec<StateWatch>,
    _watchers: JoinSet<()>,
}

impl<'a> Faults<'a> {
    pub(crate) fn new(
        tally: &Arc<Tally>,
        proxy: &'a Proxy,
        publishers: &Publishers,
        subscriber: &Subscriber,
    ) -> Self {
        let subscriber = subscriber.state();
        let mut all = publishers.states().to_vec();
        all.push(subscriber.clone());
        let mut watchers = JoinSet::new();
        for state in &all {
            watchers.spawn(count_reconnects(state.clone(), Arc::clone(tally)));
        }
        Self { tally: Arc::clone(tally), proxy, subscriber, all, _watchers: watchers }
    }

    pub(crate) async fn inject(&mut self, server: &mut ServerProcess) -> Result<()> {
        let step = MESSAGES / (PLAN.len() as u64 + 1);
        for (fault, start) in PLAN.into_iter().zip((step..).step_by(usize::try_from(step)?)) {
            let due = |tally: &Tally| tally.enqueued.get() >= start;
            ensure!(self.tally.wait_for(RECOVER_WITHIN, due).await, "publishing has stalled");
            let reconnects = self.tally.reconnects.get();
            let started = Instant::now();
            match fault {
                Kill => self.kill(server).await?,
                Cut => self.cut(),
                Freeze => self.freeze(server).await?,
            }
            if !matches!(fault, Freeze) {
                self.notice(reconnects + self.all.len() as u64).await;
            }
            self.recover().await?;
            self.tally.event(&format!("         all are back, {:.1?} later", started.elapsed()));
        }
        Ok(())
    }

    fn cut(&self) {
        let (unanswered, held) = (self.tally.unanswered(), self.tally.held());
        self.proxy.cut();
        self.tally.cuts.add();
        self.tally.event(&format!(
            "CUT      all connections, with {unanswered} publishes unanswered, {held} deliveries held"
        ));
    }

    /// Kills the server in the worst moment: it has committed what nobody has been told.
    async fn kill(&self, server: &mut ServerProcess) -> Result<()> {
        let in_time = timeout(LOAD_WITHIN, self.load()).await;
        ensure!(in_time.is_ok(), "too little was in flight for a kill to mean anything");
        let (unanswered, held) = (self.tally.unanswered(), self.tally.held());
        server.kill().await?;
        self.proxy.cut();
        self.tally.kills.add();
        self.tally.event(&format!(
            "SIGKILL  the server, with {unanswered} publishes unanswered, {held} deliveries held"
        ));
        let started = Instant::now();
        server.start_again().await?;
        self.proxy.lead_to(server.address());
        self.tally
            .event(&format!("         the server is up again after {:.1?}", started.elapsed()));
        Ok(())
    }

    /// Waits until enough is in flight. The proxy holds the answers back from then on.
    async fn load(&self) {
        /// By then there are enough publishes, or too few deliveries are left.
        const MUTED: Duration = Duration::from_millis(500);
        loop {
            self.tally.wait_for(LOAD_WITHIN, |tally| tally.held() >= 2 * IN_FLIGHT).await;
            self.proxy.mute(true);
            let loaded =
                |tally: &Tally| tally.unanswered() >= IN_FLIGHT && tally.held() >= IN_FLIGHT;
            if self.tally.wait_for(MUTED, loaded).await {
                return;
            }
            self.proxy.mute(false);
        }
    }

    /// Freezes the server until the SDK says that it hears nothing any more.
    async fn freeze(&mut self, server: &ServerProcess) -> Result<()> {
        server.freeze()?;
        self.tally.freezes.add();
        self.tally.event("SIGSTOP  the server: its connections stay open, nothing answers");
        let frozen = Instant::now();
        let silent = self.subscriber.wait_for(|state| {
            matches!(state, ConnectionState::Reconnecting { cause, .. }
                if matches!(**cause, Cause::Silence(_)))
        });
        let noticed = timeout(NOTICE_WITHIN, silent).await;
        server.thaw()?;
        ensure!(matches!(noticed, Ok(Some(_))), "the SDK has not noticed a frozen server");
        self.tally.event(&format!(
            "SIGCONT  the server: the SDK said `Reconnecting` after {:.1?} of silence",
            frozen.elapsed()
        ));
        Ok(())
    }

    /// Waits until everyone has noticed that the connection was lost, and is back. A watcher can
    /// miss a reconnect that is over in a moment, so this is not the proof of it.
    async fn notice(&self, reconnects: u64) {
        const WITHIN: Duration = Duration::from_secs(3);
        self.tally.wait_for(WITHIN, |tally| tally.reconnects.get() >= reconnects).await;
    }

    /// Waits until all are connected again and messages come.
    async fn recover(&mut self) -> Result<()> {
        let shown = self.tally.shown.get();
        for state in &mut self.all {
            let connected = state.wait_for(ConnectionState::is_connected);
            ensure!(timeout(RECOVER_WITHIN, connected).await.is_ok(), "no reconnect");
        }
        let going_on = |tally: &Tally| tally.shown.get() > shown;
        ensure!(self.tally.wait_for(RECOVER_WITHIN, going_on).await, "nothing is received");
        Ok(())
    }
}

async fn count_reconnects(mut state: StateWatch, tally: Arc<Tally>) {
    let mut lost = false;
    while let Some(state) = state.changed().await {
        if state.is_reconnecting() {
            lost = true;
        } else if state.is_connected() && lost {
            lost = false;
            tally.reconnects.add();
            tally.changed();
        }
    }
}
