//! The main job: a checkpoint becomes `model.gguf`, `mmproj-model-f16.gguf` and `model.mbq.json`, all or none.
use crate::Error;
use crate::digest::{FileDigest, as_text};
use crate::events::{Event, Observer};
use crate::front::{ModelName, Origin, Pair, Source};
use crate::ggml::GgmlType;
use crate::gguf::plan::{self, Planned, TypeChoice};
use crate::gguf::{
    Changes, Encoder, FileType, GgufError, Header, Output, PAIR_KEY, ShardName, ShardPlan, list, mbq_metadata, shards,
    stored_metadata, write,
};
use crate::quant::fold::Folds;
use crate::record::ConversionRecord;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What to write, and where.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// The language model's file; without one, `Base-Size-…-Encoding.gguf` in the current directory.
    pub output: Option<PathBuf>,
    pub types: TypeChoice,
    /// F16, F32 or Q8_0, of tower and projector; none: as they are stored.
    pub mmproj_type: Option<GgmlType>,
    /// Bytes of the largest file that the language model may be split into; none: it is one file.
    pub split_max_size: Option<u64>,
    /// Where the model came from, for the record.
    pub origin: Origin,
}

/// What calibration found; empty for round-to-nearest.
#[derive(Default)]
pub struct Calibration {
    pub folds: Folds,
    /// Has the ready-made bytes of tensors whose errors were compensated.
    pub encoder: Option<Box<dyn Encoder>>,
    /// Of the input channels of linears as folded, by name: for those of ggml's quantisers that weigh errors.
    pub importance: BTreeMap<String, Vec<f32>>,
    /// Decoder linears of another type than the file's, by name.
    pub linears: BTreeMap<String, GgmlType>,
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
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Fallback {
    pub tensor: String,
    pub row: usize,
    pub wanted: String,
    pub used: String,
}

/// A model or mmproj that was written.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Written {
    /// Of the first file.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Several of a split model; none in older records.
    #[serde(default)]
    pub files: Vec<FileDigest>,
    #[serde(rename = "type")]
    pub file_type: String,
    /// Of all files.
    pub bytes: u64,
    pub tensors: usize,
    pub parameters: usize,
    /// Of all tensors.
    pub bits_per_weight: f64,
    /// Bytes per type, largest first.
    pub types: Vec<(String, u64)>,
    pub fallbacks: Vec<Fallback>,
}

/// What a conversion did.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq)]
pub struct Summary {
    pub model: Written,
    pub mmproj: Option<Written>,
    #[serde(serialize_with = "as_text")]
    pub record: PathBuf,
    /// The id in both files ([`PAIR_KEY`]).
    pub pair: Option<String>,
    /// Of the decoder's linears, which `--type` is about.
    pub decoder_bits_per_weight: f64,
    pub seconds: f64,
}

/// A conversion that has begun: the mmproj is written, so that calibration can use it, and nothing is published.
pub struct Conversion<'p, 'a> {
    pair: &'p Pair<'a>,
    options: &'p ConvertOptions,
    paths: Paths,
    start: Instant,
    mmproj: Option<(Output, Written)>,
    /// Of the model as it was read first.
    fingerprint: String,
}

impl<'p, 'a> Conversion<'p, 'a> {
    /// Finds before long work what would stop [`Conversion::finish`] after it, and writes the mmproj.
    ///
    /// # Errors
    /// An output that cannot be written, a tensor that cannot be listed or stored. Nothing is left of the attempt.
    pub fn begin(pair: &'p Pair<'a>, options: &'p ConvertOptions, observer: &dyn Observer) -> Result<Self, Error> {
        let start = Instant::now();
        if options.types.output.is_some() && pair.text.tensor("output.weight").is_none() {
            let why = "the output head is the embedding, whose type --embedding-type chooses";
            return Err(GgufError::NoEffect { flag: "--output-type", why }.into());
        }
        if options.mmproj_type.is_some() && pair.mmproj.is_none() {
            return Err(GgufError::NoEffect { flag: "--mmproj-type", why: "there is no vision file" }.into());
        }
        let paths = Paths::new(&pair.name, options, pair.mmproj.as_ref());
        let plan = plan::text(&pair.text.tensors, &options.types);
        list(&mut Header::default(), &plan)?;
        let shards = shards(&paths.model, Default::default(), &plan, options.split_max_size)?;
        for path in shards.iter().map(|shard| &shard.path).chain([&paths.record]) {
            Output::create(path)?;
        }
        let fingerprint = pair.text.values.fingerprint();
        pair.notes.iter().for_each(|note| observer.event(Event::Note(note.clone())));
        let mmproj = match (&pair.mmproj, &paths.mmproj) {
            (Some(source), Some(path)) => Some(write_mmproj(source, options, path, observer)?),
            _ => None,
        };
        Ok(Conversion { pair, options, paths, start, mmproj, fingerprint })
    }

    /// Where the language model will be, as one file.
    pub fn model(&self) -> &Path {
        &self.paths.model
    }

    /// Where the mmproj can be read now.
    ///
    /// # Errors
    /// What was written last does not reach the disk.
    pub fn mmproj(&mut self) -> Result<Option<PathBuf>, Error> {
        Ok(self.mmproj.as_mut().map(|(output, _)| output.readable()).transpose()?)
    }

    /// Writes the language model and the record, and gives all files their names.
    ///
    /// # Errors
    /// A tensor that cannot be read or stored; a full disk. No output is left then.
    pub fn finish(self, calibration: &Calibration, observer: &dyn Observer) -> Result<Summary, Error> {
        let (options, source) = (self.options, &self.pair.text);
        let types = TypeChoice { linears: calibration.linears.clone(), ..options.types.clone() };
        let plan = plan::text(&source.tensors, &types);
        check_folds(&plan, &calibration.folds)?;
        let mut metadata = source.metadata.clone();
        stored_metadata(&mut metadata, types.file.id());
        if types.file == FileType::Plain(GgmlType::MBQ3) {
            mbq_metadata(&mut metadata, &calibration.method());
        }
        let (folds, importance) = (&calibration.folds, &calibration.importance);
        let changes = Changes { folds, encoder: calibration.encoder.as_deref(), importance };
        let shards = shards(&self.paths.model, metadata, &plan, options.split_max_size)?;
        let (mut outputs, files) = write_shards(source, &shards, &plan, changes, observer)?;
        if let Some(largest) = options.split_max_size {
            note_larger(&shards, largest, observer);
        }
        let (mmproj_output, mmproj) = self.mmproj.unzip();
        outputs.extend(mmproj_output);
        let path = outputs.first().map_or(self.paths.model, |first| first.path().into());
        let summary = Summary {
            model: written(path, types.file.to_string(), files, &plan),
            mmproj,
            record: self.paths.record.clone(),
            pair: source.metadata.str(PAIR_KEY).map(String::from),
            decoder_bits_per_weight: bits_per_weight(plan.iter().filter(|t| t.is_decoder_linear)),
            seconds: self.start.elapsed().as_secs_f64(),
        };
        let (method, details) = (calibration.method(), calibration.record.clone());
        let record = ConversionRecord::new(&options.origin, method, summary.clone(), details);
        let mut record_output = Output::create(&self.paths.record)?;
        record_output.write(&record.encode())?;
        outputs.push(record_output);
        if source.values.fingerprint() != self.fingerprint {
            return Err(GgufError::Changed { name: options.origin.name.clone() }.into());
        }
        Output::publish(outputs)?;
        Ok(summary)
    }
}

/// Converts `pair`, whose calibration is done.
///
/// # Errors
/// As [`Conversion`]'s.
pub fn convert(
    pair: &Pair,
    options: &ConvertOptions,
    calibration: &Calibration,
    observer: &dyn Observer,
) -> Result<Summary, Error> {
    Conversion::begin(pair, options, observer)?.finish(calibration, observer)
}

/// Writes the files of a language model.
fn write_shards(
    source: &Source,
    shards: &[ShardPlan],
    plan: &[Planned],
    changes: Changes,
    observer: &dyn Observer,
) -> Result<(Vec<Output>, Vec<FileDigest>), Error> {
    let (mut outputs, mut files) = (Vec::new(), Vec::new());
    for shard in shards {
        // invariant: a shard's tensors are a part of the plan.
        let plan = plan.get(shard.tensors.clone()).unwrap_or_default();
        let mut header = Header::new(shard.metadata.clone());
        list(&mut header, plan)?;
        let mut output = Output::create(&shard.path)?;
        files.push(write(source, &header, plan, changes, &mut output, observer)?);
        outputs.push(output);
    }
    Ok((outputs, files))
}

/// Tells of files that could not be made as small as was asked for.
fn note_larger(shards: &[ShardPlan], largest: u64, observer: &dyn Observer) {
    for shard in shards.iter().filter(|shard| shard.bytes > largest) {
        let (name, bytes) = (crate::digest::file_name(&shard.path), shard.bytes);
        let note = format!("{name} has {bytes} bytes, more than --split-max-size: a tensor is not cut");
        observer.event(Event::Note(note));
    }
}

fn write_mmproj(
    source: &Source,
    options: &ConvertOptions,
    path: &Path,
    observer: &dyn Observer,
) -> Result<(Output, Written), Error> {
    let plan = plan::vision(&source.tensors, options.mmproj_type);
    let mut metadata = source.metadata.clone();
    if let Some(ty) = options.mmproj_type {
        stored_metadata(&mut metadata, FileType::Plain(ty).id());
    }
    let mut header = Header::new(metadata);
    list(&mut header, &plan)?;
    let mut output = Output::create(path)?;
    let file = write(source, &header, &plan, Changes::NONE, &mut output, observer)?;
    Ok((output, written(path.into(), mmproj_type(options, source), vec![file], &plan)))
}

/// Of the outputs.
struct Paths {
    model: PathBuf,
    mmproj: Option<PathBuf>,
    record: PathBuf,
}

impl Paths {
    fn new(name: &ModelName, options: &ConvertOptions, mmproj: Option<&Source>) -> Self {
        let encoding = FileType::name(options.types.file);
        let model = options.output.clone().unwrap_or_else(|| name.file(encoding).into());
        let vision = |source| beside(&model, |stem| format!("mmproj-{stem}-{}.gguf", mmproj_type(options, source)));
        Paths { mmproj: mmproj.map(vision), record: beside(&model, |stem| format!("{stem}.mbq.json")), model }
    }
}

/// The type in an mmproj's name: what was asked for, or that of most of its weights.
fn mmproj_type(options: &ConvertOptions, source: &Source) -> String {
    let mut sizes: BTreeMap<GgmlType, usize> = BTreeMap::new();
    source.tensors.iter().for_each(|t| *sizes.entry(t.stored).or_default() += t.elements());
    let most = sizes.into_iter().max_by_key(|(_, n)| *n).map_or(GgmlType::F16, |(ty, _)| ty);
    options.mmproj_type.unwrap_or(most).to_string()
}

/// Checks that every fold has a tensor, and as many scales as it has rows and columns, before anything is written.
fn check_folds(plan: &[Planned], folds: &Folds) -> Result<(), Error> {
    let mut unused: BTreeSet<&str> = folds.keys().map(String::as_str).collect();
    for t in plan {
        if let Some(fold) = folds.get(&t.name) {
            let rows = t.shape.first().copied().unwrap_or(1);
            fold.check(&t.name, rows, t.elements() / rows.max(1))?;
            unused.remove(t.name.as_str());
        }
    }
    match unused.first() {
        Some(tensor) => Err(GgufError::UnknownFold { tensor: tensor.to_string() }.into()),
        None => Ok(()),
    }
}

/// A file beside `path`, named from its stem.
fn beside(path: &Path, name: impl Fn(&str) -> String) -> PathBuf {
    path.with_file_name(name(&ShardName::stem_of(path)))
}

fn bits_per_weight<'a>(tensors: impl Iterator<Item = &'a Planned>) -> f64 {
    let (bits, n) = tensors.fold((0, 0), |(bits, n), t| (bits + 8 * t.bytes(), n + t.elements()));
    if n == 0 { 0.0 } else { bits as f64 / n as f64 }
}

fn written(path: PathBuf, file_type: String, files: Vec<FileDigest>, plan: &[Planned]) -> Written {
    let mut types: Vec<(String, u64)> = Vec::new();
    for t in plan {
        match types.iter_mut().find(|(name, _)| *name == t.ty.name()) {
            Some((_, n)) => *n += t.bytes(),
            None => types.push((t.ty.name().into(), t.bytes())),
        }
    }
    types.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let fallbacks = plan.iter().filter_map(|t| {
        let wanted = t.fallback_from?.name().into();
        Some(Fallback { tensor: t.name.clone(), row: t.row(), wanted, used: t.ty.name().into() })
    });
    Written {
        path,
        bytes: files.iter().map(|file| file.bytes).sum(),
        files,
        file_type,
        tensors: plan.len(),
        parameters: plan.iter().map(Planned::elements).sum(),
        bits_per_weight: bits_per_weight(plan.iter()),
        types,
        fallbacks: fallbacks.collect(),
    }
}
