//! `mbq-convert imatrix MODEL -o imatrix.gguf`
use super::Common;
use anyhow::{Context, Result, bail};
use mbq_convert::calibrate::importance::Weighting;
use mbq_convert::calibrate::{Imatrix, Method, job};
use mbq_convert::convert::{Conversion, ConvertOptions};
use mbq_convert::front::FoundModel;
use mbq_convert::ggml::GgmlType;
use mbq_convert::gguf::{FileType, TypeChoice};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint (a directory, or org/name[@revision] on the Hugging Face hub), or a GGUF file
    model: PathBuf,
    /// The vision file of a GGUF model [default: the mmproj*.gguf beside it]
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// Where to write it
    #[arg(short, long, value_name = "FILE", default_value = "imatrix.gguf")]
    output: PathBuf,
    #[command(flatten)]
    calibration: super::calibrate::Args,
}

pub fn run(args: Args, common: &Common) -> Result<()> {
    let bars = common.bars();
    let found = FoundModel::find(&args.model, args.mmproj.as_deref(), &common.hub(), &bars)?;
    let pair = found.pair()?;
    let mut job = args.calibration.job(Method::Rtn, common.runtime.as_deref())?;
    job.imatrix = match job.imatrix {
        // `none` gathers the default.
        None => Some(Imatrix::Gathered(Weighting::Balanced)),
        Some(Imatrix::File(_)) => {
            bail!("--imatrix FILE is for a conversion; here it says what to gather: balanced or image")
        }
        gathered => gathered,
    };
    let types = TypeChoice::of(FileType::Plain(GgmlType::F16));
    let options = ConvertOptions {
        output: Some(args.output.clone()),
        types: types.clone(),
        mmproj_type: None,
        split_max_size: None,
        origin: found.origin(),
    };
    let mut conversion = Conversion::begin(&pair, &options, &bars)?;
    let mmproj = conversion.mmproj()?;
    let done = job
        .run(&pair, &types, mmproj.as_deref(), (&options.origin.name, &args.output), &bars)
        .with_context(|| format!("gathering the importance matrix of {}", args.model.display()))?;
    let Some(importance) = done.importance else { bail!("nothing was gathered") };
    importance.write(&job::linears(&pair, &types), &args.calibration.source(), &args.output)?;
    if let Some(files) = done.files {
        let _ = files.clear();
    }
    bars.clear();
    println!("{}", args.output.display());
    Ok(())
}
