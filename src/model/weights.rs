//! The text model of a Hugging Face checkpoint under GGUF's names and keys, as llama.cpp's converter would write it.
use super::{TextArch, TextConfig};
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::text::{MetaValue, Metadata, Name, Weights};
use candle_core::{D, DType, Device, Result, Tensor};
use std::path::Path;

/// `language_model.model.layers.<layer>.<rest>`.
pub fn tensor_name(layer: usize, rest: &str) -> String {
    format!("language_model.model.layers.{layer}.{rest}")
}

impl Name {
    /// As in `language_model.model.layers.N.<this>.weight`.
    pub fn path(self) -> &'static str {
        match self {
            Name::Q => "self_attn.q_proj",
            Name::K => "self_attn.k_proj",
            Name::V => "self_attn.v_proj",
            Name::O => "self_attn.o_proj",
            Name::Gate => "mlp.gate_proj",
            Name::Up => "mlp.up_proj",
            Name::Down => "mlp.down_proj",
        }
    }
}

/// A checkpoint and what its `config.json` says of the text model.
#[derive(Clone, Copy)]
pub struct HuggingFace<'a> {
    pub checkpoint: &'a Checkpoint,
    pub config: &'a TextConfig,
}

/// The checkpoint's canonical name of a tensor; unknown names stay, and are not found.
fn source(name: &str) -> String {
    let in_block = || {
        let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
        let (part, kind) = part.rsplit_once('.')?;
        let rest = match part {
            "attn_norm" => "input_layernorm",
            "ffn_norm" => "post_attention_layernorm",
            _ => Name::ALL.into_iter().find(|n| n.part() == part)?.path(),
        };
        Some(tensor_name(layer.parse().ok()?, &format!("{rest}.{kind}")))
    };
    match name {
        "token_embd.weight" => "language_model.model.embed_tokens.weight".into(),
        "output_norm.weight" => "language_model.model.norm.weight".into(),
        "output.weight" => "language_model.lm_head.weight".into(),
        _ => in_block().unwrap_or_else(|| name.into()),
    }
}

impl HuggingFace<'_> {
    /// The width of heads whose rows the converter reorders, from halves to neighbours: Llama's q and k.
    fn reordered(&self, name: &str) -> Option<usize> {
        let of_llama = self.config.arch == TextArch::Llama && [".attn_q.", ".attn_k."].iter().any(|p| name.contains(p));
        of_llama.then_some(self.config.head_dim)
    }
}

/// Rows i and i + d/2 of each head of `dim` rows become rows 2i and 2i + 1.
fn neighbours(values: &[f32], dim: usize, cols: usize) -> Vec<f32> {
    let row = |r: usize| r / dim * dim + r % dim / 2 + r % 2 * (dim / 2);
    (0..values.len() / cols).flat_map(|r| &values[row(r) * cols..(row(r) + 1) * cols]).copied().collect()
}

impl Weights for HuggingFace<'_> {
    fn contains(&self, name: &str) -> bool {
        // A head that the configuration does not tie to the embedding has to be there.
        self.checkpoint.contains(&source(name)) || name == "output.weight" && !self.config.tie_word_embeddings
    }

    fn f32(&self, name: &str, shape: &[usize]) -> std::result::Result<Vec<f32>, Error> {
        let from = source(name);
        let values = self.checkpoint.f32(&from, shape)?;
        self.checkpoint.release(&from);
        Ok(match self.reordered(name) {
            Some(dim) => neighbours(&values, dim, shape[1..].iter().product()),
            None => values,
        })
    }

    /// On an accelerator it is widened there: half of the bytes on the way.
    fn tensor(&self, name: &str, shape: &[usize], device: &Device) -> std::result::Result<Tensor, Error> {
        if !device.is_cpu() && self.reordered(name).is_none() {
            let from = source(name);
            self.checkpoint.check(&from, shape)?;
            let view = self.checkpoint.tensor(&from)?;
            let widened = || -> Result<(Tensor, bool)> {
                let dtype = DType::try_from(view.dtype)?;
                let t = Tensor::from_raw_buffer(view.bytes, dtype, shape, device)?.to_dtype(DType::F32)?;
                // Zero times a number that is not finite is none.
                let finite = (&t * 0.0)?.sum(D::Minus1)?.sum_all()?.to_scalar::<f32>()? == 0.0;
                Ok((t, finite))
            };
            let (t, finite) = widened()?;
            self.checkpoint.release(&from);
            if finite {
                return Ok(t);
            }
            // Else the same again on the CPU says which number it is.
        }
        Ok(Tensor::from_vec(self.f32(name, shape)?, shape, device)?)
    }
}

impl Metadata for HuggingFace<'_> {
    fn file(&self) -> &Path {
        self.checkpoint.dir()
    }

    /// None: what is not understood in config.json is refused where that is read.
    fn keys(&self, _: &str) -> Vec<String> {
        Vec::new()
    }

    fn get(&self, key: &str) -> Option<MetaValue> {
        let c = self.config;
        let arch = match c.arch {
            TextArch::Qwen2 => "qwen2",
            TextArch::Llama => "llama",
        };
        if key == "general.architecture" {
            return Some(MetaValue::Text(arch.into()));
        }
        let size = |n: usize| Some(MetaValue::Integer(n as i64));
        match key.strip_prefix(arch)?.strip_prefix('.')? {
            "block_count" => size(c.num_layers),
            "embedding_length" => size(c.hidden_size),
            "feed_forward_length" => size(c.intermediate_size),
            "vocab_size" => size(c.vocab_size),
            "context_length" => size(c.max_position_embeddings),
            "attention.head_count" => size(c.num_heads),
            "attention.head_count_kv" => size(c.num_kv_heads),
            "attention.key_length" => size(c.head_dim),
            "attention.layer_norm_rms_epsilon" => Some(MetaValue::Float(c.rms_norm_eps)),
            "rope.freq_base" => Some(MetaValue::Float(c.rope_theta)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_checkpoints() {
        assert_eq!(source("blk.12.attn_output.weight"), "language_model.model.layers.12.self_attn.o_proj.weight");
        assert_eq!(source("blk.0.attn_q.bias"), "language_model.model.layers.0.self_attn.q_proj.bias");
        assert_eq!(source("blk.3.ffn_norm.weight"), "language_model.model.layers.3.post_attention_layernorm.weight");
        assert_eq!(source("rope_freqs.weight"), "rope_freqs.weight");
    }

    /// As `reshape(heads, 2, d/2, cols).swapaxes(1, 2)`, two heads of four rows.
    #[test]
    fn halves_become_neighbours() {
        let rows: Vec<f32> = (0..8).flat_map(|r| [r as f32, r as f32 + 0.5]).collect();
        let first: Vec<f32> = neighbours(&rows, 4, 2).chunks(2).map(|row| row[0]).collect();
        assert_eq!(first, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(neighbours(&rows, 4, 2)[3], 2.5);
        assert_eq!(neighbours(&[0.0, 1.0, 2.0, 3.0], 4, 1), [0.0, 2.0, 1.0, 3.0]);
    }
}
