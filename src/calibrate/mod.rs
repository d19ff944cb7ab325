//! Calibration: what one learns from image-text pairs before quantising. See [`mbq`] for the method itself.
pub mod answers;
pub mod batch;
pub mod bits;
mod budget;
pub mod builtin;
mod clock;
mod columns;
pub mod compensate;
pub mod embed;
mod estimate;
pub mod feedback;
mod gather;
pub mod grid;
pub mod importance;
pub mod job;
mod keys;
pub mod mbq;
mod model;
pub mod outputs;
pub mod pairs;
pub mod pass;
mod products;
mod progress;
pub mod race;
mod run;
pub mod samples;
mod scaling;
pub mod search;
pub mod sensitivity;
pub mod settings;
pub mod smoothquant;
pub mod store;
pub mod stream;
#[cfg(test)]
mod tests;

pub use budget::hold;
pub use job::{Calibrated, Imatrix, Job};
pub use model::TextModel;
pub use run::{CalibrateOptions, Outcome, run, run_packed};
pub use settings::{Method, Switches};

use std::path::PathBuf;

/// Why calibration stops.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrateError {
    #[error("there are no image-text pairs to calibrate on")]
    NoSamples,
    #[error("calibration sample {index} has not {what}: it cannot weigh errors; check its answer and picture")]
    SampleWithout { index: usize, what: &'static str },
    #[error(
        "block {layer}: mean gradient {vision} at vision tokens, {answer} at answer tokens; expected positive numbers: check the checkpoint's weights"
    )]
    NoGradient { layer: usize, vision: f64, answer: f64 },
    #[error("block {layer}: the answers' distributions are not finite: check the checkpoint's weights")]
    Divergence { layer: usize },
    #[error("{mean} bits per weight are fewer than the type's own {least}")]
    Budget { mean: f64, least: f64 },
    #[error("{what}: {problem}")]
    Sample { what: String, problem: String },
    #[error("{path}: {bad} of {drawn} drawn entries cannot be used, more than one in ten; {first}")]
    TooManyBad { path: PathBuf, bad: usize, drawn: usize, first: String },
    #[error("{tensor}: the importance of its input channels: {problem}; check the weights, or leave out --imatrix")]
    Importance { tensor: String, problem: String },
    #[error("{flag} changes nothing {with}: leave it out")]
    NoEffect { flag: &'static str, with: String },
    #[error(
        "{what} takes about {need:.2} GiB, and {by} leaves {left:.2}: allow more there, take less (--memory), or convert \
         with --method rtn, which calibrates nothing"
    )]
    Memory { what: String, need: f64, left: f64, by: &'static str },
    #[error("{what}: {problem}")]
    Setting { what: String, problem: String },
    #[error("{path}: {problem}")]
    File { path: PathBuf, problem: String },
}
