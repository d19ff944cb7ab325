//! The main job: a checkpoint becomes `model.gguf`, `mmproj-model-f16.gguf` and `model.mbq.json`, all or none.
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::events::{Event, Observer};
use crate::ggml::GgmlType;
use crate::gguf::plan::{self, Planned, TypeChoice};
use crate::gguf::{
    self, Card, Changes, Encoder, FileType, General, GgufError, Header, Name, Output, PAIR_KEY, Vocabulary,
};
use crate::model::{ConfigError, TextArch, llava_onevision::LlavaOnevision};
use crate::quant::fold::Folds;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What to write, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// The language model's file; without one, `Base-Size-…-Encoding.gguf` in the current directory.
    pub output: Option<PathBuf>,
    pub types: TypeChoice,
    /// F16, F32 or Q8_0, of tower and projector.
    pub mmproj_type: GgmlType,
    /// `org/name` on the hub, if the checkpoint came from there.
    pub repository: Option<String>,
}

/// What calibration found; empty for round-to-nearest.
#[derive(Default)]
pub struct Calibration {
    pub folds: Folds,
    /// Has the ready-made bytes of tensors whose errors were compensated.
    pub encoder: Option<Box<dyn Encoder>>,
    /// Of the input channels of linears as folded, by canonical name: for those of ggml's quantisers that weigh errors.
    pub importance: BTreeMap<String, Vec<f32>>,
    /// Goes into `model.mbq.json` as `calibration`, with the method's name.
    pub record: Option<serde_json::Value>,
}

impl Calibration {
    /// As the record names it; without a record, round to nearest.
    fn method(&self) -> String {
        let method = self.record.as_ref().and_then(|r| r.get("method")).and_then(|m| m.as_str());
        method.unwrap_or("rtn").into()
    }
}

/// A tensor whose rows the wanted type's blocks do not divide.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Fallback {
    pub tensor: String,
    pub row: usize,
    pub wanted: &'static str,
    pub used: &'static str,
}

/// A file that was written.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Written {
    pub path: PathBuf,
    #[serde(rename = "type")]
    pub file_type: String,
    pub bytes: u64,
    pub tensors: usize,
    pub parameters: usize,
    /// Of all tensors.
    pub bits_per_weight: f64,
    /// Bytes per type, largest first.
    pub types: Vec<(&'static str, u64)>,
    pub fallbacks: Vec<Fallback>,
}

/// What a conversion did.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Summary {
    pub model: Written,
    pub mmproj: Written,
    pub record: PathBuf,
    /// The id in both files ([`PAIR_KEY`]).
    pub pair: String,
    /// Of the decoder's linears, which `--type` is about.
    pub decoder_bits_per_weight: f64,
    pub seconds: f64,
}

/// Converts `checkpoint`.
///
/// # Errors
/// Anything wrong with the checkpoint, found before an output is begun where it can be; a full disk. No output is
/// left then.
pub fn convert(
    checkpoint: &Checkpoint,
    options: &Options,
    calibration: &Calibration,
    observer: &dyn Observer,
) -> Result<Summary, Error> {
    let start = Instant::now();
    let (model, text_plan, vision_plan) = plans(checkpoint, options)?;
    check_tensors(checkpoint, text_plan.iter().chain(&vision_plan), &calibration.folds)?;
    let vocabulary = Vocabulary::read(checkpoint, model.text.vocab_size)?;
    let notes = checkpoint.notes().iter().chain(&model.notes).chain(&vocabulary.notes);
    notes.for_each(|note| observer.event(Event::Note(note.clone())));
    if options.types.output.is_some() && model.text.tie_word_embeddings {
        let note = "the output head is the embedding: --output-type changes nothing, --embedding-type does";
        observer.event(Event::Note(note.into()));
    }

    // A card is no reason to refuse a model, but its licence is not dropped without a word.
    let card = Card::read(checkpoint.dir()).unwrap_or_else(|problem| {
        observer.event(Event::Note(format!("{problem}; licence, languages and tags are left out")));
        Card::default()
    });
    let general =
        General { name: model_name(checkpoint, options, &text_plan), card, repository: options.repository.clone() };
    let [path, mmproj_path, record_path] = paths(&general.name, options);

    let mut header = Header::default();
    gguf::text_metadata(&mut header.metadata, &general, &model.text, options.types.file);
    if options.types.file == FileType::Plain(GgmlType::MBQ3) {
        gguf::mbq_metadata(&mut header.metadata, &calibration.method());
    }
    vocabulary.write(&mut header.metadata);
    let pair = gguf::pair_id(checkpoint, &model, &vision_plan)?;
    header.metadata.set(PAIR_KEY, &pair);
    gguf::list(&mut header, &text_plan)?;
    let mut vision_header = Header::default();
    gguf::vision_metadata(&mut vision_header.metadata, &general, &model, options.mmproj_type);
    vision_header.metadata.set(PAIR_KEY, &pair);
    gguf::list(&mut vision_header, &vision_plan)?;

    let mut outputs = [Output::create(&path)?, Output::create(&mmproj_path)?, Output::create(&record_path)?];
    let [model_output, mmproj_output, record_output] = &mut outputs;
    let (folds, importance) = (&calibration.folds, &calibration.importance);
    let changes = Changes { folds, encoder: calibration.encoder.as_deref(), importance };
    let model_bytes = gguf::write(checkpoint, &header, &text_plan, changes, model_output, observer)?;
    let mmproj_bytes = gguf::write(checkpoint, &vision_header, &vision_plan, changes, mmproj_output, observer)?;
    let linears = text_plan.iter().filter(|t| t.is_decoder_linear);
    let summary = Summary {
        model: written(path, options.types.file.to_string(), model_bytes, &text_plan),
        mmproj: written(mmproj_path, options.mmproj_type.to_string(), mmproj_bytes, &vision_plan),
        record: record_path,
        pair,
        decoder_bits_per_weight: bits_per_weight(linears),
        seconds: start.elapsed().as_secs_f64(),
    };
    record_output.write(&record(checkpoint, options, calibration, &summary))?;
    Output::publish(outputs.into())?;
    Ok(summary)
}

/// Finds before long work what would stop [`convert`] after it. Returns the language model's file.
///
/// # Errors
/// A fault of the checkpoint, or an output that cannot be written. Nothing is left of the attempt.
pub fn check(checkpoint: &Checkpoint, options: &Options) -> Result<PathBuf, Error> {
    let (model, text_plan, vision_plan) = plans(checkpoint, options)?;
    check_tensors(checkpoint, text_plan.iter().chain(&vision_plan), &Folds::new())?;
    Vocabulary::read(checkpoint, model.text.vocab_size)?;
    let paths = paths(&model_name(checkpoint, options, &text_plan), options);
    for path in &paths {
        Output::create(path)?;
    }
    let [model, ..] = paths;
    Ok(model)
}

/// The model's configuration, and the tensors of the two files.
fn plans(checkpoint: &Checkpoint, o: &Options) -> Result<(LlavaOnevision, Vec<Planned>, Vec<Planned>), Error> {
    let model = LlavaOnevision::read(checkpoint)?;
    check_runtime_limits(checkpoint, &model)?;
    let text = plan::text(&model.text, &o.types);
    let projector_bias = checkpoint.contains("multi_modal_projector.linear_1.bias");
    let vision = plan::vision(&model.vision, model.text.hidden_size, o.mmproj_type, projector_bias);
    Ok((model, text, vision))
}

fn model_name(checkpoint: &Checkpoint, options: &Options, text_plan: &[Planned]) -> Name {
    let parameters = text_plan.iter().map(Planned::elements).sum();
    Name::parse(&display_name(checkpoint.dir(), options.repository.as_deref()), parameters)
}

/// Of the language model, the mmproj and the record.
fn paths(name: &Name, options: &Options) -> [PathBuf; 3] {
    let encoding = FileType::name(options.types.file);
    let path = options.output.clone().unwrap_or_else(|| name.file(encoding).into());
    let mmproj = beside(&path, |stem| format!("mmproj-{stem}-{}.gguf", options.mmproj_type));
    let record = beside(&path, |stem| format!("{stem}.mbq.json"));
    [path, mmproj, record]
}

/// What transformers can do and llama.cpp's qwen2 cannot.
fn check_runtime_limits(checkpoint: &Checkpoint, m: &LlavaOnevision) -> Result<(), ConfigError> {
    let file = checkpoint.dir().join("config.json");
    if m.text.arch != TextArch::Qwen2 {
        return Err(ConfigError::Unsupported {
            file,
            found: "text_config: llama".into(),
            supported: "qwen2 text models in LLaVA-OneVision",
        });
    }
    if m.text.num_heads * m.text.head_dim != m.text.hidden_size {
        return Err(ConfigError::Invalid {
            file,
            key: "text_config.head_dim".into(),
            found: m.text.head_dim.to_string(),
            want: "hidden_size / num_attention_heads, as llama.cpp's qwen2 has it",
        });
    }
    Ok(())
}

/// Checks every tensor's presence, type and shape, and every fold's length, before anything is written.
fn check_tensors<'a>(
    checkpoint: &Checkpoint,
    plan: impl Iterator<Item = &'a Planned>,
    folds: &Folds,
) -> Result<(), Error> {
    let mut unused: BTreeSet<&str> = folds.keys().map(String::as_str).collect();
    for t in plan {
        checkpoint.check(&t.source, &t.shape)?;
        if let Some(fold) = folds.get(&t.source) {
            let rows = t.shape.first().copied().unwrap_or(1);
            fold.check(&t.source, rows, t.elements() / rows.max(1))?;
            unused.remove(t.source.as_str());
        }
    }
    match unused.first() {
        Some(tensor) => Err(GgufError::UnknownFold { tensor: tensor.to_string() }.into()),
        None => Ok(()),
    }
}

/// The model's name: the hub's, or the directory's.
fn display_name(dir: &Path, repository: Option<&str>) -> String {
    if let Some(repository) = repository {
        return repository.rsplit('/').next().unwrap_or(repository).into();
    }
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.into());
    dir.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())
}

/// A file beside `path`, named from its stem.
fn beside(path: &Path, name: impl Fn(&str) -> String) -> PathBuf {
    let stem = path.file_stem().map_or_else(|| "model".into(), |s| s.to_string_lossy());
    path.with_file_name(name(&stem))
}

fn bytes(t: &Planned) -> u64 {
    // invariant: the plan gives a tensor only a type that its rows fit.
    t.ty.row_size(t.row()).map_or(0, |row| (row * t.rows()) as u64)
}

fn bits_per_weight<'a>(tensors: impl Iterator<Item = &'a Planned>) -> f64 {
    let (bits, n) = tensors.fold((0, 0), |(bits, n), t| (bits + 8 * bytes(t), n + t.elements()));
    if n == 0 { 0.0 } else { bits as f64 / n as f64 }
}

fn written(path: PathBuf, file_type: String, size: u64, plan: &[Planned]) -> Written {
    let mut types: Vec<(&'static str, u64)> = Vec::new();
    for t in plan {
        match types.iter_mut().find(|(name, _)| *name == t.ty.name()) {
            Some((_, n)) => *n += bytes(t),
            None => types.push((t.ty.name(), bytes(t))),
        }
    }
    types.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let fallbacks = plan.iter().filter_map(|t| {
        let wanted = t.fallback_from?.name();
        Some(Fallback { tensor: t.name.clone(), row: t.row(), wanted, used: t.ty.name() })
    });
    Written {
        path,
        file_type,
        bytes: size,
        tensors: plan.len(),
        parameters: plan.iter().map(Planned::elements).sum(),
        bits_per_weight: bits_per_weight(plan.iter()),
        types,
        fallbacks: fallbacks.collect(),
    }
}

/// `model.mbq.json`.
fn record(checkpoint: &Checkpoint, options: &Options, calibration: &Calibration, summary: &Summary) -> Vec<u8> {
    let record = serde_json::json!({
        "format": 1,
        "converter": concat!("mbq-convert ", env!("CARGO_PKG_VERSION")),
        "source": options.repository.clone().unwrap_or_else(|| checkpoint.dir().display().to_string()),
        "method": calibration.method(),
        "summary": summary,
        "calibration": calibration.record,
    });
    format!("{record:#}\n").into_bytes()
}
