//! A text model's hyperparameters, read from GGUF metadata keys, whoever has them: a GGUF file, or a front that
//! translates another format's configuration. A key of the architecture that is not understood is refused: it may
//! change what the model computes.
use super::LinearName;
use super::arch::{ARCHITECTURES, Sections, Sliding, TextArch};
use crate::gguf::{Array, Metadata, Value};
use std::path::{Path, PathBuf};

/// Why a text model cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    #[error("{file}: metadata key `{key}` is missing")]
    Missing { file: PathBuf, key: String },
    #[error("{file}: metadata key `{key}` is {found}; expected {want}")]
    Invalid { file: PathBuf, key: String, found: String, want: String },
    #[error(
        "{file}: text architecture `{found}` cannot be calibrated; supported: {supported}. \
         `--method rtn` and `--imatrix FILE` need no calibration"
    )]
    Architecture { file: PathBuf, found: String, supported: String },
    #[error("{file}: metadata key `{key}` ({found}) may change what the model computes and is not understood")]
    NotUnderstood { file: PathBuf, key: String, found: String },
}

/// Scaling of rotary angles.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions are divided.
    Linear(f64),
    /// Slow pairs are divided, and attention is sharpened by `1 + 0.1 ln factor` on either side.
    Yarn {
        factor: f64,
        original_context: usize,
    },
}

/// How angles follow from positions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    pub base: f64,
    pub scaling: RopeScaling,
}

/// Hyperparameters of a text model.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    pub arch: &'static TextArch,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Tokens.
    pub context_length: usize,
    pub rms_norm_eps: f64,
    /// Scores are multiplied by it.
    pub attention_scale: f64,
    /// Of the blocks that see everything.
    pub rotary: Rotary,
    /// Of the blocks with a window.
    pub local_rotary: Rotary,
    /// By block, how many tokens a token sees, itself included; none: all before it.
    pub windows: Vec<Option<usize>>,
    /// Pairs of a head that turn by time, height and width.
    pub rope_sections: [usize; 3],
    /// Blocks behind which features are added to a picture's tokens.
    pub deepstack_layers: usize,
}

/// Keys that change nothing, whatever they say.
const HARMLESS: &[&str] = &["rope.scaling.finetuned", "tensor_data_layout", "attention.layer_norm_epsilon"];

/// Keys of what the block does not do, with the value that says the model does not either.
const NEUTRAL: &[(&str, f64)] = &[
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.causal", 1.0),
    ("attention.temperature_scale", 0.0),
    ("use_parallel_residual", 0.0),
    ("nextn_predict_layers", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
    ("rope.scaling.alpha", 0.0),
    ("rope.scaling.attn_factor", 1.0),
    ("rope.scaling.yarn_attn_factor", 1.0),
    ("rope.scaling.yarn_ext_factor", 1.0),
    ("rope.scaling.yarn_beta_fast", 32.0),
    ("rope.scaling.yarn_beta_slow", 1.0),
];

/// Keys that [`TextConfig::read`] reads.
const READ: &[&str] = &[
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "context_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "rope.dimension_sections",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "n_deepstack_layers",
];

/// The keys of one architecture.
struct ArchKeys<'a> {
    file: &'a Path,
    metadata: &'a Metadata,
    arch: &'static TextArch,
}

fn show(value: Option<&Value>) -> String {
    let Some(value) = value else { return "absent".into() };
    let text = match (value.as_str(), value.as_f64(), value.as_bool(), value.as_array()) {
        (Some(text), ..) => text.into(),
        (_, Some(number), ..) => number.to_string(),
        (.., Some(flag), _) => flag.to_string(),
        (.., Some(array)) if array.len() <= 8 => array.iter().map(|v| show(Some(&v))).collect::<Vec<_>>().join(", "),
        (.., array) => format!("a list of {}", array.map_or(0, Array::len)),
    };
    text.chars().take(80).collect()
}

/// A number, true being 1.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or(value.as_bool().map(|flag| f64::from(u8::from(flag))))
}

/// A number from 0 to 2^31, or a list of equal ones: GGUF may list what differs from block to block.
fn count(value: &Value) -> Option<usize> {
    if let Some(all) = value.as_array() {
        let first = all.iter().next()?;
        return all.iter().all(|v| v == first).then(|| count(&first)).flatten();
    }
    value.as_u64().filter(|&v| v < 1 << 31).map(|v| v as usize)
}

impl ArchKeys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch.name)
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(&self.name(key))
    }

    fn invalid(&self, key: &str, want: impl Into<String>) -> TextError {
        let found = show(self.get(key));
        TextError::Invalid { file: self.file.into(), key: self.name(key), found, want: want.into() }
    }

    fn missing(&self, key: &str) -> TextError {
        TextError::Missing { file: self.file.into(), key: self.name(key) }
    }

    fn count_opt(&self, key: &str) -> Result<Option<usize>, TextError> {
        let want = "a whole number, the same for every block";
        self.get(key).map(|v| count(v).ok_or_else(|| self.invalid(key, want))).transpose()
    }

    /// A positive count.
    fn size_opt(&self, key: &str) -> Result<Option<usize>, TextError> {
        match self.count_opt(key)? {
            Some(0) => Err(self.invalid(key, "a positive number")),
            size => Ok(size),
        }
    }

    fn size(&self, key: &str) -> Result<usize, TextError> {
        self.size_opt(key)?.ok_or_else(|| self.missing(key))
    }

    /// A positive number.
    fn float_opt(&self, key: &str) -> Result<Option<f64>, TextError> {
        let positive = |v: &Value| number(v).filter(|v| v.is_finite() && *v > 0.0);
        self.get(key).map(|v| positive(v).ok_or_else(|| self.invalid(key, "a positive number"))).transpose()
    }

    /// Refuses keys that are not understood.
    fn check(&self) -> Result<(), TextError> {
        let prefix = format!("{}.", self.arch.name);
        for (name, value) in self.metadata.iter() {
            let Some(key) = name.strip_prefix(&prefix) else { continue };
            let neutral = NEUTRAL.iter().find(|(n, _)| *n == key).map(|(_, neutral)| *neutral);
            let is_neutral = neutral.is_some() && number(value) == neutral;
            // llama.cpp takes a scale of 0 for none.
            let none = key.ends_with("_scale") && number(value) == Some(0.0);
            let order = key == "rope.section_order" && value.as_str() == Some("tyxz");
            if !(READ.contains(&key) || HARMLESS.contains(&key) || is_neutral || none || order) {
                let found = show(Some(value));
                return Err(TextError::NotUnderstood { file: self.file.into(), key: name.into(), found });
            }
        }
        Ok(())
    }

    /// Checks that a size, where it is given, is `want`.
    fn equal(&self, key: &str, want: usize) -> Result<(), TextError> {
        match self.count_opt(key)? {
            Some(found) if found != want => {
                Err(self.invalid(key, format!("{want}: heads of other widths, or turned in part, are not supported")))
            }
            _ => Ok(()),
        }
    }

    /// The width of all heads.
    fn head_dim(&self, default: usize) -> Result<usize, TextError> {
        let head_dim = self.size_opt("attention.key_length")?.unwrap_or(default);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(self.invalid("attention.key_length", "an even number, for rotary positions"));
        }
        for key in ["attention.value_length", "rope.dimension_count"] {
            self.equal(key, head_dim)?;
            self.equal(&format!("{key}_swa"), head_dim)?;
        }
        self.equal("attention.key_length_swa", head_dim)?;
        Ok(head_dim)
    }

    /// What scores are multiplied by. llama.cpp reads the key of none of these architectures: another value would be one
    /// that the file's own runtime does not compute with.
    fn attention_scale(&self, hidden_per_head: usize, head_dim: usize, layers: usize) -> Result<f64, TextError> {
        // llama.cpp knows Gemma 3 27B by its blocks.
        let width = if self.arch.name == "gemma3" && layers == 62 { hidden_per_head } else { head_dim };
        let scale = 1.0 / (width as f64).sqrt();
        match self.float_opt("attention.scale")? {
            Some(given) if (given / scale - 1.0).abs() > 1e-5 => {
                Err(self.invalid("attention.scale", format!("{scale}, as llama.cpp has it for this architecture")))
            }
            _ => Ok(scale),
        }
    }

    /// How blocks with a window turn, the others turning as `rotary` says.
    fn local_rotary(&self, rotary: Rotary) -> Result<Rotary, TextError> {
        match (self.arch.sliding, self.float_opt("rope.freq_base_swa")?) {
            (Sliding::ButSixth, base) => Ok(Rotary { base: base.unwrap_or(10_000.0), scaling: RopeScaling::None }),
            (_, None) => Ok(rotary),
            (_, Some(_)) => Err(self.invalid("rope.freq_base_swa", "one base in this architecture")),
        }
    }

    fn scaling(&self, context: usize) -> Result<RopeScaling, TextError> {
        let factor = self.float_opt("rope.scaling.factor")?;
        let factor = if factor.is_some() { factor } else { self.float_opt("rope.scale_linear")? }.unwrap_or(1.0);
        let kind = match self.get("rope.scaling.type") {
            None => "linear",
            Some(kind) => kind.as_str().ok_or_else(|| self.invalid("rope.scaling.type", "a text"))?,
        };
        let original_context = self.size_opt("rope.scaling.original_context_length")?.unwrap_or(context);
        match kind {
            "none" => Ok(RopeScaling::None),
            "linear" if factor == 1.0 => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear(factor)),
            "yarn" => Ok(RopeScaling::Yarn { factor, original_context }),
            _ => Err(self.invalid("rope.scaling.type", "none, linear or yarn")),
        }
    }

    fn windows(&self, layers: usize) -> Result<Vec<Option<usize>>, TextError> {
        const KEY: &str = "attention.sliding_window";
        const PATTERN: &str = "attention.sliding_window_pattern";
        let window = self.count_opt(KEY)?.filter(|&w| w > 0);
        let (Some(window), sliding) = (window, self.arch.sliding) else { return Ok(vec![None; layers]) };
        let period = match (sliding, self.get(PATTERN)) {
            (Sliding::Refused, _) => return Err(self.invalid(KEY, "no window in this architecture")),
            (Sliding::All, None) => 0,
            (Sliding::All, Some(_)) => return Err(self.invalid(PATTERN, "no pattern in this architecture")),
            (Sliding::ButSixth, None) => 6,
            (Sliding::ButSixth, Some(Value::Array(all))) => {
                // One flag per block: whether it has a window.
                let flags: Option<Vec<f64>> = all.iter().map(|v| number(&v)).collect();
                let flags = flags.filter(|flags| flags.len() == layers);
                let flags = flags.ok_or_else(|| self.invalid(PATTERN, "one flag per block"))?;
                return Ok(flags.into_iter().map(|flag| (flag != 0.0).then_some(window)).collect());
            }
            (Sliding::ButSixth, Some(_)) => self.count_opt(PATTERN)?.unwrap_or(6),
        };
        Ok((0..layers).map(|i| (period == 0 || i % period + 1 < period).then_some(window)).collect())
    }

    fn sections(&self, head_dim: usize) -> Result<[usize; 3], TextError> {
        const KEY: &str = "rope.dimension_sections";
        if self.arch.sections == Sections::None {
            return match self.get(KEY) {
                None => Ok([0; 3]),
                Some(_) => Err(self.invalid(KEY, "no sections in this architecture")),
            };
        }
        let Some(value) = self.get(KEY) else { return Err(self.missing(KEY)) };
        let list: Option<Vec<usize>> = value.as_array().and_then(|all| all.iter().map(|v| count(&v)).collect());
        match list.as_deref() {
            Some(&[t, h, w] | &[t, h, w, 0]) if t + h + w == head_dim / 2 => Ok([t, h, w]),
            _ => Err(self.invalid(KEY, format!("time, height, width and 0, together {}", head_dim / 2))),
        }
    }

    /// The vocabulary's size, from the architecture's key or the number of tokens.
    fn vocab_size(&self) -> Result<usize, TextError> {
        let tokens = self.metadata.get("tokenizer.ggml.tokens").and_then(Value::as_array).map(Array::len);
        match tokens {
            Some(tokens) if tokens > 0 => Ok(tokens),
            _ => self.size("vocab_size"),
        }
    }
}

impl TextConfig {
    /// Reads the keys of `general.architecture`. `file` is what messages name.
    ///
    /// # Errors
    /// An architecture, key or value that is missing or not understood; the message names it.
    pub fn read(file: &Path, metadata: &Metadata) -> Result<Self, TextError> {
        let name = match metadata.architecture() {
            "" => return Err(TextError::Missing { file: file.into(), key: "general.architecture".into() }),
            name => name,
        };
        let arch = TextArch::named(name).ok_or_else(|| TextError::Architecture {
            file: file.into(),
            found: name.into(),
            supported: ARCHITECTURES.each_ref().map(|a| a.name).join(", "),
        })?;
        let keys = ArchKeys { file, metadata, arch };
        keys.check()?;
        let (hidden_size, num_heads) = (keys.size("embedding_length")?, keys.size("attention.head_count")?);
        let num_kv_heads = keys.size_opt("attention.head_count_kv")?.unwrap_or(num_heads);
        if !num_heads.is_multiple_of(num_kv_heads) {
            return Err(keys.invalid("attention.head_count_kv", format!("a divisor of {num_heads}")));
        }
        let head_dim = keys.head_dim(hidden_size / num_heads)?;
        let num_layers = keys.size("block_count")?;
        // llama.cpp's own bound.
        if num_layers > 512 {
            return Err(keys.invalid("block_count", "at most 512"));
        }
        let context_length = keys.size("context_length")?;
        let base = keys.float_opt("rope.freq_base")?.unwrap_or(10_000.0);
        let rotary = Rotary { base, scaling: keys.scaling(context_length)? };
        let local_rotary = keys.local_rotary(rotary)?;
        let deepstack_layers = keys.count_opt("n_deepstack_layers")?.unwrap_or(0);
        if deepstack_layers > if arch.deepstack { num_layers } else { 0 } {
            return Err(keys.invalid("n_deepstack_layers", "at most the blocks, of an architecture that has them"));
        }
        Ok(TextConfig {
            arch,
            hidden_size,
            intermediate_size: keys.size("feed_forward_length")?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: keys.vocab_size()?,
            context_length,
            rms_norm_eps: keys
                .float_opt("attention.layer_norm_rms_epsilon")?
                .ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))?,
            attention_scale: keys.attention_scale(hidden_size / num_heads, head_dim, num_layers)?,
            rotary,
            local_rotary,
            windows: keys.windows(num_layers)?,
            rope_sections: keys.sections(head_dim)?,
            deepstack_layers,
        })
    }

    /// Rows and columns of a linear: outputs and inputs.
    pub fn shape(&self, name: LinearName) -> [usize; 2] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        match name {
            LinearName::Q => [self.num_heads * self.head_dim, hidden],
            LinearName::K | LinearName::V => [self.num_kv_heads * self.head_dim, hidden],
            LinearName::O => [hidden, self.num_heads * self.head_dim],
            LinearName::Gate | LinearName::Up => [inner, hidden],
            LinearName::Down => [hidden, inner],
        }
    }
}
