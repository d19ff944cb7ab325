//! A whole calibration as a user asks for it: from the pair of a model and a list of conversations to what the writer
//! needs. Everything that the command line can do, a program can do with this.
use super::answers::{Answerer, Answers, answerer};
use super::batch::Batch;
use super::bits::{self, BlockPart};
use super::clock::Clock;
use super::compensate::{Compensation, CompensationSettings, VisionWeight};
use super::embed::Embedder;
use super::estimate::{allowed, estimate};
use super::grid::{Activations, PerChannel, WeightGrid, stored};
use super::importance::{Importance, Weighting};
use super::mbq::FoundScales;
use super::samples::{self, Draw, Samples};
use super::settings::{ActivationBits, CHUNK_TOKENS, Method, Switches};
use super::store::{JobId, WorkFiles};
use super::stream::{Room, Stream};
use super::{CalibrateError, CalibrateOptions, TextModel, hold, run_packed};
use crate::Error;
use crate::convert::Calibration;
use crate::digest::hex;
use crate::events::{Event, Observer};
use crate::front::Pair;
use crate::ggml::GgmlType;
use crate::gguf::plan::{self, Planned};
use crate::gguf::{Encoder, FileType, TypeChoice};
use crate::quant::levels::Format;
use crate::runtime::engine::{Compute, Runtime};
use candle_core::Device;
use serde_json::json;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Pairs that parts of the decoder are measured on, or a few more: what is packed with them.
const MEASURED: usize = 8;

/// Where the importance matrix comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Imatrix {
    Gathered(Weighting),
    /// Written by llama-imatrix or an earlier run.
    File(PathBuf),
}

/// What is asked for.
pub struct Job {
    pub method: Method,
    /// Conversations, a file or folder; none: the built-in set.
    pub list: Option<PathBuf>,
    /// Where their pictures are; none: beside the list.
    pub image_root: Option<PathBuf>,
    /// How many are used, at most [default: 128].
    pub samples: Option<usize>,
    /// What a vision token weighs beside a text token in the compensation; none: 1.
    pub vision_weight: Option<VisionWeight>,
    /// Bits per weight that the decoder's linears may have on average, from MBQ3's own on.
    pub bpw: Option<f64>,
    pub imatrix: Option<Imatrix>,
    pub switches: Switches,
    pub device: Device,
    /// Bytes of host memory [default: half of what is free], and of the device's [default: nine tenths of what is free].
    pub memory: Option<usize>,
    pub device_memory: Option<usize>,
    /// Where progress is kept [default: beside the output].
    pub work_dir: Option<PathBuf>,
    /// Goes on behind the last finished block of an interrupted run.
    pub resume: bool,
    /// Folder of the llama.cpp that makes the embeddings [default: the one that this program carries].
    pub runtime: Option<PathBuf>,
}

/// What a job hands on.
#[derive(Default)]
pub struct Calibrated {
    pub calibration: Calibration,
    /// What was gathered, to be written for llama-quantize.
    pub importance: Option<Importance>,
    /// What `resume` would read; of no more use once the model is written.
    pub files: Option<WorkFiles>,
}

impl Job {
    /// Calibrates `pair` for a file of `types`. `mmproj` is the projector's file as inference will have it, `output` the
    /// language model's file to be, `origin` what a user calls the model.
    ///
    /// # Errors
    /// A setting without effect; data, runtime, memory or weights that are not what they should be.
    pub fn run(
        &self,
        pair: &Pair,
        types: &TypeChoice,
        mmproj: Option<&Path>,
        (origin, output): (&str, &Path),
        observer: &dyn Observer,
    ) -> Result<Calibrated, Error> {
        let linears = linears(pair, types);
        let gathered = match &self.imatrix {
            Some(Imatrix::Gathered(weighting)) => Some(*weighting),
            _ => None,
        };
        let float = matches!(types.file, FileType::Plain(GgmlType::F32 | GgmlType::F16 | GgmlType::BF16));
        let compensable = linears.iter().any(|t| Format::of(t.ty).is_some());
        let method = if float { Method::Rtn } else { self.method.of_types(compensable) };
        let whole = method.compensates() && linears.iter().all(|t| Format::of(t.ty).is_some());
        self.check(method, types, whole)?;
        let given = self.imatrix_file().map(|path| Importance::read(path, &linears)).transpose()?;
        if method == Method::Rtn && gathered.is_none() {
            let importance = given.map(|i| i.means()).unwrap_or_default();
            return Ok(Calibrated {
                calibration: Calibration { importance, ..Calibration::default() },
                ..Calibrated::default()
            });
        }
        let clock = Clock::default();
        let observer: &dyn Observer = &clock.watching(observer);
        let work = Work::begin(self, method, pair, mmproj, (origin, output), observer)?;
        work.run(method, types, (gathered, given), &clock, observer)
    }

    fn imatrix_file(&self) -> Option<&Path> {
        match &self.imatrix {
            Some(Imatrix::File(path)) => Some(path),
            _ => None,
        }
    }

    /// Refuses settings that would change nothing. `whole`: every linear is compensated, none is left to ggml's quantisers.
    fn check(&self, method: Method, types: &TypeChoice, whole: bool) -> Result<(), Error> {
        let gathers = matches!(self.imatrix, Some(Imatrix::Gathered(_)));
        let nothing = method == Method::Rtn && !gathers;
        let built_in = self.list.is_none();
        let rounded = format!("with --method {}", method.name());
        let no_list = if nothing { &rounded } else { "without --calib" };
        let used: [(_, _, _, &str); 11] = [
            ("--calib", !built_in, nothing, &rounded),
            ("--samples", self.samples.is_some(), nothing, &rounded),
            ("--device", !self.device.is_cpu(), nothing, &rounded),
            ("--memory", self.memory.is_some(), nothing, &rounded),
            ("--work-dir", self.work_dir.is_some(), nothing, &rounded),
            ("--resume", self.resume, nothing, &rounded),
            ("--runtime", self.runtime.is_some(), nothing, &rounded),
            ("--set", self.switches != Switches::default(), nothing, &rounded),
            ("--imatrix FILE", self.imatrix_file().is_some(), whole, &rounded),
            ("--image-root", self.image_root.is_some(), built_in, no_list),
            ("--set seed", self.switches.seed.is_some(), built_in, no_list),
        ];
        if let Some((flag, .., with)) = used.into_iter().find(|(_, given, useless, _)| *given && *useless) {
            return Err(CalibrateError::NoEffect { flag, with: with.into() }.into());
        }
        if self.bpw.is_some() && (types.file != FileType::Plain(GgmlType::MBQ3) || !method.compensates()) {
            let problem = "mixes mbq3 and q4_0 where errors are compensated: leave out --type and --method";
            return Err(CalibrateError::Setting { what: "--bpw".into(), problem: problem.into() }.into());
        }
        Ok(self.switches.check(method, self.vision_weight)?)
    }

    fn compensation(&self, method: Method) -> CompensationSettings {
        match method {
            Method::Gptq => CompensationSettings::GPTQ,
            _ => CompensationSettings {
                vision: self.vision_weight.unwrap_or(VisionWeight::Fixed(1.0)),
                search_levels: true,
                target: self.switches.target.unwrap_or(0.5),
                residual: self.switches.residual.unwrap_or(false),
                two_sided: self.switches.two_sided.unwrap_or(true),
                ..CompensationSettings::GPTQ
            },
        }
    }

    /// Spends `bpw`: the linears that get another type than MBQ3, and what was measured.
    fn widen(
        &self,
        model: &TextModel,
        (batch, inputs): (&Batch, &Stream),
        observer: &dyn Observer,
    ) -> Result<(BTreeMap<String, GgmlType>, Vec<BlockPart>), Error> {
        let Some(mean) = self.bpw else { return Ok(Default::default()) };
        let types = [GgmlType::MBQ3, GgmlType::Q4_0];
        let width = types.map(GgmlType::bits_per_weight);
        // Before the work, for the message.
        bits::widened(&[], width, mean)?;
        let mut pairs = 0;
        let few = batch.chunks.iter().take_while(|chunk| {
            let before = pairs;
            pairs += chunk.spans.len();
            before < MEASURED
        });
        let chunks = &batch.chunks[..few.count()];
        let parts = bits::measure(model, chunks, inputs, types, observer)?;
        let widened = bits::widened(&parts, width, mean)?;
        observer.event(Event::Note(format!("--bpw {mean}: {} of {} parts are q4_0", widened.len(), parts.len())));
        Ok((bits::types(&parts, &widened, types[1]), parts))
    }
}

/// The decoder's linears as a file of `types` has them.
pub fn linears(pair: &Pair, types: &TypeChoice) -> Vec<Planned> {
    plan::text(&pair.text.tensors, types).into_iter().filter(|t| t.is_decoder_linear).collect()
}

/// A calibration under way: the samples are embedded.
struct Work<'j, 'p, 'a> {
    job: &'j Job,
    pair: &'p Pair<'a>,
    start: Instant,
    embedding_seconds: f64,
    files: WorkFiles,
    memory: usize,
    spill: PathBuf,
    origin: String,
    samples: Samples,
}

impl<'j, 'p, 'a> Work<'j, 'p, 'a> {
    fn begin(
        job: &'j Job,
        method: Method,
        pair: &'p Pair<'a>,
        mmproj: Option<&Path>,
        (origin, output): (&str, &Path),
        observer: &dyn Observer,
    ) -> Result<Self, Error> {
        let start = Instant::now();
        hold(&job.device, job.device_memory.unwrap_or(usize::MAX))?;
        let stem = match &job.work_dir {
            None => output.with_extension("mbq-progress"),
            Some(dir) => {
                let fail = |e: std::io::Error| CalibrateError::File { path: dir.into(), problem: e.to_string() };
                std::fs::create_dir_all(dir).map_err(fail)?;
                dir.join("mbq-progress")
            }
        };
        let files = WorkFiles::take(stem, &format!("{origin} to {}", output.display()), observer)?;
        let memory = allowed(job.memory)?;
        // What does not fit waits beside the progress.
        let progress = files.progress();
        let spill = progress.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf();
        let room = Room::new(&job.device, memory / 2, &spill);
        let runtime = Runtime::open(&crate::runtime::directory(job.runtime.as_deref())?)?;
        let compute = Compute {
            threads: rayon::current_num_threads() as i32,
            gpu_layers: if job.device.is_cpu() { 0 } else { -1 },
            batch: 512,
            exact: false,
        };
        let embedder = Embedder::load(&pair.text, mmproj, &runtime, compute, &spill)?;
        let context = embedder.context_length();
        let draw = Draw {
            list: job.list.as_deref(),
            image_root: job.image_root.as_deref(),
            samples: job.samples.unwrap_or(128),
            seed: job.switches.seed.unwrap_or(0),
            max_tokens: job.switches.max_tokens.map_or(context, |n| n.get().min(context)),
        };
        let own = mmproj.is_some() && job.switches.own_answers.unwrap_or(method == Method::Mbq);
        let answerer = own.then(|| {
            let earlier = job.resume.then(|| files.answers());
            let place = (&*spill, earlier.as_deref());
            answerer(Answerer::load(&embedder, &pair.text, (&runtime, compute), place, observer), observer)
        });
        let answerer = answerer.transpose()?;
        let samples = samples::embed(&embedder, answerer.flatten(), draw, CHUNK_TOKENS, &room, observer)?;
        drop(embedder);
        let embedding_seconds = start.elapsed().as_secs_f64();
        Ok(Work { job, pair, start, embedding_seconds, files, memory, spill, origin: origin.into(), samples })
    }

    fn run(
        self,
        method: Method,
        types: &TypeChoice,
        (gathered, given): (Option<Weighting>, Option<Importance>),
        clock: &Clock,
        observer: &dyn Observer,
    ) -> Result<Calibrated, Error> {
        let (job, switches) = (self.job, &self.job.switches);
        let Samples { batch, inputs, data, source, answers, skipped } = self.samples;
        let model = TextModel::new(&self.pair.text, batch.longest, job.device.clone())?;
        let (linear_types, parts) = job.widen(&model, (&batch, &inputs), observer)?;
        let types = TypeChoice { linears: linear_types, ..types.clone() };
        let (weights, activations) = grids(switches.activations.unwrap_or_default(), types.file, &model);
        // On the testbed scales made compensated models no better (docs/compensation.md) and took most of the time.
        let scales = !method.compensates() || switches.scales == Some(true);
        let settings = method.compensates().then(|| job.compensation(method));
        let all_settings = json!({
            "method": method.name(), "weights": weights.name(), "activations": format!("{activations:?}"),
            "scales": scales, "compensation": settings, "switches": switches,
            "samples": batch.samples, "source": source, "imatrix": gathered,
            "wider": types.linears.iter().map(|(name, ty)| (name, ty.to_string())).collect::<BTreeMap<_, _>>(),
        });
        let id = JobId {
            model: self.origin.clone(),
            weights: self.pair.text.values.fingerprint(),
            settings: hex(&Sha256::digest(format!("{all_settings}{data}"))),
        };
        (!job.resume).then(|| self.files.clear()).transpose()?;
        answers.iter().try_for_each(|a| a.keep(&self.files.answers()))?;
        let compensation = settings.map(|settings| {
            let types = linears(self.pair, &types).into_iter().map(|t| (t.name, t.ty)).collect();
            Compensation { settings, types, store: self.files.store(&id) }
        });
        estimate(&model, batch.tokens, passes(method, scales), observer)?;
        let options = CalibrateOptions {
            weights: weights.as_ref(),
            activations,
            importance: gathered,
            spill: Some(self.spill),
            memory: self.memory,
            device_memory: job.device_memory,
            compensation: compensation.as_ref(),
            progress: Some((self.files.progress(), id)),
            ..switches.options(method, scales, weights.as_ref())
        };
        let found = run_packed(&model, &batch, inputs, &options, observer)?;
        let record = json!({
            "method": method.name(), "settings": all_settings, "data_sha256": data, "skipped": skipped,
            "own_answers": answers.as_ref().map(Answers::turns),
            "image_root": job.image_root.as_deref().map(Path::to_string_lossy),
            "imatrix_file": job.imatrix_file().map(Path::to_string_lossy), "bpw": job.bpw, "tokens": batch.tokens, "loss": found.loss,
            "sensitivities": found.sensitivities, "ratios": found.ratios,
            "blocks": found.blocks.iter().map(|b| b.iter().map(FoundScales::record).collect()).collect::<Vec<Vec<_>>>(),
            "parts": parts, "compensated": found.compensated,
            "seconds": clock.seconds(self.embedding_seconds, self.start),
        });
        let importance =
            given.as_ref().or(found.importance.as_ref()).map(|i| i.folded(&found.folds)).unwrap_or_default();
        let encoder = compensation.map(|c| Box::new(c) as Box<dyn Encoder>);
        let calibration =
            Calibration { folds: found.folds, encoder, importance, linears: types.linears, record: Some(record) };
        Ok(Calibrated { calibration, importance: found.importance, files: Some(self.files) })
    }
}

/// What a search rounds weights and activations to.
fn grids(activations: ActivationBits, file: FileType, model: &TextModel) -> (Box<dyn WeightGrid>, Activations) {
    match activations {
        ActivationBits::Float => (stored(file, &model.text), Activations::Float),
        ActivationBits::Int8 => (stored(file, &model.text), Activations::Blocks),
        ActivationBits::Paper => (Box::new(PerChannel { bits: 4 }), Activations::PerToken),
    }
}

/// Work in passes of the linears: as measured on a testbed of 89 M weights on two cores and a 7B shape on an H100.
fn passes(method: Method, scales: bool) -> f64 {
    let search = match method {
        Method::Mbq | Method::MbqScales if scales => 8.0,
        Method::Awq => 5.0,
        _ => 1.0,
    };
    search + if method.compensates() { 5.0 } else { 0.0 }
}
