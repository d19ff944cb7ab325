//! Image-conditioned evaluation in the real runtime: what a quantised model lost against its reference.
//!
//! Every picture is embedded once; the reference answers every question greedily; then reference and
//! candidates run teacher-forced on the same tokens, and the divergence of their distributions is measured
//! over the whole vocabulary at every position of the answers. [`run::run`] is the way in.

pub mod cache;
pub mod data;
pub mod html;
mod models;
mod projectors;
pub mod record;
pub mod report;
pub mod run;
pub mod stats;
pub mod store;
