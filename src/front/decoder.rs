//! `text_config` of Hugging Face's configurations: GGUF's keys for it, and its tensors' names.
use super::config::{ConfigError, Section};
use super::{Row, claims, config_keys};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::gguf::Metadata;

/// Text models that the decoder block covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecoderArch {
    /// Biases on q, k, v.
    Qwen2,
    /// No biases.
    Llama,
    /// Qwen2 with positions in sections: Qwen2-VL and Qwen2.5-VL.
    Qwen2Vl,
    /// Norms of q and k.
    Qwen3,
    /// Qwen3 with positions in interleaved sections, and features that enter the first blocks.
    Qwen3Vl,
    /// Norms of q and k and behind attention and MLP, all with gains of `1 + w`; most blocks see a window.
    Gemma3,
    /// Llama with q, k and v in one tensor, those that share a key side by side.
    InternLm2,
}

/// What the blocks of Gemma 3 see that see only the last tokens, all but every sixth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Windows {
    /// So many tokens, the token itself among them.
    pub tokens: usize,
    /// The base of their rotary positions.
    pub rope_theta: f64,
}

impl DecoderArch {
    /// The architecture of a `model_type`, the text model's or, where its keys lie on the outside, the model's.
    fn of(model_type: &str) -> Option<Self> {
        Some(match model_type {
            "qwen2" => DecoderArch::Qwen2,
            "llama" | "mistral" => DecoderArch::Llama,
            "qwen2_vl" | "qwen2_vl_text" | "qwen2_5_vl" | "qwen2_5_vl_text" => DecoderArch::Qwen2Vl,
            "qwen3" => DecoderArch::Qwen3,
            "qwen3_vl_text" => DecoderArch::Qwen3Vl,
            "internlm2" => DecoderArch::InternLm2,
            _ => return None,
        })
    }

    /// RMS norms over each head's q and k.
    fn has_qk_norms(self) -> bool {
        matches!(self, DecoderArch::Qwen3 | DecoderArch::Qwen3Vl)
    }

    /// Positions are time, height and width, each with its section of a head.
    fn has_sections(self) -> bool {
        matches!(self, DecoderArch::Qwen2Vl | DecoderArch::Qwen3Vl)
    }

    /// The `rms_norm_eps` that transformers' class takes where the key is absent.
    fn epsilon(self) -> f64 {
        if self == DecoderArch::Qwen2Vl { 1e-5 } else { 1e-6 }
    }

    /// The `max_window_layers` that it takes.
    fn first_window(self) -> u64 {
        if self == DecoderArch::Qwen2Vl { 80 } else { 28 }
    }
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
    /// Positions are divided by it, but in blocks with windows.
    pub rope_factor: f64,
    /// Of Gemma 3.
    pub windows: Option<Windows>,
    /// Pairs of a head that turn by time, height and width; none: there is one position.
    pub rope_sections: Option<[usize; 3]>,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Of Qwen3-VL: the first blocks, which get features of their own from the tower.
    pub deepstack_layers: usize,
}

impl DecoderConfig {
    /// Reads `text_config` of the configuration `c`, and what the user should know about it.
    ///
    /// # Errors
    /// A missing key, an unsupported architecture or value.
    pub(crate) fn of_checkpoint(checkpoint: &Checkpoint, c: &Section) -> Result<(Self, Vec<String>), ConfigError> {
        Self::of_section(checkpoint, c, &c.section("text_config")?)
    }

    /// The same where the text model's keys lie in `section`.
    ///
    /// # Errors
    /// As [`Self::of_checkpoint`].
    pub(crate) fn of_section(
        checkpoint: &Checkpoint,
        c: &Section,
        section: &Section,
    ) -> Result<(Self, Vec<String>), ConfigError> {
        let outer = c.bool_opt("tie_word_embeddings")?.unwrap_or(false);
        // Published 0.5B files of LLaVA-OneVision tie in the text model only.
        let tied = outer || section.bool_opt("tie_word_embeddings")?.unwrap_or(false);
        let mut text = DecoderConfig::read(section, Some(tied))?;
        let mut notes = Vec::new();
        if rope_is_dynamic(section) {
            let trained = text.max_position_embeddings;
            notes.push(format!(
                "beyond {trained} tokens transformers turns positions more slowly (dynamic rope scaling), llama.cpp does not"
            ));
        }
        notes.extend(text.settle_head(checkpoint));
        Ok((text, notes))
    }

    /// Checks that the checkpoint holds as many blocks as `key`, of config.json, says.
    ///
    /// # Errors
    /// It does not; the message names the key.
    pub(crate) fn check_blocks(&self, checkpoint: &Checkpoint, key: &'static str) -> Result<(), CheckpointError> {
        claims::blocks(checkpoint, key, self.num_layers, BLOCKS, [self.num_layers; 2])
    }

    /// transformers 5 ties only what is equal: a head that was trained on is kept, and the user told.
    pub(crate) fn settle_head(&mut self, checkpoint: &Checkpoint) -> Option<String> {
        if !self.tie_word_embeddings || !checkpoint.contains(HEAD) || checkpoint.same(HEAD, EMBEDDING) {
            return None;
        }
        self.tie_word_embeddings = false;
        let head = checkpoint.stored_name(HEAD);
        Some(format!("tie_word_embeddings is true, but `{head}` differs from the embedding: it is kept"))
    }

    /// Reads `text_config`. `tied` is the outer configuration's `tie_word_embeddings`, which published files set
    /// there or in the text model.
    pub(crate) fn read(s: &Section, tied: Option<bool>) -> Result<Self, ConfigError> {
        let model_type = s.str("model_type")?;
        let arch = DecoderArch::of(model_type).ok_or_else(|| ConfigError::Unsupported {
            file: s.file.clone(),
            found: format!("{}: {model_type}", s.key("model_type")),
            supported: "qwen2, qwen3, llama, mistral, internlm2, qwen2_vl_text, qwen2_5_vl_text, qwen3_vl_text".into(),
        })?;
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
            _ => config_keys::check_windows(s, num_layers, arch.first_window())?,
        }
        let (num_kv_heads, head_dim) = key_heads(s, arch, num_heads, hidden_size)?;
        let sections = if arch.has_sections() { Some(rope_sections(s, arch, head_dim)?) } else { None };
        let rope_theta = match rope_theta(s, arch.has_sections())? {
            Some(theta) => theta,
            // Versions of transformers differ in what they take.
            None if arch.has_sections() => return Err(s.missing("rope_theta")),
            None => 10_000.0,
        };
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
            rms_norm_eps: s.float_opt("rms_norm_eps")?.unwrap_or(arch.epsilon()),
            rope_theta,
            rope_factor: 1.0,
            windows: None,
            rope_sections: sections,
            // The tower's configuration says it.
            deepstack_layers: 0,
            tie_word_embeddings: tied.or(s.bool_opt("tie_word_embeddings")?).unwrap_or(false),
            qkv_bias: match arch {
                DecoderArch::Qwen2 | DecoderArch::Qwen2Vl => true,
                DecoderArch::Llama | DecoderArch::Qwen3 | DecoderArch::Qwen3Vl => {
                    s.bool_opt("attention_bias")?.unwrap_or(false)
                }
                // Gemma's is read elsewhere.
                DecoderArch::InternLm2 | DecoderArch::Gemma3 => false,
            },
        })
    }
}

/// How many heads keys and values have, and the width of a head.
fn key_heads(s: &Section, arch: DecoderArch, heads: usize, hidden: usize) -> Result<(usize, usize), ConfigError> {
    const KEY: &str = "num_key_value_heads";
    let kv_heads = match s.size_opt(KEY)?.or(default_size(s.str("model_type")?, KEY)) {
        Some(n) => n,
        // The classes' defaults are of one size of model.
        None if arch.has_sections() || arch == DecoderArch::Qwen3 => return Err(s.missing(KEY)),
        None => heads,
    };
    check_groups(s, heads, kv_heads)?;
    let head_dim = match s.size_opt("head_dim")? {
        Some(d) => d,
        None if arch.has_qk_norms() => 128,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(s.invalid("num_attention_heads", "a divisor of hidden_size")),
    };
    if matches!(arch, DecoderArch::Qwen2Vl | DecoderArch::InternLm2) && heads * head_dim != hidden {
        return Err(s.invalid("head_dim", "hidden_size / num_attention_heads, as this architecture has it"));
    }
    check_head_dim(s, head_dim)?;
    Ok((kv_heads, head_dim))
}

/// Every head of keys and values serves as many of the queries'.
pub(super) fn check_groups(s: &Section, heads: usize, kv_heads: usize) -> Result<(), ConfigError> {
    if heads.is_multiple_of(kv_heads) {
        return Ok(());
    }
    Err(s.invalid("num_key_value_heads", "a divisor of num_attention_heads"))
}

pub(super) fn check_head_dim(s: &Section, head_dim: usize) -> Result<(), ConfigError> {
    if head_dim.is_multiple_of(2) {
        return Ok(());
    }
    Err(s.invalid("head_dim", "even, for rotary positions"))
}

/// The sizes of transformers' configuration classes that published files leave out.
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
        ("qwen3_vl_text", "max_position_embeddings") => 128_000,
        ("internlm2", "max_position_embeddings") => 2048,
        // Qwen2's, and Qwen2-VL's and 2.5's.
        (_, "max_position_embeddings") => 32768,
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

/// Where the rotary positions are described. transformers 5 keeps them in `rope_parameters`, earlier ones beside the other
/// keys and in `rope_scaling`.
const ROPE: [&str; 2] = ["rope_scaling", "rope_parameters"];

/// The base of rotary positions, which are plain, or in sections if `sections`.
///
/// # Errors
/// The positions are scaled, partial, in sections where they should not be, or differ between blocks.
fn rope_theta(s: &Section, sections: bool) -> Result<Option<f64>, ConfigError> {
    let mut theta = s.float_opt("rope_theta")?;
    for key in ROPE {
        if s.get(key).is_none() {
            continue;
        }
        let rope = s.section(key)?;
        for key in ["rope_type", "type"] {
            let plain = match rope.str_opt(key)? {
                None | Some("default") => true,
                // Plain up to `max_position_embeddings`, the length that the model was trained for.
                Some("dynamic") => !sections,
                // An old name of positions in sections that are not scaled.
                Some("mrope") => sections,
                Some(_) => false,
            };
            if !plain {
                return Err(rope.invalid(key, "\"default\": scaled rotary positions are not supported yet"));
            }
        }
        if !sections && rope.get("mrope_section").is_some() {
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

/// Whether transformers turns positions more slowly beyond `max_position_embeddings`.
fn rope_is_dynamic(s: &Section) -> bool {
    let says = |key: &str| ["rope_type", "type"].iter().any(|kind| s.json[key][kind] == "dynamic");
    ROPE.iter().any(|key| says(key))
}

/// How many pairs of a head turn by time, height and width.
///
/// # Errors
/// They are not said, said twice, do not make up a head, or are ordered as this architecture's are not.
fn rope_sections(s: &Section, arch: DecoderArch, head_dim: usize) -> Result<[usize; 3], ConfigError> {
    const KEY: &str = "mrope_section";
    let mut found = None;
    for key in ROPE {
        let Some(rope) = s.get(key).map(|_| s.section(key)).transpose()? else { continue };
        // transformers orders them by the class, whatever the key says.
        let interleaved = rope.bool_opt("mrope_interleaved")?;
        if interleaved.is_some_and(|i| i != (arch == DecoderArch::Qwen3Vl)) {
            return Err(rope.invalid("mrope_interleaved", "true for Qwen3-VL, else false or absent"));
        }
        let Some(list) = rope.get(KEY) else { continue };
        let sizes: Option<Vec<usize>> =
            list.as_array().and_then(|l| l.iter().map(|v| usize::try_from(v.as_u64()?).ok()).collect());
        let sections = sizes.and_then(|sizes| <[usize; 3]>::try_from(sizes).ok());
        let sections = sections.filter(|n| n.iter().all(|n| *n <= head_dim) && n.iter().sum::<usize>() * 2 == head_dim);
        let sections =
            sections.ok_or_else(|| rope.invalid(KEY, "three numbers whose sum is half of a head's width"))?;
        if found.is_some_and(|other| other != sections) {
            return Err(rope.invalid(KEY, "the same in rope_scaling and rope_parameters"));
        }
        found = Some(sections);
    }
    found.ok_or_else(|| s.missing("rope_scaling.mrope_section"))
}

impl DecoderConfig {
    /// `general.architecture`.
    pub fn architecture(&self) -> &'static str {
        match self.arch {
            DecoderArch::Qwen2 => "qwen2",
            DecoderArch::Llama => "llama",
            DecoderArch::Qwen2Vl => "qwen2vl",
            DecoderArch::Qwen3 => "qwen3",
            DecoderArch::Qwen3Vl => "qwen3vl",
            DecoderArch::Gemma3 => "gemma3",
            DecoderArch::InternLm2 => "internlm2",
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
        if matches!(self.arch, DecoderArch::Llama | DecoderArch::Gemma3) || self.arch.has_qk_norms() {
            for key in ["key_length", "value_length"] {
                keys.set(&format!("{arch}.attention.{key}"), self.head_dim as u32);
            }
        }
        keys.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), self.rms_norm_eps as f32);
        keys.set(&format!("{arch}.rope.freq_base"), self.rope_theta as f32);
        if self.rope_factor != 1.0 {
            keys.set(&format!("{arch}.rope.scaling.type"), "linear");
            keys.set(&format!("{arch}.rope.scaling.factor"), self.rope_factor as f32);
        }
        if let Some(windows) = self.windows {
            keys.set(&format!("{arch}.attention.sliding_window"), windows.tokens as u32);
            keys.set(&format!("{arch}.rope.freq_base_swa"), windows.rope_theta as f32);
        }
        if let Some([time, height, width]) = self.rope_sections {
            // The fourth is of no use here.
            let sections = [time, height, width, 0].map(|n| n as i32);
            keys.set_array(&format!("{arch}.rope.dimension_sections"), sections.as_slice());
        }
        if self.arch == DecoderArch::Qwen3Vl {
            keys.set(&format!("{arch}.n_deepstack_layers"), self.deepstack_layers as u32);
        }
    }

    /// A norm's gain.
    fn gain(&self, to: &str, from: &str, width: usize) -> Row {
        let row = Row::vector(to, from, &[width]);
        if self.arch == DecoderArch::Gemma3 { row.plus_one() } else { row }
    }

    /// The norms of a block: GGUF's name, the checkpoint's.
    fn norms(&self) -> &'static [(&'static str, &'static str)] {
        const HEADS: [(&str, &str); 2] = [("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];
        const BEFORE: [(&str, &str); 2] = [("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")];
        match self.arch {
            DecoderArch::Qwen2 | DecoderArch::Llama | DecoderArch::Qwen2Vl | DecoderArch::InternLm2 => &BEFORE,
            DecoderArch::Qwen3 | DecoderArch::Qwen3Vl => const { &[BEFORE[0], BEFORE[1], HEADS[0], HEADS[1]] },
            DecoderArch::Gemma3 => {
                const {
                    &[
                        ("attn_norm", "input_layernorm"),
                        HEADS[0],
                        HEADS[1],
                        ("post_attention_norm", "post_attention_layernorm"),
                        ("ffn_norm", "pre_feedforward_layernorm"),
                        ("post_ffw_norm", "post_feedforward_layernorm"),
                    ]
                }
            }
        }
    }

    /// The tensors in file order: embedding, output, blocks.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let vocab = [self.vocab_size, hidden];
        let mut rows = vec![
            Row::matrix("token_embd.weight", EMBEDDING, &vocab),
            self.gain("output_norm.weight", "language_model.model.norm.weight", hidden),
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
            let from = |part: &str| format!("{BLOCKS}{layer}.{}", self.stored_part(part));
            for (name, stored) in self.norms() {
                let width = if stored.starts_with("self_attn") { self.head_dim } else { hidden };
                rows.push(self.gain(&to(&format!("{name}.weight")), &(from(stored) + ".weight"), width));
            }
            for (name, stored, shape, bias) in linears {
                let (weight, of) = (to(&format!("{name}.weight")), from(stored) + ".weight");
                rows.push(self.ordered(name, Row::matrix(weight, of, &shape)));
                if bias {
                    let (bias, of) = (to(&format!("{name}.bias")), from(stored) + ".bias");
                    rows.push(self.ordered(name, Row::vector(bias, of, &shape[..1])));
                }
            }
        }
        rows
    }

    /// What the architecture's checkpoints call a part of a block that is `part` in most.
    fn stored_part<'n>(&self, part: &'n str) -> &'n str {
        if self.arch != DecoderArch::InternLm2 {
            return part;
        }
        match part {
            "input_layernorm" => "attention_norm",
            "post_attention_layernorm" => "ffn_norm",
            "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => "attention.wqkv",
            "self_attn.o_proj" => "attention.wo",
            "mlp.gate_proj" => "feed_forward.w1",
            "mlp.up_proj" => "feed_forward.w3",
            "mlp.down_proj" => "feed_forward.w2",
            other => other,
        }
    }

    /// The row of a linear with the order of its heads: ggml turns neighbours of Llama's heads, transformers halves.
    fn ordered(&self, name: &str, row: Row) -> Row {
        let turned =
            matches!(self.arch, DecoderArch::Llama | DecoderArch::InternLm2) && matches!(name, "attn_q" | "attn_k");
        let row = if turned { row.neighbours(self.head_dim) } else { row };
        let queries = self.num_heads / self.num_kv_heads;
        let heads = match (self.arch, name) {
            (DecoderArch::InternLm2, "attn_q") => 0..queries,
            (DecoderArch::InternLm2, "attn_k") => queries..queries + 1,
            (DecoderArch::InternLm2, "attn_v") => queries + 1..queries + 2,
            _ => return row,
        };
        row.grouped(self.head_dim, heads, queries + 2)
    }
}

/// Canonical names.
pub(crate) const BLOCKS: &str = "language_model.model.layers.";
pub(crate) const EMBEDDING: &str = "language_model.model.embed_tokens.weight";
pub(crate) const HEAD: &str = "language_model.lm_head.weight";
