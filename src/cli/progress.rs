//! Draws the library's events as bars on stderr.
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mbq_convert::events::{Event, Observer};
use std::sync::Mutex;

/// One bar for the current phase. Silent when told so; without a terminal only notes are printed.
pub struct Bars {
    quiet: bool,
    current: Mutex<ProgressBar>,
}

const BYTES: &str = "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} eta {eta} {msg:28!}";
const COUNT: &str = "{prefix} {wide_bar} {pos}/{len} eta {eta} {msg:28!}";

impl Bars {
    pub fn new(quiet: bool) -> Self {
        Bars { quiet, current: Mutex::new(ProgressBar::hidden()) }
    }

    fn bar(&self) -> std::sync::MutexGuard<'_, ProgressBar> {
        // A bar is never left half changed.
        self.current.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes the bar away.
    pub fn clear(&self) {
        self.bar().finish_and_clear();
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Observer for Bars {
    fn event(&self, event: Event) {
        if self.quiet {
            return;
        }
        let mut bar = self.bar();
        match event {
            Event::PhaseStart { name, total, unit } => {
                bar.finish_and_clear();
                *bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
                let template = if unit == "B" { BYTES } else { COUNT };
                // invariant: both templates are constants that indicatif reads; its default bar would do as well.
                bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.set_prefix(name);
            }
            Event::Advance { n, detail } => {
                bar.set_message(detail);
                bar.inc(n);
            }
            Event::PhaseEnd => bar.finish_and_clear(),
            Event::Note(text) => bar.suspend(|| eprintln!("note: {text}")),
            _ => (),
        }
    }
}
