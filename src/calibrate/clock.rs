//! Times of a calibration's phases, for the record.
use crate::events::{Event, Observer};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// The phases so far.
#[derive(Default)]
pub(super) struct Clock(Mutex<Vec<ClockPhase>>);

/// Hands events on and notes when they came.
struct Watched<'a> {
    clock: &'a Clock,
    inner: &'a dyn Observer,
}

struct ClockPhase {
    name: String,
    start: Instant,
    /// Seconds after the start at which a unit was done.
    steps: Vec<f64>,
    seconds: f64,
}

impl Clock {
    /// An observer that hands on to `inner`.
    pub fn watching<'a>(&'a self, inner: &'a dyn Observer) -> impl Observer + 'a {
        Watched { clock: self, inner }
    }

    /// What a calibration from `start` on took, seconds: the pictures' embeddings, the phases, all.
    pub fn seconds(&self, embedding: f64, start: Instant) -> serde_json::Value {
        serde_json::json!({"embedding": embedding, "phases": self.record(), "all": start.elapsed().as_secs_f64()})
    }

    /// Per phase its seconds; of the blocks each one's.
    fn record(&self) -> serde_json::Value {
        let phases = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = serde_json::Map::new();
        let short = |s: f64| (s * 1000.0).round() / 1000.0;
        for p in phases.iter() {
            out.insert(p.name.clone(), short(p.seconds).into());
            if p.name == "blocks" {
                let before = std::iter::once(&0.0).chain(&p.steps);
                let each: Vec<f64> = p.steps.iter().zip(before).map(|(a, b)| short(a - b)).collect();
                out.insert("each block".into(), each.into());
            }
        }
        out.into()
    }
}

impl Observer for Watched<'_> {
    fn event(&self, event: Event) {
        let mut phases = self.clock.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &event {
            Event::PhaseStart { name, .. } => {
                phases.push(ClockPhase { name: name.clone(), start: Instant::now(), steps: Vec::new(), seconds: 0.0 });
            }
            Event::Advance { .. } | Event::PhaseEnd => {
                if let Some(phase) = phases.last_mut() {
                    phase.seconds = phase.start.elapsed().as_secs_f64();
                    if let Event::Advance { .. } = event {
                        phase.steps.push(phase.seconds);
                    }
                }
            }
            _ => (),
        }
        self.inner.event(event);
    }
}
