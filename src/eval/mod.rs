//! Image-conditioned evaluation in the real runtime: what a quantised model lost against its reference.

pub mod cache;
pub mod data;
pub mod header;
pub mod prompt;
pub mod stats;
pub mod store;
