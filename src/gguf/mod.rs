//! GGUF files: vocabulary, metadata, which tensors, of which types, and their data, streamed.
mod card;
mod error;
mod file;
mod header;
mod metadata;
mod output;
pub mod plan;
mod pretokenizer;
mod template;
mod types;
mod value;
mod vocab;
mod writer;

pub use card::{Card, Name};
pub use error::GgufError;
pub use file::{GgufFile, ReadError, TensorInfo};
pub use header::{Header, Metadata};
pub use metadata::General;
pub use output::Output;
pub use plan::TypeChoice;
pub use types::{FileType, Linear, Role, fitting};
pub use value::{Array, Value};
pub use vocab::{TokenType, Vocabulary};
pub use writer::{Changes, Encoder};

pub(crate) use metadata::{mbq as mbq_metadata, stored as stored_metadata, text as text_metadata, vision as vision_metadata};
pub(crate) use writer::{list, write};
