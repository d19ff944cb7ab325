//! The keys that say how a file's tensors are stored.
use super::Metadata;
use super::value::Value;

/// ggml's `GGML_QNT_VERSION`: the version of the block formats.
const QUANTIZATION_VERSION: u32 = 2;

const QUANTIZED_BY: &str = concat!("mbq-convert ", env!("CARGO_PKG_VERSION"));

/// Of the MBQ3 block's bit order and meaning, and frozen: another order would be another type id.
const MBQ_FORMAT_VERSION: u32 = 1;

/// The keys that say how the tensors are stored.
pub fn stored(keys: &mut Metadata, file_type: u32) {
    keys.set("general.quantized_by", QUANTIZED_BY).set("general.quantization_version", QUANTIZATION_VERSION);
    keys.set("general.file_type", file_type);
}

/// `mbq.*`: what a reader of MBQ3 tensors may want to know. For files whose type is MBQ3.
pub fn mbq(keys: &mut Metadata, method: &str) {
    let group = crate::quant::mbq3::GROUP as u32;
    let pairs = [
        ("mbq.format_version", Value::from(MBQ_FORMAT_VERSION)),
        ("mbq.method", method.into()),
        ("mbq.group_size", group.into()),
    ];
    keys.remove(|key| pairs.iter().any(|(name, _)| *name == key));
    // Before the vocabulary, which is long.
    keys.insert_before(|key| key.starts_with("tokenizer."), pairs);
}
