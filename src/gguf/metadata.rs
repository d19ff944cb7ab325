//! The keys of both files, apart from the vocabulary.
use super::card::{Card, Name};
use super::value::Value;
use super::Metadata;
use crate::model::llava_onevision::LlavaOnevision;
use crate::model::{TextConfig, VisionArch};

/// ggml's `GGML_QNT_VERSION`: the version of the block formats.
const QUANTIZATION_VERSION: u32 = 2;

const QUANTIZED_BY: &str = concat!("mbq-convert ", env!("CARGO_PKG_VERSION"));

/// What both files say about where they come from.
#[derive(Debug, Clone, Default)]
pub struct General {
    pub name: Name,
    pub card: Card,
    /// `org/name` on the hub, if it came from there.
    pub repository: Option<String>,
}

impl General {
    fn write(&self, keys: &mut Metadata, kind: &str, architecture: &str) {
        keys.set("general.architecture", architecture).set("general.type", kind);
        keys.set("general.name", &self.name.full).set("general.basename", &self.name.base);
        let optional = [
            ("general.size_label", &self.name.size),
            ("general.finetune", &self.name.finetune),
            ("general.version", &self.name.version),
            ("general.source.huggingface.repository", &self.repository),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                keys.set(key, value);
            }
        }
        if let Some(repository) = &self.repository {
            keys.set("general.source.url", format!("https://huggingface.co/{repository}"));
        }
        self.card.write(keys);
        // The file type is filled in when it is known.
        stored(keys, 0);
    }
}

/// Of the MBQ3 block's bit order and meaning, and frozen: another order would be another type id.
const MBQ_FORMAT_VERSION: u32 = 1;

/// The keys that say how the tensors are stored.
pub fn stored(keys: &mut Metadata, file_type: u32) {
    keys.set("general.quantized_by", QUANTIZED_BY).set("general.quantization_version", QUANTIZATION_VERSION);
    keys.set("general.file_type", file_type);
}

/// `mbq.*`: what a reader of MBQ3 tensors may want to know. For files whose type is MBQ3.
pub fn mbq(keys: &mut Metadata, method: &str) {
    keys.remove(|key| key.starts_with("mbq."));
    let group = crate::quant::mbq3::GROUP as u32;
    let pairs = [
        ("mbq.format_version", Value::from(MBQ_FORMAT_VERSION)),
        ("mbq.method", method.into()),
        ("mbq.group_size", group.into()),
    ];
    // Before the vocabulary, which is long.
    keys.insert_before(|key| key.starts_with("tokenizer."), pairs);
}

/// The language model's keys: `general.*` and the architecture's own.
pub fn text(keys: &mut Metadata, general: &General, c: &TextConfig) {
    let arch = "qwen2";
    general.write(keys, "model", arch);
    let sizes = [
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("block_count", c.num_layers),
        ("feed_forward_length", c.intermediate_size),
        ("vocab_size", c.vocab_size),
        ("attention.head_count", c.num_heads),
        ("attention.head_count_kv", c.num_kv_heads),
        ("rope.dimension_count", c.head_dim),
    ];
    for (key, value) in sizes {
        keys.set(&format!("{arch}.{key}"), value as u32);
    }
    keys.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), c.rms_norm_eps as f32);
    keys.set(&format!("{arch}.rope.freq_base"), c.rope_theta as f32);
}

/// The keys of tower and projector for projector type `llava_onevision`.
pub fn vision(keys: &mut Metadata, general: &General, m: &LlavaOnevision) {
    general.write(keys, "mmproj", "clip");
    keys.set("clip.has_vision_encoder", true).set("clip.projector_type", "llava_onevision");
    // SigLIP's GELU is the tanh form; false is CLIP's quick GELU.
    keys.set("clip.use_gelu", m.vision.arch == VisionArch::Siglip);
    let v = &m.vision;
    let sizes = [
        ("image_size", v.image_size),
        ("patch_size", v.patch_size),
        ("embedding_length", v.hidden_size),
        ("feed_forward_length", v.intermediate_size),
        ("block_count", v.used_layers),
        ("attention.head_count", v.num_heads),
        ("projection_dim", m.text.hidden_size),
        ("anyres_max", m.anyres_max),
    ];
    for (key, value) in sizes {
        keys.set(&format!("clip.vision.{key}"), value as u32);
    }
    keys.set("clip.vision.attention.layer_norm_epsilon", v.layer_norm_eps as f32);
    keys.set_array("clip.vision.image_mean", m.preprocessing.mean.as_slice());
    keys.set_array("clip.vision.image_std", m.preprocessing.std.as_slice());
    // Pairs of (width, height), in the file's order, which decides between equally good canvases.
    let pinpoints: Vec<i32> =
        m.preprocessing.pinpoints.iter().flat_map(|p| [p.width as i32, p.height as i32]).collect();
    keys.set_array("clip.vision.image_grid_pinpoints", pinpoints.as_slice());
}
