//! Ctrl-C and SIGTERM: the first one stops in order, the second one at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::failure::Exit;

/// Whether the user wants it to end.
#[derive(Debug)]
pub(crate) struct Interrupt {
    asked: watch::Receiver<bool>,
    _task: JoinSet<()>,
}

impl Interrupt {
    pub(crate) fn new() -> io::Result<Self> {
        let interrupt = signal(SignalKind::interrupt())?;
        let terminate = signal(SignalKind::terminate())?;
        let (sender, asked) = watch::channel(false);
        let mut task = JoinSet::new();
        task.spawn(watch(interrupt, terminate, sender));
        Ok(Self { asked, _task: task })
    }

    /// Waits until the user wants it to end. Cancel-safe.
    pub(crate) async fn asked(&mut self) {
        // The task lives as long as this, and sends until then.
        let _ = self.asked.wait_for(|asked| *asked).await;
    }

    pub(crate) fn is_asked(&self) -> bool {
        *self.asked.borrow()
    }
}

async fn watch(mut interrupt: Signal, mut terminate: Signal, asked: watch::Sender<bool>) {
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        if asked.send_replace(true) {
            std::process::exit(i32::from(Exit::Interrupted as u8));
        }
    }
}
