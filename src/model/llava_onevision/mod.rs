//! LLaVA-OneVision: SigLIP tower, two-layer projector, any-resolution tiles, Qwen2 text model.
//! Follows transformers' `models/llava_onevision`.
mod config;
mod embed;
mod tensors;

pub use config::{LlavaOnevision, Preprocessing};
pub use embed::Embedder;
