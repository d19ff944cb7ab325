//! `mbq-convert chat MODEL.gguf --image PICTURE -p QUESTION`
use anyhow::{Context, Result, bail};
use mbq_convert::gguf::{check_pair, pair_of};
use mbq_convert::runtime;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

#[derive(clap::Args)]
pub struct Args {
    /// The language model's GGUF file
    model: PathBuf,
    /// A picture to ask about; may be given several times
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// The question; without one and without a picture a conversation begins
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// The vision file [default: the mmproj*.gguf beside the model]
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// Use the llama.cpp runtime in this folder instead of the embedded one
    #[arg(long, value_name = "DIR")]
    runtime: Option<PathBuf>,
    /// Show what llama.cpp logs
    #[arg(short, long)]
    verbose: bool,
    /// More arguments for llama-mtmd-cli, after --
    #[arg(last = true, value_name = "ARGUMENT")]
    more: Vec<OsString>,
}

pub fn run(args: Args) -> Result<()> {
    for path in std::iter::once(&args.model).chain(&args.image).chain(&args.mmproj) {
        if !path.is_file() {
            bail!("{}: no such file", path.display());
        }
    }
    let mmproj = args.mmproj.map_or_else(|| runtime::find_mmproj(&args.model), Ok)?;
    check_pair((&args.model, pair_of(&args.model).as_deref()), (&mmproj, pair_of(&mmproj).as_deref()))?;
    let tool = runtime::tool(&runtime::directory(args.runtime.as_deref())?, "llama-mtmd-cli")?;

    let mut command = Command::new(&tool);
    command.arg("-m").arg(&args.model).arg("--mmproj").arg(mmproj);
    // The model's own chat template: llama-mtmd-cli would write ChatML of its own, with other tokens than the model's.
    command.arg("--jinja");
    for image in &args.image {
        command.arg("--image").arg(image);
    }
    // llama-mtmd-cli answers one question when it has both, and else asks for input.
    let prompt = args.prompt.or_else(|| (!args.image.is_empty()).then(|| "Describe this picture.".into()));
    if let Some(prompt) = prompt {
        command.arg("-p").arg(prompt);
    }
    if !args.verbose {
        command.args(["--verbosity", "1"]);
    }
    command.args(args.more);
    let status = command.status().with_context(|| format!("{} does not start", tool.display()))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => bail!("llama-mtmd-cli failed with status {code}; --verbose shows its log"),
        None => bail!("llama-mtmd-cli was ended by a signal"),
    }
}
