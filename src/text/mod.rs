//! The text model in candle: decoder blocks with their vector-Jacobian product, final norm and output head.
mod block;
pub mod head;
pub mod ops;

#[cfg(test)]
pub(crate) use block::tests;
pub use block::{Block, Gradients, Linear, Made, Name, Rope, SCORES, Span, Trace, tensor_name};
