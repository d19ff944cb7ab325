//! `vision_config` of InternViT, and the tensors of tower and projector, in both layouts.
use crate::front::config::{ConfigError, Section};
use crate::front::{Row, config_keys};
use serde_json::Value;

/// Who wrote the checkpoint's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// OpenGVLab's: q, k and v of the tower in one tensor.
    Original,
    /// transformers' (`-hf` repositories).
    Transformers,
}

/// What of the tower's blocks differs between its sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Of the tower of 300 M.
    Layer,
    /// Of the one of 6 B: RMS, no bias.
    Rms,
}

/// A ViT of square pictures with a class token, of which four neighbours become one token of the text.
#[derive(Debug, Clone, PartialEq)]
pub struct InternVit {
    pub layout: Layout,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    /// Side of a tile, pixels.
    pub image_size: usize,
    /// Side of a patch, pixels.
    pub patch_size: usize,
    pub norm: NormKind,
    pub norm_eps: f64,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// RMS norms over q and k, all heads at once.
    pub qk_norm: bool,
}

/// Patches on one side of what becomes a token.
pub(crate) const MERGE: usize = 2;
/// Width and blocks of the one tower with RMS norms that llama.cpp without our patches knows.
const UPSTREAM_RMS: (usize, usize) = (3200, 45);

impl InternVit {
    /// Reads `vision_config`. What transformers' files leave out has its class's value.
    pub(crate) fn read(s: &Section, layout: Layout) -> Result<Self, ConfigError> {
        let original = layout == Layout::Original;
        let kind = if original { "intern_vit_6b" } else { "internvl_vision" };
        if s.str("model_type")? != kind {
            return Err(ConfigError::Unsupported {
                file: s.file.clone(),
                found: format!("{}: {}", s.key("model_type"), s.str("model_type")?),
                supported: kind.into(),
            });
        }
        config_keys::check(s, config_keys::INTERN_VIT)?;
        let size = |key: &str, default: usize| match s.size_opt(key)? {
            None if original => Err(s.missing(key)),
            found => Ok(found.unwrap_or(default)),
        };
        let norm = match s.str_opt("norm_type")?.unwrap_or(if original { "rms_norm" } else { "layer_norm" }) {
            "layer_norm" => NormKind::Layer,
            "rms_norm" => NormKind::Rms,
            _ => return Err(s.invalid("norm_type", "layer_norm or rms_norm")),
        };
        let (bias, qk_norm) =
            if original { ("qkv_bias", "qk_normalization") } else { ("attention_bias", "use_qk_norm") };
        let this = InternVit {
            layout,
            hidden_size: size("hidden_size", 1024)?,
            intermediate_size: size("intermediate_size", 4096)?,
            num_layers: size("num_hidden_layers", 24)?,
            num_heads: size("num_attention_heads", 16)?,
            image_size: square(s, "image_size", 448)?,
            patch_size: square(s, "patch_size", 14)?,
            norm,
            norm_eps: s.float_opt("layer_norm_eps")?.unwrap_or(1e-6),
            qkv_bias: s.bool_opt(bias)?.unwrap_or(false),
            qk_norm: s.bool_opt(qk_norm)?.unwrap_or(original),
        };
        if !this.hidden_size.is_multiple_of(this.num_heads) {
            return Err(s.invalid("num_attention_heads", "a divisor of hidden_size"));
        }
        if this.image_size == 0 || !this.image_size.is_multiple_of(MERGE * this.patch_size) {
            return Err(s.invalid("image_size", "a multiple of two patches"));
        }
        // The runtime norms q and k as it norms the blocks' inputs.
        if this.qk_norm && norm == NormKind::Layer {
            return Err(s.invalid(qk_norm, "false where norm_type is layer_norm"));
        }
        if this.qk_norm && !original && this.norm_eps != 1e-6 {
            return Err(s.invalid("layer_norm_eps", "1e-6, which transformers has for the norms of q and k"));
        }
        Ok(this)
    }

    /// Patches on one side of a tile.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// What the user should know about norms that llama.cpp without our patches takes for layer norms.
    pub(crate) fn note(&self) -> Option<String> {
        let upstream = (self.hidden_size, self.num_layers) == UPSTREAM_RMS;
        (self.norm == NormKind::Rms && !upstream).then(|| {
            "the tower has RMS norms, which llama.cpp without this program's patches knows only in the tower of 6 B"
                .into()
        })
    }

    /// The checkpoint's tensor names before the number of a block.
    pub(crate) fn blocks(layout: Layout) -> &'static str {
        match layout {
            Layout::Original => "vision_model.encoder.layers.",
            Layout::Transformers => "vision_tower.vision_model.encoder.layer.",
        }
    }

    /// The tensors of tower and projector. `out` is the text model's width.
    pub(crate) fn rows(&self, out: usize) -> Vec<Row> {
        let (hidden, patch) = (self.hidden_size, self.patch_size);
        let [class, position, patches] = match self.layout {
            Layout::Original => ["class_embedding", "position_embedding", "patch_embedding"],
            Layout::Transformers => ["cls_token", "position_embeddings", "patch_embeddings.projection"],
        };
        let from = |part: &str| match self.layout {
            Layout::Original => format!("vision_model.embeddings.{part}"),
            Layout::Transformers => format!("vision_tower.vision_model.embeddings.{part}"),
        };
        let positions = [1, self.grid() * self.grid() + 1, hidden];
        let mut rows = vec![
            Row::vector("v.class_embd", from(class), &[1, 1, hidden]),
            Row::vector("v.position_embd.weight", from(position), &positions),
            Row::matrix("v.patch_embd.weight", from(&format!("{patches}.weight")), &[hidden, 3, patch, patch]),
            Row::vector("v.patch_embd.bias", from(&format!("{patches}.bias")), &[hidden]),
        ];
        (0..self.num_layers).for_each(|layer| self.block(layer, &mut rows));
        let merged = hidden * MERGE * MERGE;
        let [norm, first, second] = match self.layout {
            Layout::Original => ["mlp1.0", "mlp1.1", "mlp1.3"],
            Layout::Transformers => {
                ["multi_modal_projector.layer_norm", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"]
            }
        };
        rows.extend(Row::norm("mm.model.mlp.0", norm, merged, true));
        rows.extend(Row::linear("mm.model.mlp.1", first, [out, merged]));
        rows.extend(Row::linear("mm.model.mlp.3", second, [out, out]));
        rows
    }

    fn block(&self, layer: usize, rows: &mut Vec<Row>) {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (to, from) = (format!("v.blk.{layer}"), format!("{}{layer}", Self::blocks(self.layout)));
        let (norms, scales, qk, output) = match self.layout {
            Layout::Original => (["norm1", "norm2"], ["ls1", "ls2"], ["attn.q_norm", "attn.k_norm"], "attn.proj"),
            Layout::Transformers => (
                ["layernorm_before", "layernorm_after"],
                ["lambda_1", "lambda_2"],
                ["attention.q_norm", "attention.k_norm"],
                "attention.projection_layer",
            ),
        };
        let is_layer_norm = self.norm == NormKind::Layer;
        for (name, stored) in ["ln1", "ln2"].into_iter().zip(norms) {
            rows.extend(Row::norm(&format!("{to}.{name}"), &format!("{from}.{stored}"), hidden, is_layer_norm));
        }
        for (name, stored) in ["ls1", "ls2"].into_iter().zip(scales) {
            rows.push(Row::vector(format!("{to}.{name}.weight"), format!("{from}.{stored}"), &[hidden]));
        }
        if self.qk_norm {
            for (name, stored) in ["attn_q_norm", "attn_k_norm"].into_iter().zip(qk) {
                rows.extend(Row::norm(&format!("{to}.{name}"), &format!("{from}.{stored}"), hidden, false));
            }
        }
        for (part, name) in ["q", "k", "v"].into_iter().enumerate() {
            let to = format!("{to}.attn_{name}");
            let linear = match self.layout {
                Layout::Original => {
                    Row::linear(&to, &format!("{from}.attn.qkv"), [hidden, hidden]).map(|row| row.part(part, 3))
                }
                Layout::Transformers => Row::linear(&to, &format!("{from}.attention.{name}_proj"), [hidden, hidden]),
            };
            rows.extend(linear.into_iter().take(if self.qkv_bias { 2 } else { 1 }));
        }
        rows.extend(Row::linear(&format!("{to}.attn_out"), &format!("{from}.{output}"), [hidden, hidden]));
        rows.extend(Row::linear(&format!("{to}.ffn_up"), &format!("{from}.mlp.fc1"), [inner, hidden]));
        rows.extend(Row::linear(&format!("{to}.ffn_down"), &format!("{from}.mlp.fc2"), [hidden, inner]));
    }
}

/// A size that is a number or a pair of equal ones.
fn square(s: &Section, key: &str, default: usize) -> Result<usize, ConfigError> {
    let sides = match s.get(key) {
        None => return Ok(default),
        Some(Value::Array(sides)) => sides.clone(),
        Some(side) => vec![side.clone()],
    };
    let side = sides.first().and_then(Value::as_u64).filter(|side| (1..1 << 16).contains(side));
    let equal = sides.iter().all(|other| other.as_u64() == side);
    side.filter(|_| equal).map(|side| side as usize).ok_or_else(|| s.invalid(key, "a number of pixels, or equal sides"))
}
