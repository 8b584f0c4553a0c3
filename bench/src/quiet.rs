//! Waiting until what ran before is over, for the disk too.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What a probe writes and syncs, how often, and how much slower than the best one it may be.
const BYTES: usize = 1024 * 1024;
const WRITES: u32 = 30;
const SLOWER: f64 = 1.5;
/// More than is published in a measurement, and less than what the system begins to write back.
const PAGES: usize = 2 << 30;
/// The disk may be busy for long with what was removed: it is told of each block.
const LONGEST: Duration = Duration::from_secs(90);

/// Has the file cache use pages and free them. The host of a virtual machine may have to supply a page
/// that was not in use for a while, which costs more than the write that needs it; a measurement after
/// much was removed and one after much was added would differ by that alone.
pub fn touch_pages(directory: &Path) -> io::Result<()> {
    let path = directory.join("pages");
    let mut file = File::create(&path)?;
    let bytes = vec![1; BYTES];
    let written = (0..PAGES / BYTES).try_for_each(|_| file.write_all(&bytes));
    fs::remove_file(path)?;
    written
}

/// How fast the disk is when nothing keeps it busy.
#[derive(Debug)]
pub struct Quiet {
    nanos: AtomicU64,
}

impl Quiet {
    /// Looks at the disk that has a directory.
    pub fn of(directory: &Path) -> io::Result<Self> {
        let quiet = Self { nanos: AtomicU64::new(u64::MAX) };
        for _ in 0..5 {
            quiet.probe(directory)?;
        }
        Ok(quiet)
    }

    /// Waits until nothing else keeps the machine busy and the disk is about as fast as it was at its
    /// best; for a while at most.
    pub fn wait(&self, directory: &Path) -> io::Result<()> {
        File::open(directory)?.sync_all()?;
        let end = Instant::now() + LONGEST;
        while Instant::now() < end {
            if is_idle() && self.probe(directory)? {
                return Ok(());
            }
        }
        eprintln!("the disk stays slower than it was");
        Ok(())
    }

    /// Whether the disk is as fast as it can be, as far as it is known.
    fn probe(&self, directory: &Path) -> io::Result<bool> {
        let path = directory.join("probe");
        let mut file = OpenOptions::new().create_new(true).append(true).open(&path)?;
        let bytes = vec![1; BYTES];
        let started = Instant::now();
        for _ in 0..WRITES {
            file.write_all(&bytes)?;
            file.sync_data()?;
        }
        let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        fs::remove_file(path)?;
        let best = self.nanos.fetch_min(nanos, Ordering::Relaxed).min(nanos);
        Ok(nanos as f64 <= SLOWER * best as f64)
    }
}

fn is_idle() -> bool {
    let (idle, all) = ticks();
    sleep(Duration::from_millis(300));
    let (idle_now, all_now) = ticks();
    (idle_now - idle) as f64 >= 0.88 * (all_now - all) as f64
}

/// Ticks in which the machine was idle, and all.
fn ticks() -> (u64, u64) {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // Waiting for the disk is idle, too.
    (ticks.iter().skip(3).take(2).sum(), ticks.iter().sum())
}
