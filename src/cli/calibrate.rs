//! The calibration's options, and how a run is put together from them.
use super::clock::Clock;
use super::compensate::{self, Leftovers};
use anyhow::{Context, Result, bail};
use candle_core::Device;
use mbq_convert::calibrate::compensate::Compensation;
use mbq_convert::calibrate::grid::{Activations, Asymmetric, Mbq3, PerChannel, Stored, WeightGrid};
use mbq_convert::calibrate::importance::{Importance, Weighting};
use mbq_convert::calibrate::mbq::Loss;
use mbq_convert::calibrate::samples::{self, Draw, Samples};
use mbq_convert::calibrate::store::Job;
use mbq_convert::calibrate::stream::Room;
use mbq_convert::calibrate::{self, Method, Model};
use mbq_convert::checkpoint::Checkpoint;
use mbq_convert::convert::Calibration;
use mbq_convert::digest::hex;
use mbq_convert::events::{Event, Observer};
use mbq_convert::ggml::{self, GgmlType};
use mbq_convert::gguf::{Encoder, FileType, Linear, Role, TypeChoice, fitting};
use mbq_convert::model::TextConfig;
use mbq_convert::model::llava_onevision::{Embedder, LlavaOnevision};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(clap::Args)]
#[command(next_help_heading = "Calibration")]
pub struct Args {
    /// Conversations about pictures: LLaVA/ShareGPT4V, OpenAI or LlamaFactory JSON or JSONL, JSONL of {image, question,
    /// answer}, or a folder of pictures with .txt captions [default: a small built-in set]
    #[arg(long, value_name = "FILE|DIR")]
    calib: Option<PathBuf>,
    /// Where the pairs' pictures are [default: beside the file]
    #[arg(long, value_name = "DIR")]
    image_root: Option<PathBuf>,
    /// How many pairs to use
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Which pairs are drawn when there are more
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Skip samples of more tokens than this [default: the model's context]
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// How errors are added up [default: mae for mbq, mse for awq]
    #[arg(long, value_enum)]
    loss: Option<LossArg>,
    /// Search with activations as the quantised blocks before give them
    #[arg(long)]
    distort: bool,
    /// MBQ's search without the balance of modalities
    #[arg(long)]
    no_balance: bool,
    /// Score every candidate on every token
    #[arg(long)]
    exhaustive: bool,
    /// Scale v -> o in models with grouped queries too, with one scale per value channel
    #[arg(long)]
    share_heads: bool,
    /// With --bits w4a8: search with the paper's per-channel and per-token grids, not with q4_0 and int8 blocks
    #[arg(long)]
    paper_w4a8: bool,
    #[command(flatten)]
    compensation: compensate::Args,
    /// Importance matrix for ggml's quantisers (and beside the model as .imatrix.gguf, for llama-quantize): mean x^2
    /// over vision and answer tokens, weighed by their modality's sensitivity (balanced) or alike (image); none; or a file
    /// that llama-imatrix wrote
    #[arg(long, value_name = "balanced|image|none|FILE", default_value = "none", value_parser = imatrix)]
    imatrix: Imatrix,
    /// cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    device: DeviceArg,
    /// Memory that calibration may take, such as 16G [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<usize>,
    /// The same of the GPU's memory [default: nine tenths of what is free]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    gpu_memory: Option<usize>,
    /// Where the progress file is kept, and activations that do not fit the memory [default: beside the output]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Continue after the last finished block of an interrupted run
    #[arg(long)]
    resume: bool,
}

impl Args {
    /// The pairs' name, for the record.
    pub fn source(&self) -> String {
        self.calib.as_ref().map_or_else(|| "built-in".into(), |path| path.display().to_string())
    }

    /// Which pairs are used, for a model of `context` tokens.
    fn draw(&self, context: usize) -> Draw<'_> {
        Draw {
            list: self.calib.as_deref(),
            image_root: self.image_root.as_deref(),
            samples: self.samples as usize,
            seed: self.seed,
            max_tokens: self.max_tokens.unwrap_or(context).min(context),
        }
    }

    /// The same with an importance matrix gathered, balanced unless another was named.
    pub fn with_importance(mut self) -> Self {
        if self.imatrix == Imatrix::None {
            self.imatrix = Imatrix::Gathered(Weighting::Balanced);
        }
        self
    }
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum LossArg {
    Mae,
    Mse,
}

#[derive(Clone, PartialEq, Eq)]
enum Imatrix {
    Gathered(Weighting),
    None,
    File(PathBuf),
}

fn imatrix(s: &str) -> Result<Imatrix, String> {
    match s {
        "balanced" => Ok(Imatrix::Gathered(Weighting::Balanced)),
        "image" => Ok(Imatrix::Gathered(Weighting::Image)),
        "none" => Ok(Imatrix::None),
        path if Path::new(path).is_file() => Ok(Imatrix::File(path.into())),
        _ => Err("one of balanced, image, none, or a file that exists".into()),
    }
}

/// What a calibration hands on.
#[derive(Default)]
pub struct Found {
    pub calibration: Calibration,
    pub importance: Option<Importance>,
    pub leftovers: Leftovers,
    /// Linears of another type than the file's.
    pub linears: BTreeMap<String, GgmlType>,
}

#[derive(Clone, Copy)]
enum DeviceArg {
    Cpu,
    Cuda(usize),
}

fn device(s: &str) -> Result<DeviceArg, String> {
    match s.split_once(':') {
        None if s == "cpu" => Ok(DeviceArg::Cpu),
        None if s == "cuda" => Ok(DeviceArg::Cuda(0)),
        Some(("cuda", n)) => n.parse().map(DeviceArg::Cuda).map_err(|_| format!("{n} is no device number")),
        _ => Err("one of cpu, cuda, cuda:N".into()),
    }
}

fn size(s: &str) -> Result<usize, String> {
    let (digits, unit) = s.split_at(s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len()));
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err("a number of bytes, or with K, M, G".into()),
    };
    let n: usize = digits.parse().map_err(|_| "a number of bytes, or with K, M, G".to_string())?;
    n.checked_mul(1 << shift).filter(|&n| n > 0).ok_or_else(|| "too large, or zero".into())
}

/// The stored types' own rounding of a decoder linear.
fn stored(file: FileType, config: &TextConfig) -> Box<dyn WeightGrid> {
    let ty = file.tensor_type(Role::Linear(Linear::Other, 0), 1, 256, false, false);
    // Rows of other lengths are stored in a fallback type, which only ggml's own round trip knows.
    let rows = [config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size];
    let fits_mbq3 = rows.iter().all(|r| r % 128 == 0);
    match ty {
        GgmlType::MBQ3 if fits_mbq3 => Box::new(Mbq3),
        // The i-quants' own search takes minutes per block: a plain grid of equal bits stands for them.
        GgmlType::IQ3_S | GgmlType::IQ3_XXS => Box::new(Asymmetric { bits: 3, group: 32 }),
        GgmlType::IQ4_XS => Box::new(Asymmetric { bits: 4, group: 32 }),
        _ => Box::new(Stored {
            name: ty.to_string(),
            rows: move |rows: &mut [f32], cols: usize| {
                let ty = fitting(ty, cols);
                let bytes = ggml::quantize_rows(ty, rows, cols, None).map_err(|e| e.to_string())?;
                rows.copy_from_slice(&ggml::dequantize(ty, &bytes).map_err(|e| e.to_string())?);
                Ok(())
            },
        }),
    }
}

/// Calibrates for `file` as the arguments say. `output` is the model's file, beside which progress is kept.
pub fn run(
    args: &Args,
    method: Method,
    types: TypeChoice,
    w4a8: bool,
    checkpoint: &Checkpoint,
    output: &Path,
    observer: &dyn Observer,
) -> Result<Found> {
    let file = types.file;
    let (importance, given) = match &args.imatrix {
        Imatrix::Gathered(weighting) => (Some(*weighting), None),
        Imatrix::None => (None, None),
        Imatrix::File(path) => (None, Some(Importance::read(path, &LlavaOnevision::read(checkpoint)?.text)?)),
    };
    let record = |method: Method| serde_json::to_value(method).unwrap_or_default();
    let float = matches!(file, FileType::Plain(GgmlType::F32 | GgmlType::F16 | GgmlType::BF16));
    let method = if float { Method::Rtn } else { method };
    if method == Method::Rtn && importance.is_none() {
        let weights = given.map(|i| i.means()).unwrap_or_default();
        return Ok(Found {
            calibration: Calibration { importance: weights, ..Calibration::default() },
            ..Found::default()
        });
    }
    if args.paper_w4a8 && !w4a8 {
        bail!("--paper-w4a8 is for --bits w4a8");
    }
    let start = Instant::now();
    let clock = Clock::new(observer);
    let observer: &dyn Observer = &clock;
    let device = match args.device {
        DeviceArg::Cpu => Device::Cpu,
        DeviceArg::Cuda(n) => Device::new_cuda(n)
            .with_context(|| format!("--device cuda:{n} (a build with `--features cuda` and a GPU are needed)"))?,
    };
    calibrate::hold(&device, args.gpu_memory.unwrap_or(usize::MAX))?;
    let config = LlavaOnevision::read(checkpoint)?;
    let files = compensate::files(args.work_dir.as_deref(), checkpoint, output, observer)?;
    let progress = files.progress();
    let memory = args.memory.unwrap_or_else(half_of_free);
    // What does not fit waits beside the progress.
    let spill = progress.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let room = Room::new(&device, memory / 2, spill);
    let embedder = Embedder::load(&config, checkpoint, &device)?;
    let Samples { batch, inputs, data, source, skipped } =
        samples::embed(&embedder, args.draw(config.text.max_position_embeddings), CHUNK, &room, observer)?;
    drop(embedder);
    let embedding_seconds = start.elapsed().as_secs_f64();
    let model = Model::new(checkpoint, &config.text, batch.longest, device)?;
    let weights: Box<dyn WeightGrid> =
        if args.paper_w4a8 { Box::new(PerChannel { bits: 4 }) } else { stored(file, &config.text) };
    let activations = match (w4a8, args.paper_w4a8) {
        (false, _) => Activations::Float,
        (true, false) => Activations::Blocks,
        (true, true) => Activations::PerToken,
    };
    let loss = match (args.loss, method) {
        (Some(LossArg::Mae), _) | (None, Method::Mbq) => Loss::Mae,
        _ => Loss::Mse,
    };
    let (linears, parts) = args.compensation.widen(method, file, &model, (&batch, &inputs), observer)?;
    let types = TypeChoice { linears, ..types };
    let compensated = args.compensation.build(method, &types, &config);
    // On the testbed scales made compensated models no better (docs/compensation.md) and took most of the time.
    let scales = compensated.is_none() || args.compensation.scales;
    let settings = serde_json::json!({
        "method": record(method), "weights": weights.name(), "activations": format!("{activations:?}"),
        "loss": loss, "distort": args.distort, "balance": !args.no_balance, "exhaustive": args.exhaustive,
        "share_heads": args.share_heads, "compensation": compensated.as_ref().map(|c| c.0),
        "scales": scales, "samples": batch.samples, "source": source, "imatrix": importance,
        "wider": types.linears.iter().map(|(name, ty)| (name, ty.to_string())).collect::<BTreeMap<_, _>>(),
    });
    let job = Job {
        model: checkpoint.dir().display().to_string(),
        weights: checkpoint.fingerprint(),
        settings: hex(&Sha256::digest(format!("{settings}{data}"))),
    };
    if !args.resume {
        files.clear()?;
    }
    let compensation = compensated.map(|(settings, types)| Compensation { settings, types, store: files.store(&job) });
    let tokens = batch.tokens;
    // Work in passes of the linears: as measured on a testbed of 89 M weights on two cores and a 7B shape on an H100.
    let search = match method {
        Method::Mbq if scales => 8.0,
        Method::Awq if scales => 5.0,
        _ => 1.0,
    };
    estimate(&model, tokens, search + if compensation.is_some() { 5.0 } else { 0.0 }, observer)?;
    let options = calibrate::Options {
        method,
        weights: weights.as_ref(),
        activations,
        loss,
        distort: args.distort,
        balance: !args.no_balance,
        exhaustive: args.exhaustive,
        share_heads: args.share_heads,
        scales,
        importance,
        alpha: 0.5,
        chunk_tokens: CHUNK,
        memory,
        device_memory: args.gpu_memory,
        spill: Some(spill.into()),
        compensation: compensation.as_ref(),
        progress: Some((progress, job)),
    };
    let found = calibrate::run_packed(&model, &batch, inputs, &options, observer)?;
    let groups = |found: &[calibrate::mbq::Found]| -> Vec<serde_json::Value> {
        found
            .iter()
            .map(|f| {
                serde_json::json!({"group": f.group, "ratio": f.ratio, "exponent": f.best as f64 / 20.0,
                    "loss": f.best_loss, "margin": f.margin, "losses": f.losses})
            })
            .collect()
    };
    let record = serde_json::json!({
        "method": record(method),
        "settings": settings,
        "data_sha256": data,
        "skipped": skipped,
        "tokens": tokens,
        "loss": found.loss,
        "sensitivities": found.sensitivities,
        "ratios": found.ratios,
        "blocks": found.blocks.iter().map(|b| groups(b)).collect::<Vec<_>>(),
        "parts": parts,
        "compensated": found.compensated,
        "seconds": {"embedding": embedding_seconds, "phases": clock.record(), "all": start.elapsed().as_secs_f64()},
    });
    let encoder = compensation.map(|c| Box::new(c) as Box<dyn Encoder>);
    let weights = given.as_ref().or(found.importance.as_ref()).map(|i| i.folded(&found.folds)).unwrap_or_default();
    let calibration = Calibration { folds: found.folds, encoder, importance: weights, record: Some(record) };
    let leftovers = Leftovers(Some(files));
    Ok(Found { calibration, importance: found.importance, leftovers, linears: types.linears })
}

/// Tokens that are packed together, at least.
const CHUNK: usize = 1024;

/// Half of the memory that no one uses, or 4 GiB where the system does not say.
fn half_of_free() -> usize {
    let free = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        line.trim().trim_end_matches("kB").trim().parse::<usize>().ok()
    });
    free.map_or(4 << 30, |kib| kib * 512)
}

/// Says how long the calibration will take, from the model's shape, its `passes` and a short product.
fn estimate(model: &Model, tokens: usize, passes: f64, observer: &dyn Observer) -> Result<()> {
    let c = model.config;
    let cpu = model.device.is_cpu();
    // Enough work for all of an accelerator.
    let (rows, columns) = if cpu { (512, 1024) } else { (4096, 4096) };
    let a = candle_core::Tensor::ones((rows, c.hidden_size), candle_core::DType::F32, &model.device)?;
    let b = candle_core::Tensor::ones((c.hidden_size, columns), candle_core::DType::F32, &model.device)?;
    // A number of its own is waited for: of a part of the product all would be fetched.
    let product = || a.matmul(&b)?.narrow(0, 0, 1)?.sum_all()?.to_scalar::<f32>();
    product()?;
    let start = Instant::now();
    let mut n = 0;
    while start.elapsed().as_secs_f64() < 0.2 {
        product()?;
        n += 1;
    }
    let rate = (n * 2 * rows * c.hidden_size * columns) as f64 / start.elapsed().as_secs_f64();
    let attention = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * c.head_dim;
    let weights = (c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)) as f64;
    let seconds = passes * 2.0 * weights * tokens as f64 / rate;
    let mut note = format!("{tokens} tokens; about {} for the calibration at {:.0} GFLOP/s", span(seconds), rate / 1e9);
    if seconds > 3600.0 && cpu {
        note += "; fewer --samples or a GPU (--device cuda) would shorten it";
    }
    observer.event(Event::Note(note));
    Ok(())
}

fn span(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
