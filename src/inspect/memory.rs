//! What a model takes of memory when llama.cpp runs it.
//!
//! Weights and cache are what its log shows, to the byte (docs/publishing.md has the comparison). Of the buffers that it
//! computes in, the logits of a batch are counted: they are most of it where the vocabulary is large.
use crate::gguf::{Array, GgufFile, Value};
use crate::text::TextConfig;
use serde::Serialize;

/// Tokens of a physical batch, unless `-ub` says otherwise.
const BATCH: u64 = 512;
/// The cache has a multiple of so many cells.
const CELLS: u64 = 256;
/// A cell's numbers are f16.
const CACHED: u64 = 2;
/// The context that is assumed of a model that could take more.
const SENSIBLE: u64 = 4096;

/// Bytes that a model takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryEstimate {
    /// Tokens.
    pub context: u64,
    /// All tensors of the language model; llama.cpp maps them.
    pub weights: u64,
    /// Keys and values in f16.
    pub kv_cache: u64,
    /// Logits of a batch of 512 tokens in f32: of the buffers, what is known.
    pub logits: u64,
    /// Tensors of the vision file.
    pub mmproj: Option<u64>,
    pub total: u64,
    pub picture: Option<PictureTokens>,
}

/// How much of the context a picture takes, as far as the vision file says. Tokens around it and between its parts are
/// not counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PictureTokens {
    /// Of the whole picture, or of each of its tiles; none where it grows with the picture.
    pub per_tile: Option<u64>,
    /// Tiles that a large picture is cut into, at most; none: not known.
    pub most_tiles: Option<u64>,
    /// Where the number grows with the picture, pixels of a token.
    pub pixels_per_token: Option<u64>,
}

impl MemoryEstimate {
    /// None where the keys that it follows from are missing or are no transformer's.
    pub fn new(model: &GgufFile, mmproj: Option<&GgufFile>, context: Option<u64>) -> Option<Self> {
        let context = context.or_else(|| Some(model.arch_u64("context_length")?.min(SENSIBLE)))?;
        let data = |file: &GgufFile| file.tensors.iter().map(|t| t.size).sum::<Option<u64>>();
        let (weights, kv_cache) = (data(model)?, kv_cache(model, context)?);
        let tokens = model.metadata.get("tokenizer.ggml.tokens").and_then(Value::as_array).map(|a| a.len() as u64);
        let logits = tokens.or(model.arch_u64("vocab_size"))?.checked_mul(4 * BATCH.min(context))?;
        let mmproj_bytes = mmproj.map(data);
        let mmproj_bytes = match mmproj_bytes {
            Some(bytes) => Some(bytes?),
            None => None,
        };
        let parts = [weights, kv_cache, logits, mmproj_bytes.unwrap_or(0)];
        let total = parts.into_iter().try_fold(0u64, u64::checked_add)?;
        let picture = mmproj.and_then(PictureTokens::of);
        Some(MemoryEstimate { context, weights, kv_cache, logits, mmproj: mmproj_bytes, total, picture })
    }
}

/// Bytes of the cache of `context` tokens: per block its heads' keys and values, of a block with a window the cells of
/// window and batch.
fn kv_cache(model: &GgufFile, context: u64) -> Option<u64> {
    let layers = model.arch_u64("block_count").filter(|n| *n <= 512)?;
    let heads = model.arch_u64("attention.head_count").filter(|n| *n > 0)?;
    let default = model.arch_u64("embedding_length")? / heads;
    let width = |key: &str| model.arch_u64(key).unwrap_or(default);
    let cell = CACHED * width("attention.key_length").checked_add(width("attention.value_length"))?;
    let kv_heads = model.metadata.get(&format!("{}.attention.head_count_kv", model.architecture()));
    let of_layer = |layer: u64| match kv_heads {
        None => Some(heads),
        Some(Value::Array(all)) => all.iter().nth(layer as usize)?.as_u64(),
        Some(all) => all.as_u64(),
    };
    let cells = context.checked_next_multiple_of(CELLS)?;
    // llama.cpp gives Gemma 3's blocks with a window a small cache; of the other architectures here it ignores windows.
    let config = TextConfig::read(&model.path, &model.metadata).ok().filter(|c| c.arch.name == "gemma3");
    let cells_of = |layer: u64| {
        let window = config.as_ref().and_then(|c| *c.windows.get(layer as usize)?);
        window.map_or(cells, |w| (w as u64 + BATCH).min(cells).next_multiple_of(CELLS))
    };
    (0..layers)
        .try_fold(0u64, |sum, layer| sum.checked_add(of_layer(layer)?.checked_mul(cell)?.checked_mul(cells_of(layer))?))
}

impl PictureTokens {
    /// By the projector's type and keys.
    pub fn of(mmproj: &GgufFile) -> Option<Self> {
        let key = |name: &str| mmproj.metadata.u64(&format!("clip.vision.{name}"));
        let (image, patch) = (key("image_size")?, key("patch_size").filter(|n| *n > 0)?);
        let patches = (image / patch).checked_pow(2)?;
        let shrunk = |factor: u64| patches / factor.pow(2).max(1);
        let scale = |default: u64| key("projector.scale_factor").unwrap_or(default).min(1 << 16);
        let fixed = |per_tile: u64, most_tiles: Option<u64>| PictureTokens {
            per_tile: Some(per_tile),
            most_tiles,
            pixels_per_token: None,
        };
        match mmproj.metadata.str("clip.projector_type")? {
            "mlp" => {
                let grid = mmproj.metadata.get("clip.vision.image_grid_pinpoints").and_then(Value::as_array);
                Some(fixed(patches, if grid.is_none_or(Array::is_empty) { Some(1) } else { None }))
            }
            "llava_onevision" => Some(fixed(patches, None)),
            "gemma3" => Some(fixed(shrunk(scale(4)), Some(1))),
            "idefics3" => {
                let side = key("preproc_image_size").unwrap_or(image).div_ceil(image.max(1)).min(1 << 16);
                let tiles = if side > 1 { side.pow(2) + 1 } else { 1 };
                Some(fixed(shrunk(scale(1)), Some(tiles)))
            }
            "internvl" => {
                // Of several tiles a thumbnail is one more.
                let tiles = key("preproc_max_tiles").map(|n| if n > 1 { n.saturating_add(1) } else { n });
                Some(fixed(shrunk(scale(1)), tiles))
            }
            "qwen2vl_merger" | "qwen2.5vl_merger" | "qwen3vl_merger" => {
                let side = patch.checked_mul(key("spatial_merge_size").unwrap_or(2))?;
                let pixels_per_token = Some(side.checked_pow(2)?);
                Some(PictureTokens { per_tile: None, most_tiles: None, pixels_per_token })
            }
            _ => None,
        }
    }
}
