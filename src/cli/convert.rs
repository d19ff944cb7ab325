//! `mbq-convert MODEL -o model.gguf`
use super::{Common, mb};
use anyhow::{Context, Result, bail};
use mbq_convert::calibrate::{self, job};
use mbq_convert::convert::{Conversion, ConvertOptions, Summary, Written};
use mbq_convert::events::{Event, Observer};
use mbq_convert::front::{FoundModel, Pair, rotated};
use mbq_convert::ggml::GgmlType;
use mbq_convert::gguf::{FileType, TypeChoice};
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// Directory of a Hugging Face checkpoint, a hub id org/name[@revision], or a GGUF file (F32, F16, BF16, Q8_0)
    model: Option<PathBuf>,
    /// The language model's file; mmproj-… is written beside it [default: named after the model, here]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The vision file of a GGUF model [default: the mmproj*.gguf beside it]
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// How the weights are rounded
    #[arg(long, value_enum, default_value_t = MethodArg::Mbq)]
    method: MethodArg,
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
    /// Type of vision tower and projector: f16, f32, q8_0 [default: f16, and a GGUF's as they are]
    #[arg(long, value_name = "TYPE", value_parser = mmproj_type)]
    mmproj_type: Option<GgmlType>,
    /// Rotate the residual stream, which is then easier to round: the same model in another basis, whose mmproj is
    /// rotated too. `auto` does it for the method mbq where the head is a tensor of its own
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto", num_args = 0..=1, default_missing_value = "on")]
    rotate: Rotate,
    /// Split the language model into files of at most so many bytes, such as 4G (4 * 10^9): -00001-of-00003.gguf and so on.
    /// llama.cpp and every command here open the first
    #[arg(long, value_name = "SIZE", value_parser = split_max_size)]
    split_max_size: Option<u64>,
    #[command(flatten)]
    calibration: super::calibrate::Args,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum MethodArg {
    /// Rounding errors are compensated, in every type but floats
    Mbq,
    /// The paper's search of scales alone
    MbqScales,
    /// AWQ's search, unweighted
    Awq,
    /// SmoothQuant's scales, without a search
    Smoothquant,
    /// Error compensation as GPTQ's paper has it
    Gptq,
    /// Round to nearest: no calibration
    Rtn,
}

impl From<MethodArg> for calibrate::Method {
    fn from(method: MethodArg) -> Self {
        match method {
            MethodArg::Mbq => calibrate::Method::Mbq,
            MethodArg::MbqScales => calibrate::Method::MbqScales,
            MethodArg::Awq => calibrate::Method::Awq,
            MethodArg::Smoothquant => calibrate::Method::SmoothQuant,
            MethodArg::Gptq => calibrate::Method::Gptq,
            MethodArg::Rtn => calibrate::Method::Rtn,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Rotate {
    Auto,
    On,
    Off,
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

/// Powers of 1000, as llama-gguf-split has them.
fn split_max_size(s: &str) -> Result<u64, String> {
    Ok(super::size(s, 1000)? as u64)
}

pub fn run(args: Args, common: &Common) -> Result<()> {
    let Some(model) = &args.model else { bail!("no MODEL given; see --help") };
    let (bars, name) = (common.bars(), model.display());
    let found = FoundModel::find(model, args.mmproj.as_deref(), &common.hub(), &bars)?;
    let options = ConvertOptions {
        output: args.output.clone(),
        types: TypeChoice {
            embedding: args.embedding_type,
            output: args.output_type,
            ..TypeChoice::of(args.file_type)
        },
        mmproj_type: args.mmproj_type,
        split_max_size: args.split_max_size,
        origin: found.origin(),
    };
    let job = args.calibration.job(args.method.into(), common.runtime.as_deref())?;
    let pair = found.pair().with_context(|| format!("converting {name}"))?;
    let pair = rotated_if(&args, pair, &bars)?;
    let mut conversion = Conversion::begin(&pair, &options, &bars).with_context(|| format!("converting {name}"))?;
    let mmproj = conversion.mmproj()?;
    let output = conversion.model().to_path_buf();
    let done = job
        .run(&pair, &options.types, mmproj.as_deref(), (&options.origin.name, &output), &bars)
        .with_context(|| format!("calibrating {name}"))?;
    let summary = conversion.finish(&done.calibration, &bars).with_context(|| format!("converting {name}"))?;
    if let Some(importance) = &done.importance {
        let path = output.with_extension("imatrix.gguf");
        importance.write(&job::linears(&pair, &options.types), &args.calibration.source(), &path)?;
    }
    if let Some(files) = done.files {
        // The model is written: nothing is left to resume.
        let _ = files.clear();
    }
    bars.clear();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else if !common.quiet {
        print_summary(&summary);
    }
    Ok(())
}

/// The pair, in another basis where `--rotate` says so.
fn rotated_if<'a>(args: &Args, pair: Pair<'a>, observer: &dyn Observer) -> Result<Pair<'a>> {
    let float = matches!(args.file_type, FileType::Plain(GgmlType::F32 | GgmlType::F16 | GgmlType::BF16));
    let wanted = match args.rotate {
        Rotate::On => true,
        Rotate::Off => false,
        Rotate::Auto => {
            // Without a projector it would be a model that no projector fits.
            let seen = pair.mmproj.is_some() && rotated::has_own_head(&pair);
            args.method == MethodArg::Mbq && !float && seen
        }
    };
    if !wanted {
        return Ok(pair);
    }
    // What cannot be calibrated cannot be rotated either, and calibration says it better.
    let obstacle = match rotated::obstacle(&pair) {
        Err(_) if args.rotate == Rotate::Auto => return Ok(pair),
        obstacle => obstacle?,
    };
    match obstacle {
        None => Ok(rotated::rotate(pair)?),
        Some(why) if args.rotate == Rotate::On => bail!("--rotate: the model is not rotated: {why}"),
        Some(why) => {
            observer.event(Event::Note(format!("the model is not rotated: {why}")));
            Ok(pair)
        }
    }
}

fn print_summary(s: &Summary) {
    for file in [Some(&s.model), s.mmproj.as_ref()].into_iter().flatten() {
        print_file(file);
    }
    println!("decoder linears: {:.2} bits per weight; {:.1} s", s.decoder_bits_per_weight, s.seconds);
}

fn print_file(f: &Written) {
    let types: Vec<String> = f.types.iter().map(|(name, bytes)| format!("{name} {:.1}", mb(*bytes))).collect();
    let more = if f.files.len() > 1 { format!(" and {} more", f.files.len() - 1) } else { String::new() };
    let (path, bits) = (f.path.display(), f.bits_per_weight);
    println!("{path}{more}: {}, {:.1} MB, {bits:.2} bits per weight", f.file_type, mb(f.bytes));
    println!("  {} tensors, {:.1} M weights; MB by type: {}", f.tensors, f.parameters as f64 / 1e6, types.join(", "));
    // By what happened, not by tensor: a model has hundreds.
    let mut kinds: BTreeMap<(&str, &str, usize), Vec<&str>> = BTreeMap::new();
    for x in &f.fallbacks {
        kinds.entry((&x.wanted, &x.used, x.row)).or_default().push(&x.tensor);
    }
    for ((wanted, used, row), tensors) in kinds {
        let more = if tensors.len() > 3 { ", …" } else { "" };
        let names = tensors[..tensors.len().min(3)].join(", ");
        println!("  rows of {row} do not fit {wanted}: {} tensors are {used} ({names}{more})", tensors.len());
    }
}
