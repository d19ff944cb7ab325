//! GGUF files: one reader, one writer; metadata, tensors, of which types, and their data, streamed.
mod error;
mod file;
mod header;
mod metadata;
mod output;
mod pair;
pub mod plan;
mod shard;
mod types;
mod value;
mod writer;

pub use error::GgufError;
pub use file::{GgufFile, ReadError, TensorInfo};
pub use header::{Header, Metadata};
pub use output::{Output, folder_of};
pub use pair::{PAIR_KEY, ROTATION_KEY, belongs, check_pair, pair_of};
pub use plan::TypeChoice;
pub use shard::ShardName;
pub use types::{FileType, LinearKind, Role, fitting};
pub use value::{Array, Value};
pub use writer::{Changes, Encoder};

pub(crate) use metadata::{mbq as mbq_metadata, stored as stored_metadata};
pub(crate) use shard::{ShardPlan, shards};
pub(crate) use writer::{list, write};
