//! What must not be left behind, or left half done, by a program that a signal ends.
#![allow(unsafe_code)]
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Files to be removed, or what is not to be interrupted while it is held.
static LEFTOVERS: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn leftovers() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    // A set is never left half changed.
    LEFTOVERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The name of a file that [`end_by`] removes, as long as this lives.
pub(crate) struct Leftover(PathBuf);

impl Leftover {
    pub fn new(path: &Path) -> Self {
        leftovers().insert(path.into());
        Leftover(path.into())
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        leftovers().remove(&self.0);
    }
}

/// As long as this lives, [`end_by`] waits. No [`Leftover`] is made or dropped meanwhile.
pub(crate) struct Uninterrupted {
    _held: MutexGuard<'static, BTreeSet<PathBuf>>,
}

pub(crate) fn uninterrupted() -> Uninterrupted {
    Uninterrupted { _held: leftovers() }
}

/// Ends the program as the signal of this number would have ended it, but removes first what would be left, and waits
/// until files that belong together have all got their names.
pub fn end_by(signal: i32) -> ! {
    let leftovers = leftovers();
    for path in leftovers.iter() {
        let _ = std::fs::remove_file(path);
    }
    #[cfg(unix)]
    // SAFETY: the signal's default action ends the program; should it not, `_exit` does, while the other threads wait
    // for the names or go on with files that have none.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
        libc::_exit(128 + signal)
    }
    #[cfg(not(unix))]
    std::process::exit(128 + signal)
}

/// Whether whoever started the program had it ignore the signal of this number, as a shell does with Ctrl-C for what runs
/// in the background of a script.
pub fn is_ignored(signal: i32) -> bool {
    #[cfg(unix)]
    // SAFETY: plain data, which the call fills.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
    #[cfg(not(unix))]
    {
        let _ = signal;
        false
    }
}
