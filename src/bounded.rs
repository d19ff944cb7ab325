//! Work that a stranger's file prescribes (chat templates), in a thread of its own that may take so much memory and so
//! long and no more. A thread cannot be ended from outside: one that asks for more waits for ever where it asks, and
//! keeps what it has until the program ends.
//!
//! Memory is counted by [`Allocator`]; a program that has another one has no limit of memory here.
#![allow(unsafe_code)]
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;
#[cfg(target_os = "linux")]
use std::sync::OnceLock;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// What work may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub bytes: usize,
    /// Of the processor; where the system does not say how much that is, of the clock.
    pub time: Duration,
    /// Bytes of the thread's stack.
    pub stack: usize,
}

/// Why work did not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unfinished {
    Memory,
    Time,
    /// A fault of the code that works; it told of it on standard error.
    Panic,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Working,
    Ended,
    /// Waits for ever, or will where it asks for memory next.
    GivenUp,
}

/// What the thread that works and the one that waits for it share.
struct Watch {
    state: Mutex<State>,
    changed: Condvar,
    /// Shows the processor's time for the thread that works.
    #[cfg(target_os = "linux")]
    clock: OnceLock<libc::clockid_t>,
}

impl Watch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.state() = state;
        self.changed.notify_all();
    }

    /// In the thread that works.
    #[cfg(target_os = "linux")]
    fn set_clock(&self) {
        let mut clock = 0;
        // SAFETY: asked by the thread for itself; the place for the answer is this function's.
        if unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) } == 0 {
            let _ = self.clock.set(clock);
        }
    }

    /// Time that the work took so far; none where nobody knows.
    #[cfg(target_os = "linux")]
    fn time(&self) -> Option<Duration> {
        let Some(clock) = self.clock.get() else { return Some(Duration::ZERO) };
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the place for the answer is this function's. A clock of a thread that has ended is refused.
        match unsafe { libc::clock_gettime(*clock, &mut time) } {
            0 => Some(Duration::new(time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?)),
            _ => None,
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn time(&self) -> Option<Duration> {
        None
    }
}

/// The system's allocator, which counts for the threads that work here.
#[derive(Debug)]
pub struct Allocator;

thread_local! {
    // Neither is made at its first use, nor dropped, so that an allocator may have them.
    static WATCH: Cell<*const Watch> = const { Cell::new(ptr::null()) };
    static LEFT: Cell<usize> = const { Cell::new(0) };
}

/// Takes `bytes` from what this thread may still have. Does not return where it may not.
fn take(bytes: usize) {
    let watch = WATCH.get();
    // A panic ends soon, and holds standard error while it tells of itself.
    if watch.is_null() || thread::panicking() {
        return;
    }
    // SAFETY: `Working` keeps it alive until it has set this to null.
    let watch = unsafe { &*watch };
    let left = LEFT.get().checked_sub(bytes);
    if let Some(left) = left
        && *watch.state() == State::Working
    {
        return LEFT.set(left);
    }
    watch.set(State::GivenUp);
    loop {
        thread::park();
    }
}

fn give_back(bytes: usize) {
    LEFT.set(LEFT.get().saturating_add(bytes));
}

// SAFETY: every call goes to the system's allocator as it came, or does not return.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size);
        give_back(layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// In the thread that works, as long as it does.
struct Working(Arc<Watch>);

impl Working {
    fn begin(watch: Arc<Watch>, bytes: usize) -> Self {
        #[cfg(target_os = "linux")]
        watch.set_clock();
        LEFT.set(bytes);
        WATCH.set(Arc::as_ptr(&watch));
        Working(watch)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        WATCH.set(ptr::null());
        self.0.set(State::Ended);
    }
}

fn taken<W>(work: &Mutex<Option<W>>) -> Option<W> {
    work.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// What `work` gives, if it ends within its bounds. Where the system has no room for a thread there is a limit already
/// (`ulimit`), and the work is done here.
///
/// # Errors
/// It does not.
pub(crate) fn run<T: Send + 'static>(
    bounds: Bounds,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unfinished> {
    let watch = Arc::new(Watch {
        state: Mutex::new(State::Working),
        changed: Condvar::new(),
        #[cfg(target_os = "linux")]
        clock: OnceLock::new(),
    });
    let work = Arc::new(Mutex::new(Some(work)));
    let (watched, theirs) = (watch.clone(), work.clone());
    let thread = thread::Builder::new().name("bounded".into()).stack_size(bounds.stack);
    let thread = thread.spawn(move || {
        let _working = Working::begin(watched, bounds.bytes);
        taken(&theirs).map(|work| work())
    });
    let Ok(thread) = thread else {
        return taken(&work).map(|work| work()).ok_or(Unfinished::Panic);
    };
    let (mut state, mut left) = (watch.state(), bounds.time);
    while *state == State::Working && !left.is_zero() {
        // A little longer, so that a thread that has to wait for the processor is not asked all the time.
        let wait = left + Duration::from_millis(10);
        let waited = watch.changed.wait_timeout_while(state, wait, |state| *state == State::Working);
        (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        left = watch.time().map_or(Duration::ZERO, |time| bounds.time.saturating_sub(time));
    }
    match *state {
        State::Ended => {
            drop(state);
            thread.join().ok().flatten().ok_or(Unfinished::Panic)
        }
        State::GivenUp => Err(Unfinished::Memory),
        State::Working => {
            *state = State::GivenUp;
            Err(Unfinished::Time)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::TryRecvError;

    #[global_allocator]
    static ALLOCATOR: Allocator = Allocator;

    const BOUNDS: Bounds = Bounds { bytes: 1 << 20, time: Duration::from_secs(600), stack: 1 << 20 };

    #[test]
    fn what_ends_is_given_back() {
        assert_eq!(run(BOUNDS, || vec![1u8; 1000].len()), Ok(1000));
        assert_eq!(run(BOUNDS, || (0..10_000).map(|n| vec![n as u8; 1000].len()).sum()), Ok(10_000_000));
        assert_eq!(run(BOUNDS, || panic!("on purpose")), Err::<(), _>(Unfinished::Panic));
        let no_thread = Bounds { stack: 1 << 60, ..BOUNDS };
        assert_eq!(run(no_thread, || thread::current().id()), Ok(thread::current().id()));
    }

    #[test]
    fn more_memory_is_not_given() {
        let more = [|| vec![0u8; 2 << 20], || vec![1u8; 2 << 20], || (0..2 << 20).map(|n| n as u8).collect()];
        for work in more {
            assert_eq!(run(BOUNDS, work).map(|bytes| bytes.len()), Err(Unfinished::Memory));
        }
        // What is dropped may be taken again, what is kept may not.
        let kept = || (0..2000).map(|n| vec![n as u8; 1000]).collect::<Vec<_>>();
        assert_eq!(run(BOUNDS, kept).map(|lists| lists.len()), Err(Unfinished::Memory));
    }

    #[test]
    fn what_does_not_end_is_not_waited_for() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let bounds = Bounds { time: Duration::from_millis(20), ..BOUNDS };
        let working = move || while receiver.try_recv() == Err(TryRecvError::Empty) {};
        assert_eq!(run(bounds, working), Err(Unfinished::Time));
        drop(sender);
    }
}
