//! `mbq-convert imatrix MODEL -o imatrix.gguf`
use super::convert::locate;
use super::progress::Bars;
use anyhow::{Context, Result, bail};
use mbq_convert::calibrate::Method;
use mbq_convert::checkpoint::Checkpoint;
use mbq_convert::ggml::GgmlType;
use mbq_convert::gguf::{FileType, TypeChoice};
use mbq_convert::model::llava_onevision::LlavaOnevision;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint: a directory, or org/name[@revision] on the Hugging Face hub
    model: String,
    /// Where to write it
    #[arg(short, long, value_name = "FILE", default_value = "imatrix.gguf")]
    output: PathBuf,
    #[command(flatten)]
    calibration: super::calibrate::Args,
    /// Use only what the hub's cache holds
    #[arg(long)]
    offline: bool,
    /// No progress
    #[arg(short, long)]
    quiet: bool,
}

pub fn run(args: Args) -> Result<()> {
    let bars = Bars::new(args.quiet);
    let checkpoint = Checkpoint::open(&locate(&args.model, args.offline, &bars)?.dir)?;
    let config = LlavaOnevision::read(&checkpoint)?.text;
    let calibration = args.calibration.with_importance();
    let types = TypeChoice::of(FileType::Plain(GgmlType::F16));
    let found = super::calibrate::run(&calibration, Method::Rtn, types, false, &checkpoint, &args.output, &bars)
        .with_context(|| format!("gathering the importance matrix of {}", args.model))?;
    // `none` gathers the default; only a file is read in place of gathering.
    let Some(importance) = found.importance else {
        bail!("--imatrix FILE is for a conversion; here it says what to gather: balanced or image")
    };
    importance.write(&config, &calibration.source(), &args.output)?;
    found.leftovers.remove();
    bars.clear();
    println!("{}", args.output.display());
    Ok(())
}
