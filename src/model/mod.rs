//! Model families: a folder each, with its configuration, tensor names and prompt; what families share stands here.
pub(crate) mod config;
mod config_keys;
pub mod llava_onevision;
pub mod vision;
pub mod weights;

pub use config::{ConfigError, TextArch, TextConfig, VisionArch, VisionConfig};
