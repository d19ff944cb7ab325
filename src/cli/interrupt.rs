//! Ctrl-C, and the signal that ends services, for commands that have something to do before they end.
use mbq_convert::interrupted::{end_by, is_ignored};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const INTERRUPT: i32 = 2;
#[cfg(unix)]
const TERMINATE: i32 = 15;

/// Waits for one of them and returns its number.
pub async fn signal() -> i32 {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            if is_ignored(INTERRUPT) {
                terminate.recv().await;
                return TERMINATE;
            }
            return tokio::select! {
                _ = tokio::signal::ctrl_c() => INTERRUPT,
                _ = terminate.recv() => TERMINATE,
            };
        }
    }
    let _ = tokio::signal::ctrl_c().await;
    INTERRUPT
}

/// Does `then` on a thread of its own at such a signal, which from now on does not end the program by itself.
fn at_signal(then: impl FnOnce(i32) + Send + 'static) -> std::io::Result<()> {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || then(tokio.block_on(signal())))?;
    Ok(())
}

/// Becomes true at such a signal.
///
/// # Errors
/// The system gives no thread or no way to wait.
pub fn flag() -> std::io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = flag.clone();
    at_signal(move |_| set.store(true, Ordering::Relaxed))?;
    Ok(flag)
}

/// From now on such a signal ends the program with nothing left but finished files and what `--resume` reads.
pub fn end_cleanly() {
    // Without a thread for it the signal ends the program as ever.
    let _ = at_signal(|signal| end_by(signal));
}
