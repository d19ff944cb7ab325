//! Progress as events: the library says what happens, the caller draws it.

/// One step of a long job, in the order in which it happens.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A phase begins: `total` units (`unit` is "B", "tensors", "blocks", ...) are ahead.
    PhaseStart { name: String, total: u64, unit: &'static str },
    /// `n` more units of the current phase are done; `detail` names what was just done.
    Advance { n: u64, detail: String },
    /// The current phase is over.
    PhaseEnd,
    /// Something the user should read (a fallback, an assumption, advice).
    Note(String),
}

/// Receives events. Called from worker threads.
pub trait Observer: Sync {
    fn event(&self, event: Event);
}

/// Ignores every event.
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: Event) {}
}
