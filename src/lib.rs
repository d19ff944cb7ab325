//! Hugging Face vision-language models to GGUF, quantised with MBQ (modality-balanced quantization, arXiv 2412.19509).
pub mod bounded;
pub mod bundle;
pub mod calibrate;
pub mod checkpoint;
pub mod convert;
#[cfg(feature = "cuda")]
mod cuda_kernels;
pub mod digest;
mod error;
pub mod eval;
pub mod events;
mod files;
pub mod front;
#[doc(hidden)]
pub mod fuzzing;
pub mod ggml;
pub mod gguf;
pub mod hub;
pub mod image;
pub mod inspect;
pub mod interrupted;
mod mapped;
mod memory;
mod page;
pub mod prompt;
pub mod publish;
pub mod quant;
pub mod random;
pub mod record;
pub mod report;
pub mod runtime;
pub mod serve;
pub mod text;

pub use error::{Error, ModelFileError};
pub use mapped::tell_bus_errors;
