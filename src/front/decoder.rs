//! `text_config` of Hugging Face's configurations: GGUF's keys for it, and its tensors' names.
use super::config::{ConfigError, Section};
use super::{Row, config_keys};
use crate::checkpoint::Checkpoint;
use crate::gguf::Metadata;

/// Text models that the decoder block covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecoderArch {
    /// Biases on q, k, v.
    Qwen2,
    /// No biases.
    Llama,
}

/// A text model: decoder blocks of `x + attn(norm(x))`, `h + mlp(norm(h))` with SwiGLU and rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    pub arch: DecoderArch,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Rows of the embedding, which may exceed the tokenizer's.
    pub vocab_size: usize,
    /// Context length, tokens.
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
}

impl DecoderConfig {
    /// Reads `text_config` of the configuration `c`, and what the user should know about it.
    ///
    /// # Errors
    /// A missing key, an unsupported architecture or value.
    pub(crate) fn of_checkpoint(checkpoint: &Checkpoint, c: &Section) -> Result<(Self, Option<String>), ConfigError> {
        let section = c.section("text_config")?;
        let outer = c.bool_opt("tie_word_embeddings")?.unwrap_or(false);
        // Published 0.5B files of LLaVA-OneVision tie in the text model only.
        let tied = outer || section.bool_opt("tie_word_embeddings")?.unwrap_or(false);
        let mut text = DecoderConfig::read(&section, Some(tied))?;
        // transformers 5 ties only what is equal: a head that was trained on is kept.
        if !tied || !checkpoint.contains(HEAD) || checkpoint.same(HEAD, EMBEDDING) {
            return Ok((text, None));
        }
        text.tie_word_embeddings = false;
        let head = checkpoint.stored_name(HEAD);
        let note = format!("tie_word_embeddings is true, but `{head}` differs from the embedding: it is kept");
        Ok((text, Some(note)))
    }

    /// Reads `text_config`. `tied` is the outer configuration's `tie_word_embeddings`, which published files set
    /// there or in the text model.
    pub(crate) fn read(s: &Section, tied: Option<bool>) -> Result<Self, ConfigError> {
        let model_type = s.str("model_type")?;
        let arch = match model_type {
            "qwen2" => DecoderArch::Qwen2,
            "llama" | "mistral" => DecoderArch::Llama,
            other => {
                return Err(ConfigError::Unsupported {
                    file: s.file.clone(),
                    found: format!("{}: {other}", s.key("model_type")),
                    supported: "qwen2, llama, mistral",
                });
            }
        };
        match s.str_opt("hidden_act")? {
            None | Some("silu") => (),
            _ => return Err(s.invalid("hidden_act", "silu")),
        }
        config_keys::check(s, config_keys::TEXT)?;
        let size = |key: &str| match s.size_opt(key)? {
            Some(size) => Ok(size),
            None => default_size(model_type, key).ok_or_else(|| s.missing(key)),
        };
        let num_layers = size("num_hidden_layers")?;
        let hidden_size = size("hidden_size")?;
        let num_heads = size("num_attention_heads")?;
        let max_position_embeddings = size("max_position_embeddings")?;
        match model_type {
            "mistral" => check_mistral_window(s, max_position_embeddings)?,
            _ => config_keys::check_windows(s, num_layers)?,
        }
        let num_kv_heads =
            s.size_opt("num_key_value_heads")?.or(default_size(model_type, "num_key_value_heads")).unwrap_or(num_heads);
        if num_heads % num_kv_heads != 0 {
            return Err(s.invalid("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        let head_dim = match s.size_opt("head_dim")? {
            Some(d) => d,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => return Err(s.invalid("num_attention_heads", "a divisor of hidden_size")),
        };
        if head_dim % 2 != 0 {
            return Err(s.invalid("head_dim", "even, for rotary positions"));
        }
        let llama = arch == DecoderArch::Llama;
        Ok(DecoderConfig {
            arch,
            hidden_size,
            intermediate_size: size("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: s.float_opt("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: rope_theta(s)?.unwrap_or(10_000.0),
            tie_word_embeddings: tied.or(s.bool_opt("tie_word_embeddings")?).unwrap_or(false),
            qkv_bias: if llama { s.bool_opt("attention_bias")?.unwrap_or(false) } else { true },
        })
    }
}

/// The sizes of transformers' `LlamaConfig`, `MistralConfig` and `Qwen2Config` that published files leave out.
fn default_size(model_type: &str, key: &str) -> Option<usize> {
    Some(match (model_type, key) {
        ("llama" | "mistral", "hidden_size") => 4096,
        ("llama" | "mistral", "num_hidden_layers" | "num_attention_heads") => 32,
        ("llama" | "mistral", "vocab_size") => 32000,
        ("llama", "intermediate_size") => 11008,
        ("mistral", "intermediate_size") => 14336,
        ("mistral", "num_key_value_heads") => 8,
        ("llama", "max_position_embeddings") => 2048,
        ("mistral", "max_position_embeddings") => 131_072,
        ("qwen2", "max_position_embeddings") => 32768,
        _ => return None,
    })
}

/// Refuses a Mistral whose window is narrower than its context: llama.cpp's `llama` attends to everything.
fn check_mistral_window(s: &Section, context: usize) -> Result<(), ConfigError> {
    const KEY: &str = "sliding_window";
    let window = match s.json.get(KEY) {
        Some(serde_json::Value::Null) => return Ok(()),
        Some(_) => s.size(KEY)?,
        // transformers' default.
        None => 4096,
    };
    if window < context {
        return Err(s.invalid(KEY, "null, or at least max_position_embeddings: sliding windows are not supported"));
    }
    Ok(())
}

/// The base of plain rotary positions. transformers 5 keeps it in `rope_parameters`, earlier ones beside the other keys.
///
/// # Errors
/// The positions are scaled, partial, in sections, or differ between blocks.
fn rope_theta(s: &Section) -> Result<Option<f64>, ConfigError> {
    let mut theta = s.float_opt("rope_theta")?;
    for key in ["rope_scaling", "rope_parameters"] {
        if s.get(key).is_none() {
            continue;
        }
        let rope = s.section(key)?;
        for key in ["rope_type", "type"] {
            if !matches!(rope.str_opt(key)?, None | Some("default")) {
                return Err(rope.invalid(key, "\"default\": scaled rotary positions are not supported yet"));
            }
        }
        if rope.get("mrope_section").is_some() {
            return Err(rope.invalid("mrope_section", "absent: positions in sections are not supported"));
        }
        if rope.float_opt("partial_rotary_factor")?.is_some_and(|f| f != 1.0) {
            return Err(rope.invalid("partial_rotary_factor", "1"));
        }
        let per_block = rope.json.as_object().and_then(|o| o.iter().find(|(_, v)| v.is_object()));
        if let Some((key, _)) = per_block {
            return Err(rope.invalid(key, "one set of rotary parameters for all blocks"));
        }
        theta = rope.float_opt("rope_theta")?.or(theta);
    }
    Ok(theta)
}

impl DecoderConfig {
    /// `general.architecture`.
    pub fn architecture(&self) -> &'static str {
        match self.arch {
            DecoderArch::Qwen2 => "qwen2",
            DecoderArch::Llama => "llama",
        }
    }

    /// Writes the architecture's keys.
    pub(crate) fn write(&self, keys: &mut Metadata) {
        let arch = self.architecture();
        let sizes = [
            ("context_length", self.max_position_embeddings),
            ("embedding_length", self.hidden_size),
            ("block_count", self.num_layers),
            ("feed_forward_length", self.intermediate_size),
            ("vocab_size", self.vocab_size),
            ("attention.head_count", self.num_heads),
            ("attention.head_count_kv", self.num_kv_heads),
            ("rope.dimension_count", self.head_dim),
        ];
        for (key, value) in sizes {
            keys.set(&format!("{arch}.{key}"), value as u32);
        }
        if self.arch == DecoderArch::Llama {
            for key in ["key_length", "value_length"] {
                keys.set(&format!("{arch}.attention.{key}"), self.head_dim as u32);
            }
        }
        keys.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), self.rms_norm_eps as f32);
        keys.set(&format!("{arch}.rope.freq_base"), self.rope_theta as f32);
    }

    /// The tensors in file order: embedding, output, blocks.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let vocab = [self.vocab_size, hidden];
        let mut rows = vec![
            Row::matrix("token_embd.weight", EMBEDDING, &vocab),
            Row::vector("output_norm.weight", "language_model.model.norm.weight", &[hidden]),
        ];
        if !self.tie_word_embeddings {
            rows.push(Row::matrix("output.weight", HEAD, &vocab));
        }
        let linears = [
            ("attn_q", "self_attn.q_proj", [q, hidden], self.qkv_bias),
            ("attn_k", "self_attn.k_proj", [kv, hidden], self.qkv_bias),
            ("attn_v", "self_attn.v_proj", [kv, hidden], self.qkv_bias),
            ("attn_output", "self_attn.o_proj", [hidden, q], false),
            ("ffn_gate", "mlp.gate_proj", [inner, hidden], false),
            ("ffn_up", "mlp.up_proj", [inner, hidden], false),
            ("ffn_down", "mlp.down_proj", [hidden, inner], false),
        ];
        for layer in 0..self.num_layers {
            let to = |part: &str| format!("blk.{layer}.{part}");
            let from = |part: &str| format!("{BLOCKS}{layer}.{part}");
            for (name, stored) in [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")] {
                rows.push(Row::vector(to(&format!("{name}.weight")), from(&format!("{stored}.weight")), &[hidden]));
            }
            for (name, stored, shape, bias) in linears {
                // ggml turns neighbours of Llama's heads, transformers halves.
                let turned = self.arch == DecoderArch::Llama && matches!(name, "attn_q" | "attn_k");
                let order = |row: Row| if turned { row.neighbours(self.head_dim) } else { row };
                let (weight, of) = (to(&format!("{name}.weight")), from(&format!("{stored}.weight")));
                rows.push(order(Row::matrix(weight, of, &shape)));
                if bias {
                    let (bias, of) = (to(&format!("{name}.bias")), from(&format!("{stored}.bias")));
                    rows.push(order(Row::vector(bias, of, &shape[..1])));
                }
            }
        }
        rows
    }
}

/// Canonical names.
pub(crate) const BLOCKS: &str = "language_model.model.layers.";
pub(crate) const EMBEDDING: &str = "language_model.model.embed_tokens.weight";
pub(crate) const HEAD: &str = "language_model.lm_head.weight";
