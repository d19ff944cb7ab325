//! Ctrl-C, for commands that have something to do before they end.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Waits for Ctrl-C, or for the signal that ends services.
pub async fn signal() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

/// Becomes true at such a signal, which from now on does not end the program by itself.
///
/// # Errors
/// The system gives no thread or no way to wait.
pub fn flag() -> std::io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let tokio = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let set = flag.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        tokio.block_on(signal());
        set.store(true, Ordering::Relaxed);
    })?;
    Ok(flag)
}
