//! Hugging Face vision-language models to GGUF, quantised with MBQ (modality-balanced quantization, arXiv 2412.19509).
pub mod events;
pub mod image;
