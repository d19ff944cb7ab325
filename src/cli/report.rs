//! `mbq-convert report model.gguf`
use super::Common;
use anyhow::Result;
use mbq_convert::gguf::{Output, ShardName};
use mbq_convert::report::{ReportOptions, page};
use std::path::PathBuf;

/// Reads the record (.mbq.json) beside the model, checks that it is this file's, and writes a self-contained HTML page:
/// errors by block and matrix, where the bytes go, the calibration's pictures and texts, times, and the command that
/// repeats it.
#[derive(clap::Args)]
pub struct Args {
    /// A model that mbq-convert wrote (the first file of a split one), its record .mbq.json beside it
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
    /// The page [default: MODEL.report.html beside the model]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// What `mbq-convert eval --json` wrote, with this model among its candidates: the page shows quality, too
    #[arg(long, value_name = "FILE")]
    eval: Option<PathBuf>,
    /// Leave the calibration's pictures and texts out
    #[arg(long)]
    no_pictures: bool,
}

pub fn run(args: Args, common: &Common) -> Result<()> {
    let beside = || args.model.with_file_name(format!("{}.report.html", ShardName::stem_of(&args.model)));
    let path = args.output.clone().unwrap_or_else(beside);
    let mut output = Output::create(&path)?;
    let options = ReportOptions { eval: args.eval, no_pictures: args.no_pictures };
    output.write(page(&args.model, &options)?.as_bytes())?;
    Output::publish(vec![output])?;
    if !common.quiet {
        println!("{}", path.display());
    }
    Ok(())
}
