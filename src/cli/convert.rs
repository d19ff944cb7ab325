//! `mbq-convert MODEL -o model.gguf`
use super::progress::Bars;
use anyhow::{Context, Result, bail};
use mbq_convert::calibrate;
use mbq_convert::checkpoint::Checkpoint;
use mbq_convert::convert::{Options, Summary, Written, check, convert};
use mbq_convert::events::Observer;
use mbq_convert::ggml::GgmlType;
use mbq_convert::gguf::{FileType, TypeChoice};
use mbq_convert::hub::{Hub, HubId, repository_of};
use mbq_convert::model::llava_onevision::LlavaOnevision;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    /// Directory of a Hugging Face checkpoint, or a hub id org/name[@revision]
    model: Option<String>,
    /// The language model's file; mmproj-… is written beside it [default: named after the model, here]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// How the weights are rounded
    #[arg(long, value_enum, default_value_t = Method::Mbq)]
    method: Method,
    /// Shorthand for --type: w3 is mbq3, w4 is q4_k, w4a8 is q4_0 calibrated for int8 activations
    #[arg(long, value_enum, conflicts_with = "file_type")]
    bits: Option<Bits>,
    /// Type of the decoder's linears: mbq3, f32, f16, bf16, q8_0, q6_k, q5_k, q4_k, q4_0, q3_k, q2_k, iq4_xs, iq3_s,
    /// iq3_xxs, or llama-quantize's mixes q4_k_m, q3_k_m, q3_k_s
    #[arg(long = "type", value_name = "TYPE", default_value = "mbq3", hide_possible_values = true)]
    file_type: FileType,
    /// Type of the embedding [default: q6_k, or q8_0 where rows do not divide by 256; as --type when that is a float]
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    embedding_type: Option<GgmlType>,
    /// Type of the output head, where it is not the embedding [default: as the embedding's]
    #[arg(long, value_name = "TYPE", value_parser = tensor_type)]
    output_type: Option<GgmlType>,
    /// Type of vision tower and projector: f16, f32, q8_0
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = mmproj_type)]
    mmproj_type: GgmlType,
    #[command(flatten)]
    calibration: super::calibrate::Args,
    /// Use only what the hub's cache holds
    #[arg(long)]
    offline: bool,
    /// No progress, no summary
    #[arg(short, long)]
    quiet: bool,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Method {
    /// Balanced search: errors at vision and answer tokens weigh as the model's loss minds them
    Mbq,
    /// AWQ's search, unweighted
    Awq,
    /// SmoothQuant's scales, without a search
    Smoothquant,
    /// Error compensation only: no scales, no balance (GPTQ)
    Gptq,
    /// Round to nearest: no calibration
    Rtn,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Bits {
    W3,
    W4,
    W4a8,
}

fn tensor_type(name: &str) -> Result<GgmlType, String> {
    match name.parse()? {
        FileType::Plain(ty) => Ok(ty),
        mix => Err(format!("{mix} is a mix of types; name one")),
    }
}

fn mmproj_type(name: &str) -> Result<GgmlType, String> {
    match tensor_type(name)? {
        ty @ (GgmlType::F16 | GgmlType::F32 | GgmlType::Q8_0) => Ok(ty),
        _ => Err("one of f16, f32, q8_0".into()),
    }
}

pub fn run(args: Args) -> Result<()> {
    let Some(model) = &args.model else { bail!("no MODEL given; see --help") };
    let bars = Bars::new(args.quiet);
    let source = locate(model, args.offline, &bars)?;
    let checkpoint = Checkpoint::open(&source.dir)?;
    let file_type = match args.bits {
        None => args.file_type,
        Some(Bits::W3) => FileType::Plain(GgmlType::MBQ3),
        Some(Bits::W4) => FileType::Plain(GgmlType::Q4_K),
        Some(Bits::W4a8) => FileType::Plain(GgmlType::Q4_0),
    };
    let mut options = Options {
        output: args.output.clone(),
        types: TypeChoice { embedding: args.embedding_type, output: args.output_type, ..TypeChoice::of(file_type) },
        mmproj_type: args.mmproj_type,
        repository: source.repository,
    };
    let method = match args.method {
        Method::Mbq => calibrate::Method::Mbq,
        Method::Awq => calibrate::Method::Awq,
        Method::Smoothquant => calibrate::Method::SmoothQuant,
        Method::Gptq => calibrate::Method::Gptq,
        Method::Rtn => calibrate::Method::Rtn,
    };
    let w4a8 = args.bits == Some(Bits::W4a8);
    let beside = check(&checkpoint, &options).with_context(|| format!("converting {model}"))?;
    let found =
        super::calibrate::run(&args.calibration, method, options.types.clone(), w4a8, &checkpoint, &beside, &bars)
            .with_context(|| format!("calibrating {model}"))?;
    options.types.linears.clone_from(&found.linears);
    let summary =
        convert(&checkpoint, &options, &found.calibration, &bars).with_context(|| format!("converting {model}"))?;
    if let Some(importance) = &found.importance {
        let path = summary.model.path.with_extension("imatrix.gguf");
        importance.write(&LlavaOnevision::read(&checkpoint)?.text, &args.calibration.source(), &path)?;
    }
    found.leftovers.remove();
    bars.clear();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else if !args.quiet {
        print_summary(&summary);
    }
    Ok(())
}

/// A checkpoint on disk, and the hub's name of it.
pub(super) struct Source {
    pub dir: PathBuf,
    repository: Option<String>,
}

/// Finds the directory that MODEL names, downloading it if it is a hub id.
pub(super) fn locate(model: &str, offline: bool, observer: &dyn Observer) -> Result<Source> {
    let dir = Path::new(model);
    if dir.is_dir() {
        return Ok(Source { dir: dir.into(), repository: repository_of(dir) });
    }
    let id: HubId = model.parse()?;
    let dir = Hub::from_env(offline).fetch(&id, observer)?;
    Ok(Source { dir, repository: Some(id.name) })
}

fn print_summary(s: &Summary) {
    for file in [&s.model, &s.mmproj] {
        print_file(file);
    }
    println!("decoder linears: {:.2} bits per weight; {:.1} s", s.decoder_bits_per_weight, s.seconds);
}

fn print_file(f: &Written) {
    let types: Vec<String> = f.types.iter().map(|(name, bytes)| format!("{name} {:.1}", mb(*bytes))).collect();
    println!("{}: {}, {:.1} MB, {:.2} bits per weight", f.path.display(), f.file_type, mb(f.bytes), f.bits_per_weight);
    println!("  {} tensors, {:.1} M weights; MB by type: {}", f.tensors, f.parameters as f64 / 1e6, types.join(", "));
    // By what happened, not by tensor: a model has hundreds.
    let mut kinds: BTreeMap<(&str, &str, usize), Vec<&str>> = BTreeMap::new();
    for x in &f.fallbacks {
        kinds.entry((x.wanted, x.used, x.row)).or_default().push(&x.tensor);
    }
    for ((wanted, used, row), tensors) in kinds {
        let more = if tensors.len() > 3 { ", …" } else { "" };
        let names = tensors[..tensors.len().min(3)].join(", ");
        println!("  rows of {row} do not fit {wanted}: {} tensors are {used} ({names}{more})", tensors.len());
    }
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
