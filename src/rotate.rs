//! `mbq-convert rotate`: a checkpoint with its residual stream rotated ([`crate::quant::rotate`]), in the same format.
use crate::Error;
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype};
use crate::events::{Event, Observer};
use crate::gguf::{GgufError, Output};
use crate::model::llava_onevision::LlavaOnevision;
use crate::model::weights::tensor_name;
use crate::quant::rotate::Rotation;
use crate::text::Name;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const HEAD: &str = "language_model.lm_head.weight";
const EMBEDDING: &str = "language_model.model.embed_tokens.weight";
const FINAL_NORM: &str = "language_model.model.norm.weight";

/// What happens to a tensor.
enum Change {
    Keep,
    /// A norm's gain, moved on: ones.
    Ones,
    /// Multiplied by Q on its input side, and by this norm's gain before.
    Reads(Option<String>),
    /// Multiplied by Q on its output side.
    Writes,
}

/// The tensors of the rotated checkpoint: from which tensor, and how. A tied head becomes a tensor of its own.
fn changes(checkpoint: &Checkpoint, layers: usize) -> BTreeMap<String, (String, Change)> {
    let mut out: BTreeMap<String, (String, Change)> =
        checkpoint.names().map(|name| (name.to_string(), (name.to_string(), Change::Keep))).collect();
    let head = if checkpoint.contains(HEAD) { HEAD } else { EMBEDDING };
    let mut set = |name: &str, from: &str, change| {
        out.insert(name.into(), (from.into(), change));
    };
    set(HEAD, head, Change::Reads(Some(FINAL_NORM.into())));
    set(FINAL_NORM, FINAL_NORM, Change::Ones);
    // Rows of the stream: x Q.
    for name in [EMBEDDING, "multi_modal_projector.linear_2.bias", "image_newline"] {
        if checkpoint.contains(name) {
            set(name, name, Change::Reads(None));
        }
    }
    let writer = "multi_modal_projector.linear_2.weight";
    set(writer, writer, Change::Writes);
    for layer in 0..layers {
        let norms = ["input_layernorm.weight", "post_attention_layernorm.weight"].map(|n| tensor_name(layer, n));
        norms.iter().for_each(|norm| set(norm, norm, Change::Ones));
        for linear in Name::ALL {
            let name = tensor_name(layer, &format!("{}.weight", linear.path()));
            let change = match linear {
                Name::Q | Name::K | Name::V => Change::Reads(Some(norms[0].clone())),
                Name::Gate | Name::Up => Change::Reads(Some(norms[1].clone())),
                Name::O | Name::Down => Change::Writes,
            };
            set(&name, &name, change);
        }
    }
    out
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Writes the rotated checkpoint into the new directory `out`, all weights in float32: transformers takes one type for a
/// whole model.
///
/// # Errors
/// A tensor is missing or not finite; `out` exists; the disk is full. Nothing is left then.
pub fn rotate(checkpoint: &Checkpoint, out: &Path, seed: u64, observer: &dyn Observer) -> Result<(), Error> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::from(GgufError::Write { path, source })
    };
    if out.exists() {
        return Err(GgufError::Output { path: out.into(), problem: "exists already; name another directory" }.into());
    }
    let text = LlavaOnevision::read(checkpoint)?.text;
    let rotation = Rotation::new(text.hidden_size, seed);
    let changes = changes(checkpoint, text.num_layers);
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = tempfile::Builder::new().prefix(".rotated-").tempdir_in(parent).map_err(io(parent))?;
    for entry in std::fs::read_dir(checkpoint.dir()).map_err(io(checkpoint.dir()))? {
        let path = entry.map_err(io(checkpoint.dir()))?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let weights =
            [".safetensors", ".safetensors.index.json", ".bin", ".gguf"].iter().any(|end| name.ends_with(end));
        if path.is_file() && !weights && name != "config.json" {
            std::fs::copy(&path, beside.path().join(&name)).map_err(io(&path))?;
        }
    }
    let mut config = checkpoint.config().clone();
    config["tie_word_embeddings"] = json!(false);
    if let Some(text) = config.get_mut("text_config").and_then(Value::as_object_mut) {
        text.insert("tie_word_embeddings".into(), json!(false));
    }
    let path = beside.path().join("config.json");
    std::fs::write(&path, format!("{config:#}\n")).map_err(io(&path))?;

    let mut weights = Output::create(&beside.path().join("model.safetensors"))?;
    weights.write(&header(checkpoint, &changes)?)?;
    observer.event(Event::PhaseStart { name: "rotate".into(), total: changes.len() as u64, unit: "tensors" });
    for (name, (from, change)) in &changes {
        let view = checkpoint.tensor(from)?;
        let shape = view.shape;
        let cols = shape.last().copied().unwrap_or(1);
        let values = match change {
            Change::Keep if is_float(view.dtype) => Some(checkpoint.f32(from, shape)?),
            Change::Keep => {
                weights.write(view.bytes)?;
                None
            }
            Change::Ones => Some(vec![1.0; shape.iter().product()]),
            Change::Reads(gain) => {
                let gain = gain.as_ref().map(|g| checkpoint.f32(g, &[text.hidden_size])).transpose()?;
                width(checkpoint, from, cols, text.hidden_size)?;
                let mut values = checkpoint.f32(from, shape)?;
                rotation.readers(&mut values, gain.as_deref());
                Some(values)
            }
            Change::Writes => {
                width(checkpoint, from, shape[0], text.hidden_size)?;
                Some(rotation.writers(&checkpoint.f32(from, shape)?, cols))
            }
        };
        if let Some(values) = values {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            weights.write(&bytes)?;
        }
        checkpoint.release(from);
        observer.event(Event::Advance { n: 1, detail: name.clone() });
    }
    observer.event(Event::PhaseEnd);
    Output::publish(vec![weights])?;
    std::fs::rename(beside.path(), out).map_err(io(out))?;
    // The directory has its name: nothing is left to remove.
    let _ = beside.keep();
    Ok(())
}

/// That a tensor's side towards the stream is as wide as the stream.
fn width(checkpoint: &Checkpoint, name: &str, found: usize, hidden: usize) -> Result<(), Error> {
    if found == hidden {
        return Ok(());
    }
    let expected = vec![hidden];
    Err(CheckpointError::Shape { path: checkpoint.dir().into(), tensor: name.into(), found: vec![found], expected }
        .into())
}

/// The safetensors header of what will follow.
fn header(checkpoint: &Checkpoint, changes: &BTreeMap<String, (String, Change)>) -> Result<Vec<u8>, Error> {
    let mut tensors = serde_json::Map::new();
    tensors.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for (name, (from, change)) in changes {
        let view = checkpoint.tensor(from)?;
        let kept = matches!(change, Change::Keep) && !is_float(view.dtype);
        let bytes = if kept { view.bytes.len() } else { 4 * view.shape.iter().product::<usize>() };
        let dtype = if kept { view.dtype } else { Dtype::F32 };
        tensors.insert(name.clone(), json!({"dtype": dtype, "shape": view.shape, "data_offsets": [at, at + bytes]}));
        at += bytes;
    }
    let mut text = Value::Object(tensors).to_string().into_bytes();
    // safetensors wants the data aligned to 8 bytes.
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}
