//! `mbq-convert bundle MODEL.gguf -o DIR|ZIP`
use super::Common;
use anyhow::{Context, Result};
use mbq_convert::bundle::{Bundle, Sources};
use mbq_convert::runtime;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// The language model's GGUF file; of a split model the first
    model: PathBuf,
    /// A folder, or a zip file where the name ends in .zip; neither may exist
    #[arg(short, long, value_name = "DIR|ZIP")]
    output: PathBuf,
    /// The vision file [default: the mmproj*.gguf beside the model]
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
}

pub fn run(args: Args, common: &Common) -> Result<()> {
    let mmproj = args.mmproj.map_or_else(|| runtime::find_mmproj(&args.model), Ok)?;
    let runtime = runtime::directory(common.runtime.as_deref())?;
    let program = std::env::current_exe().context("the program does not find itself")?;
    let sources = Sources { model: &args.model, mmproj: &mmproj, runtime: &runtime, program: &program };
    let bundle = Bundle::new(&sources)?;
    let stop = super::interrupt::flag().context("the program cannot wait for Ctrl-C")?;
    bundle.write(&args.output, &stop, &common.bars())?;
    if !common.quiet {
        bundle.notes.iter().for_each(|note| eprintln!("note: {note}"));
        eprintln!(
            "{}: {:.1} MB of files; README.txt in it says how to start",
            args.output.display(),
            super::mb(bundle.bytes())
        );
    }
    Ok(())
}
