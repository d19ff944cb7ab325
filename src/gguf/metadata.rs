//! The keys of both files, apart from the vocabulary.
use super::card::{Card, Name};
use super::types::FileType;
use crate::ggml::{GgmlError, GgmlType, Gguf};
use crate::model::llava_onevision::LlavaOnevision;
use crate::model::{TextConfig, VisionArch};

/// ggml's `GGML_QNT_VERSION`: the version of the block formats.
const QUANTIZATION_VERSION: u32 = 2;

/// What both files say about where they come from.
#[derive(Debug, Clone, Default)]
pub struct General {
    pub name: Name,
    pub card: Card,
    /// `org/name` on the hub, if it came from there.
    pub repository: Option<String>,
}

impl General {
    fn write(&self, header: &mut Gguf, kind: &str, architecture: &str, file_type: u32) -> Result<(), GgmlError> {
        header.set_str("general.architecture", architecture)?.set_str("general.type", kind)?;
        header.set_str("general.name", &self.name.full)?.set_str("general.basename", &self.name.base)?;
        let optional = [
            ("general.size_label", &self.name.size),
            ("general.finetune", &self.name.finetune),
            ("general.version", &self.name.version),
            ("general.source.huggingface.repository", &self.repository),
        ];
        for (key, value) in optional {
            if let Some(value) = value {
                header.set_str(key, value)?;
            }
        }
        if let Some(repository) = &self.repository {
            header.set_str("general.source.url", &format!("https://huggingface.co/{repository}"))?;
        }
        self.card.write(header)?;
        header.set_str("general.quantized_by", concat!("mbq-convert ", env!("CARGO_PKG_VERSION")))?;
        header.set_u32("general.quantization_version", QUANTIZATION_VERSION)?;
        header.set_u32("general.file_type", file_type)?;
        Ok(())
    }
}

/// Of the MBQ3 block's bit order and meaning, and frozen: another order would be another type id.
const MBQ_FORMAT_VERSION: u32 = 1;

/// `mbq.*`: what a reader of MBQ3 tensors may want to know. For files whose type is MBQ3.
///
/// # Errors
/// A string holds a NUL byte.
pub fn mbq(header: &mut Gguf, method: &str) -> Result<(), GgmlError> {
    header.set_u32("mbq.format_version", MBQ_FORMAT_VERSION)?.set_str("mbq.method", method)?;
    header.set_u32("mbq.group_size", crate::quant::mbq3::GROUP as u32)?;
    Ok(())
}

/// The language model's keys: `general.*` and the architecture's own.
///
/// # Errors
/// A string holds a NUL byte.
pub fn text(header: &mut Gguf, general: &General, c: &TextConfig, file_type: FileType) -> Result<(), GgmlError> {
    let arch = "qwen2";
    general.write(header, "model", arch, file_type.id())?;
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
        header.set_u32(&format!("{arch}.{key}"), value as u32)?;
    }
    header.set_f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), c.rms_norm_eps as f32)?;
    header.set_f32(&format!("{arch}.rope.freq_base"), c.rope_theta as f32)?;
    Ok(())
}

/// The keys of tower and projector for projector type `llava_onevision`.
///
/// # Errors
/// A string holds a NUL byte.
pub fn vision(header: &mut Gguf, general: &General, m: &LlavaOnevision, ty: GgmlType) -> Result<(), GgmlError> {
    general.write(header, "mmproj", "clip", FileType::Plain(ty).id())?;
    header.set_bool("clip.has_vision_encoder", true)?.set_str("clip.projector_type", "llava_onevision")?;
    // SigLIP's GELU is the tanh form; false is CLIP's quick GELU.
    header.set_bool("clip.use_gelu", m.vision.arch == VisionArch::Siglip)?;
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
        header.set_u32(&format!("clip.vision.{key}"), value as u32)?;
    }
    header.set_f32("clip.vision.attention.layer_norm_epsilon", v.layer_norm_eps as f32)?;
    header.set_f32_array("clip.vision.image_mean", &m.preprocessing.mean)?;
    header.set_f32_array("clip.vision.image_std", &m.preprocessing.std)?;
    // Pairs of (width, height), in the file's order, which decides between equally good canvases.
    let pinpoints: Vec<i32> =
        m.preprocessing.pinpoints.iter().flat_map(|p| [p.width as i32, p.height as i32]).collect();
    header.set_i32_array("clip.vision.image_grid_pinpoints", &pinpoints)?;
    Ok(())
}
