//! `vision_config` of the three generations, and the tensors of their towers and mergers.
use crate::front::config::{ConfigError, Section};
use crate::front::{Row, config_keys};

/// Which of the three towers it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// Qwen2-VL: layer norms, two linears with the quick GELU.
    Two,
    /// Qwen2.5-VL: RMS norms, SwiGLU, and attention within windows but in every n-th block.
    TwoFive,
    /// Qwen3-VL: layer norms, two linears with the tanh GELU, learned positions, and the output of some blocks merged
    /// on its own, for the first blocks of the text model.
    Three,
}

impl Generation {
    /// The generation of a checkpoint's `model_type`.
    pub(crate) fn of(model_type: &str) -> Option<Self> {
        Some(match model_type {
            "qwen2_vl" => Generation::Two,
            "qwen2_5_vl" => Generation::TwoFive,
            "qwen3_vl" => Generation::Three,
            _ => return None,
        })
    }

    /// `clip.projector_type`.
    pub(crate) fn projector(self) -> &'static str {
        match self {
            Generation::Two => "qwen2vl_merger",
            Generation::TwoFive => "qwen2.5vl_merger",
            Generation::Three => "qwen3vl_merger",
        }
    }
}

/// A tower of patches over two pictures in a row, of which four neighbours are merged to one token.
#[derive(Debug, Clone, PartialEq)]
pub struct QwenTower {
    pub generation: Generation,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    /// Side of a patch, pixels.
    pub patch_size: usize,
    /// Of 2.5: blocks n-1, 2n-1, … see the whole picture, the others windows.
    pub full_attention_every: usize,
    /// Of 3: blocks whose output is merged on its own, in order.
    pub deepstack: Vec<usize>,
    /// Of 3: positions on one side of the learned table.
    pub grid: usize,
}

/// Patches on one side of what becomes a token; the runtime's graphs have it built in.
pub(crate) const MERGE: usize = 2;
/// Pictures that the patch embedding sees at once: a still picture is shown twice.
const FRAMES: usize = 2;
/// Side of a window, pixels.
const WINDOW: f64 = 112.0;
/// Of the norms; transformers' classes have no key for it.
pub(crate) const EPSILON: f32 = 1e-6;

impl QwenTower {
    /// Reads `vision_config` for a text model of width `text_hidden`. Keys that are left out have the values of
    /// transformers' classes, of which older versions saved only what differed.
    pub(crate) fn read(s: &Section, generation: Generation, text_hidden: usize) -> Result<Self, ConfigError> {
        config_keys::check(s, config_keys::QWEN_VISION)?;
        if s.get("rope_parameters").is_some() {
            let rope = s.section("rope_parameters")?;
            if rope.float_opt("rope_theta")?.is_some_and(|theta| theta != 10_000.0) {
                return Err(rope.invalid("rope_theta", "10000, which is built into llama.cpp"));
            }
            if !matches!(rope.str_opt("rope_type")?, None | Some("axial" | "default")) {
                return Err(rope.invalid("rope_type", "axial"));
            }
        }
        let size = |key: &str, default: usize| Ok::<_, ConfigError>(s.size_opt(key)?.unwrap_or(default));
        let (act, layers, patch) = match generation {
            Generation::Two => ("quick_gelu", 32, 14),
            Generation::TwoFive => ("silu", 32, 14),
            Generation::Three => ("gelu_pytorch_tanh", 27, 16),
        };
        if s.str_opt("hidden_act")?.is_some_and(|found| found != act) {
            return Err(s.invalid("hidden_act", act));
        }
        let (hidden_size, intermediate_size, out) = match generation {
            Generation::Two => {
                let hidden = size("embed_dim", 1280)?;
                let ratio = s.float_opt("mlp_ratio")?.unwrap_or(4.0);
                (hidden, (hidden as f64 * ratio) as usize, "hidden_size")
            }
            Generation::TwoFive => (size("hidden_size", 3584)?, size("intermediate_size", 3420)?, "out_hidden_size"),
            Generation::Three => (size("hidden_size", 1152)?, size("intermediate_size", 4304)?, "out_hidden_size"),
        };
        if size(out, 3584)? != text_hidden {
            return Err(s.invalid(out, "the text model's hidden_size"));
        }
        let tower = QwenTower {
            generation,
            hidden_size,
            intermediate_size,
            num_layers: size("depth", layers)?,
            num_heads: size("num_heads", 16)?,
            patch_size: size("patch_size", patch)?,
            full_attention_every: 0,
            deepstack: Vec::new(),
            grid: 0,
        };
        // clip.cpp takes such a block's two linears for each other.
        if tower.intermediate_size == tower.hidden_size || tower.intermediate_size == 0 {
            let key = if generation == Generation::Two { "mlp_ratio" } else { "intermediate_size" };
            return Err(s.invalid(key, "an MLP of another width than the tower's"));
        }
        // A quarter of a head turns by the row, a quarter by the column.
        if !tower.hidden_size.is_multiple_of(4 * tower.num_heads) {
            return Err(s.invalid("num_heads", "heads whose width is a multiple of 4"));
        }
        tower.with_blocks(s)
    }

    /// With what sets single blocks apart.
    fn with_blocks(self, s: &Section) -> Result<Self, ConfigError> {
        match self.generation {
            Generation::Two => Ok(self),
            Generation::TwoFive => {
                if s.float_opt("window_size")?.is_some_and(|side| side != WINDOW) {
                    return Err(s.invalid("window_size", "112, which is built into llama.cpp"));
                }
                let full = blocks(s, "fullatt_block_indexes", &[7, 15, 23, 31])?;
                let every = full.first().map_or(0, |first| first + 1);
                let pattern = (0..self.num_layers).filter(|i| every > 0 && (i + 1) % every == 0);
                if every == 0 || !pattern.eq(full) {
                    let want = "every n-th block from the (n-1)-th on, as llama.cpp has it";
                    return Err(s.invalid("fullatt_block_indexes", want));
                }
                Ok(QwenTower { full_attention_every: every, ..self })
            }
            Generation::Three => {
                let deepstack = blocks(s, "deepstack_visual_indexes", &[8, 16, 24])?;
                if !deepstack.is_sorted_by(|a, b| a < b) || deepstack.iter().any(|i| *i >= self.num_layers) {
                    return Err(s.invalid("deepstack_visual_indexes", "numbers of the tower's blocks, ascending"));
                }
                let positions = s.size_opt("num_position_embeddings")?.unwrap_or(2304);
                let grid = positions.isqrt();
                if grid * grid != positions {
                    return Err(s.invalid("num_position_embeddings", "a square"));
                }
                Ok(QwenTower { deepstack, grid, ..self })
            }
        }
    }

    /// Side of the pictures that the tower was made for, pixels; those of Qwen2-VL have none, and the runtime resizes as
    /// the processor says.
    pub(crate) fn image_size(&self) -> usize {
        match self.generation {
            Generation::Two | Generation::TwoFive => 560,
            Generation::Three => self.grid * self.patch_size,
        }
    }

    /// The tensors of tower and merger. `out` is the text model's width.
    pub(crate) fn rows(&self, out: usize) -> Vec<Row> {
        let (hidden, patch) = (self.hidden_size, self.patch_size);
        let third = self.generation == Generation::Three;
        let mut rows = Vec::new();
        for (frame, name) in ["v.patch_embd.weight", "v.patch_embd.weight.1"].into_iter().enumerate() {
            let row = Row::matrix(name, "visual.patch_embed.proj.weight", &[hidden, 3, patch, patch]);
            rows.push(row.frame(frame, FRAMES));
        }
        if third {
            rows.push(Row::vector("v.patch_embd.bias", "visual.patch_embed.proj.bias", &[hidden]));
            let positions = [self.grid * self.grid, hidden];
            rows.push(Row::vector("v.position_embd.weight", "visual.pos_embed.weight", &positions));
        }
        (0..self.num_layers).for_each(|layer| self.block(layer, &mut rows));
        let merged = hidden * MERGE * MERGE;
        let (norm, first, second) = match third {
            true => ("norm", "linear_fc1", "linear_fc2"),
            false => ("ln_q", "mlp.0", "mlp.2"),
        };
        rows.extend(self.norm("v.post_ln", &format!("visual.merger.{norm}"), hidden));
        rows.extend(Row::linear("mm.0", &format!("visual.merger.{first}"), [merged, merged]));
        rows.extend(Row::linear("mm.2", &format!("visual.merger.{second}"), [out, merged]));
        for (i, layer) in self.deepstack.iter().enumerate() {
            let (to, from) = (format!("v.deepstack.{layer}"), format!("visual.deepstack_merger_list.{i}"));
            rows.extend(self.norm(&format!("{to}.norm"), &format!("{from}.norm"), merged));
            rows.extend(Row::linear(&format!("{to}.fc1"), &format!("{from}.linear_fc1"), [merged, merged]));
            rows.extend(Row::linear(&format!("{to}.fc2"), &format!("{from}.linear_fc2"), [out, merged]));
        }
        rows
    }

    fn block(&self, layer: usize, rows: &mut Vec<Row>) {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (to, from) = (format!("v.blk.{layer}"), format!("{BLOCKS}{layer}"));
        rows.extend(self.norm(&format!("{to}.ln1"), &format!("{from}.norm1"), hidden));
        rows.extend(self.norm(&format!("{to}.ln2"), &format!("{from}.norm2"), hidden));
        let qkv = format!("{from}.attn.qkv");
        match self.generation {
            // clip.cpp's graph splits what comes out.
            Generation::Three => rows.extend(Row::linear(&format!("{to}.attn_qkv"), &qkv, [3 * hidden, hidden])),
            Generation::Two | Generation::TwoFive => {
                for (part, name) in ["attn_q", "attn_k", "attn_v"].into_iter().enumerate() {
                    let linear = Row::linear(&format!("{to}.{name}"), &qkv, [hidden, hidden]);
                    rows.extend(linear.map(|row| row.part(part, 3)));
                }
            }
        }
        rows.extend(Row::linear(&format!("{to}.attn_out"), &format!("{from}.attn.proj"), [hidden, hidden]));
        let mlp: &[(&str, &str)] = match self.generation {
            Generation::Two => &[("ffn_up", "fc1"), ("ffn_down", "fc2")],
            Generation::TwoFive => &[("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")],
            Generation::Three => &[("ffn_up", "linear_fc1"), ("ffn_down", "linear_fc2")],
        };
        for (name, stored) in mlp {
            let shape = if *name == "ffn_down" { [hidden, inner] } else { [inner, hidden] };
            rows.extend(Row::linear(&format!("{to}.{name}"), &format!("{from}.mlp.{stored}"), shape));
        }
    }

    fn norm(&self, to: &str, from: &str, width: usize) -> Vec<Row> {
        Row::norm(to, from, width, self.generation != Generation::TwoFive)
    }
}

/// A list of block numbers.
fn blocks(s: &Section, key: &str, default: &[usize]) -> Result<Vec<usize>, ConfigError> {
    let Some(list) = s.get(key) else { return Ok(default.to_vec()) };
    let numbers = list.as_array().and_then(|l| l.iter().map(|v| usize::try_from(v.as_u64()?).ok()).collect());
    numbers.ok_or_else(|| s.invalid(key, "a list of block numbers"))
}

/// The tower's blocks, under canonical names.
pub(crate) const BLOCKS: &str = "visual.blocks.";
