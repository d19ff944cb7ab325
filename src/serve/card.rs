//! What the server tells of its model, and how much context it can have.
use super::{ServeError, Setup};
use crate::gguf::{GgufFile, ShardName, check_pair};
use crate::inspect::{MemoryEstimate, TypeShare};
use crate::record::ConversionRecord;
use serde_json::{Value, json};

/// A model as clients see it.
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// The file's name without its ending.
    pub id: String,
    /// Tokens of a conversation.
    pub context: usize,
    /// The vocabulary puts a space in front of the first word of a text.
    pub leading_space: bool,
    meta: Value,
    created: u64,
}

/// Contexts that are tried where none is asked for.
const CONTEXTS: [u64; 5] = [32768, 16384, 8192, 4096, 2048];
/// Bytes that the caches of all slots may then take, at most.
const CACHE: u64 = 2 << 30;

impl ModelCard {
    /// # Errors
    /// A file that cannot be read, files that are no pair, or a larger context than the model was trained for.
    pub fn new(setup: &Setup) -> Result<Self, ServeError> {
        let (file, mmproj) = open(setup)?;
        let trained = file.arch_u64("context_length").filter(|n| *n > 0);
        let context = match (setup.context, trained) {
            (Some(wanted), Some(trained)) if wanted as u64 > trained => {
                return Err(ServeError::Context { wanted, trained });
            }
            (Some(wanted), _) => wanted,
            (None, trained) => usual_context(&file, trained, u64::from(setup.slots)) as usize,
        };
        let spm = file.metadata.str("tokenizer.ggml.model") == Some("llama");
        let prefix = file.metadata.get("tokenizer.ggml.add_space_prefix").and_then(|v| v.as_bool());
        let modified = std::fs::metadata(&setup.model).and_then(|m| m.modified()).ok();
        let created =
            modified.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok()).map_or(0, |d| d.as_secs());
        Ok(ModelCard {
            id: ShardName::stem_of(&setup.model),
            context,
            leading_space: spm && prefix.unwrap_or(true),
            meta: meta(setup, &file, mmproj.as_ref(), context),
            created,
        })
    }

    /// OpenAI's model object, with `meta` beside.
    pub fn object(&self) -> Value {
        json!({"id": self.id, "object": "model", "created": self.created, "owned_by": "mbq-convert", "meta": self.meta})
    }
}

/// Opens the files; llama.cpp would say less of one that is cut off or of a shard that is missing.
fn open(setup: &Setup) -> Result<(GgufFile, Option<GgufFile>), ServeError> {
    let model = GgufFile::open(&setup.model)?;
    if model.is_projector() {
        return Err(ServeError::IsProjector(model.path));
    }
    let mmproj = setup.mmproj.as_deref().map(GgufFile::open).transpose()?;
    match mmproj {
        Some(mmproj) if !mmproj.is_projector() => Err(ServeError::NotProjector(mmproj.path)),
        Some(mmproj) => check_pair(&model, &mmproj).map(|()| (model, Some(mmproj))).map_err(ServeError::from),
        None => Ok((model, None)),
    }
}

/// The largest usual context whose caches take no more than 2 GiB, nor a quarter of the memory that is free.
fn usual_context(file: &GgufFile, trained: Option<u64>, slots: u64) -> u64 {
    let trained = trained.unwrap_or(CONTEXTS[3]);
    let budget = free_memory().map_or(CACHE, |free| CACHE.min(free / 4));
    let fits = |context: u64| {
        let cache = MemoryEstimate::new(file, None, Some(context)).map(|memory| memory.kv_cache);
        cache.is_some_and(|bytes| bytes.saturating_mul(slots) <= budget)
    };
    let choices = CONTEXTS.map(|context| context.min(trained));
    choices.into_iter().find(|&context| fits(context)).unwrap_or(choices[CONTEXTS.len() - 1])
}

/// Bytes of memory that programs can have, where the system tells.
fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn meta(setup: &Setup, file: &GgufFile, mmproj: Option<&GgufFile>, context: usize) -> Value {
    // A damaged record is no reason not to answer.
    let record = ConversionRecord::beside(&setup.model).ok().flatten().map(|(_, record)| record);
    let key = |name: &str| file.metadata.str(&format!("general.{name}"));
    let url = || key("base_model.0.repo_url").map(|url| url.trim_start_matches("https://huggingface.co/"));
    json!({
        "architecture": file.architecture(),
        "name": key("name"),
        "vision": mmproj.is_some(),
        "n_params": file.weights(),
        "size": file.file_size(),
        "mmproj_size": mmproj.map(GgufFile::file_size),
        "types": TypeShare::all(file).iter().map(|share| &share.name).collect::<Vec<_>>(),
        "bits_per_weight": file.bits_per_weight(),
        "block_bits_per_weight": file.block_bits_per_weight(),
        "method": record.map(|r| r.method),
        "n_ctx": context,
        "n_ctx_train": file.arch_u64("context_length"),
        "n_vocab": file.metadata.get("tokenizer.ggml.tokens").and_then(|v| v.as_array()).map(|a| a.len()),
        "slots": setup.slots,
        "base_model": key("source.huggingface.repository").or_else(url),
        "license": key("license.name").or(key("license")),
    })
}
