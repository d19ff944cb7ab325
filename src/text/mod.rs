//! The text model in candle: decoder blocks with their vector-Jacobian product, final norm and output head. What an
//! architecture computes is a row of a table ([`TextArch`]); names and metadata keys are GGUF's.
mod arch;
mod attention;
mod block;
mod config;
#[cfg(test)]
mod goldens;
mod groups;
pub mod head;
pub mod ops;
mod rope;
mod sample;
mod tensors;

use crate::Error;
pub use arch::{ARCHITECTURES, Activation, Pairs, Sections, Sliding, TextArch};
pub use attention::{Attention, SCORES};
#[cfg(test)]
pub(crate) use block::tests;
pub use block::{Block, Gradients, Linear, LinearName, Made, Trace};
pub use config::{RopeScaling, Rotary, TextConfig, TextError};
pub use groups::{Group, Producer};
pub use rope::Rope;
pub use sample::{Positions, SampleLayout, Span};
pub use tensors::{DecoderTensor, StreamSide, TensorRole, Weights, in_block, tensors};
