//! `mbq-convert rotate MODEL -o DIR`
use super::convert::locate;
use super::progress::Bars;
use anyhow::{Context, Result};
use mbq_convert::checkpoint::Checkpoint;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint: a directory, or org/name[@revision] on the Hugging Face hub
    model: String,
    /// Directory that will hold the rotated checkpoint
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Which rotation
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
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
    mbq_convert::rotate::rotate(&checkpoint, &args.output, args.seed, &bars)
        .with_context(|| format!("rotating {}", args.model))?;
    bars.clear();
    println!("{}", args.output.display());
    Ok(())
}
