//! The command line: arguments, progress bars, messages. `mbq-convert MODEL -o model.gguf` is the main job; the
//! subcommands beside it are one file each.
mod bundle;
mod calibrate;
mod card;
mod chat;
mod convert;
mod eval;
mod imatrix;
mod inspect;
mod interrupt;
mod progress;
mod report;
mod runtime;
mod serve;

use clap::{Parser, Subcommand};
use mbq_convert::front::families;
use mbq_convert::hub::Hub;
use progress::Bars;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Turns Hugging Face vision-language models into GGUF files for llama.cpp, quantised.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
#[command(after_help = format!("Checkpoints are read of {}; any other model that llama.cpp knows as a GGUF pair", families()))]
struct Cli {
    #[command(flatten)]
    convert: convert::Args,
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What every command takes.
#[derive(clap::Args)]
#[command(next_help_heading = "All commands")]
struct Common {
    /// Folder of the llama.cpp to use [default: the one that this program carries]
    #[arg(long, value_name = "DIR", global = true)]
    runtime: Option<PathBuf>,
    /// Use only what the hub's cache holds
    #[arg(long, global = true)]
    offline: bool,
    /// No progress, no summary
    #[arg(short, long, global = true)]
    quiet: bool,
}

impl Common {
    fn bars(&self) -> Bars {
        Bars::new(self.quiet)
    }

    fn hub(&self) -> Hub {
        Hub::from_env(self.offline)
    }
}

#[derive(Subcommand)]
enum Command {
    /// Measures what quantised models lost against a reference, with pictures in the prompt
    Eval(eval::Args),
    /// Writes an importance matrix gathered with pictures, for llama-quantize
    Imatrix(imatrix::Args),
    /// Says what a GGUF file holds, what it needs to run, and whether it is sound
    Inspect(inspect::Args),
    /// Writes a page about a converted model: errors, bytes, calibration, quality, how to repeat it
    Report(report::Args),
    /// Writes the card (README.md) of a model for the hub, or checks a folder before it is uploaded
    Card(card::Args),
    /// Asks a converted model about a picture
    Chat(chat::Args),
    /// Puts a model and all that runs it into a folder or a zip file, to be started by a double click elsewhere
    Bundle(bundle::Args),
    /// Answers questions about pictures in the browser and over OpenAI's protocol
    Serve(serve::Args),
    /// Writes the llama.cpp that this program carries, built or as source
    Runtime(runtime::Args),
}

/// Runs the program; every failure is a message on stderr and a non-zero status.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    mbq_convert::tell_bus_errors();
    if !matches!(cli.command, Some(Command::Serve(_) | Command::Chat(_) | Command::Bundle(_))) {
        interrupt::end_cleanly();
    }
    let result = match cli.command {
        None => convert::run(cli.convert, &cli.common),
        Some(Command::Eval(args)) => eval::run(args, &cli.common),
        Some(Command::Imatrix(args)) => imatrix::run(args, &cli.common),
        Some(Command::Inspect(args)) => inspect::run(args, &cli.common),
        Some(Command::Report(args)) => report::run(args, &cli.common),
        Some(Command::Card(args)) => card::run(args, &cli.common),
        Some(Command::Chat(args)) => chat::run(args, &cli.common),
        Some(Command::Bundle(args)) => bundle::run(args, &cli.common),
        Some(Command::Serve(args)) => serve::run(args, &cli.common),
        Some(Command::Runtime(args)) => runtime::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

/// A number of bytes, with K, M or G for powers of `kilo`.
fn size(s: &str, kilo: usize) -> Result<usize, String> {
    let (digits, unit) = s.split_at(s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len()));
    let power = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" => 1,
        "M" => 2,
        "G" => 3,
        _ => return Err("a number of bytes, or with K, M, G".into()),
    };
    let n: usize = digits.parse().map_err(|_| "a number of bytes, or with K, M, G".to_string())?;
    n.checked_mul(kilo.pow(power)).filter(|&n| n > 0).ok_or_else(|| "too large, or zero".into())
}

/// Refuses a model or an mmproj that is not there.
fn are_files(model: &Path, mmproj: Option<&Path>) -> anyhow::Result<()> {
    match std::iter::once(model).chain(mmproj).find(|path| !path.is_file()) {
        Some(path) => anyhow::bail!("{}: no such file", path.display()),
        None => Ok(()),
    }
}

/// Megabytes.
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// The error and its causes on one line; a cause that the text before it already names is not repeated.
fn describe(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        said if said.contains(&cause) => text,
        _ => format!("{text}: {cause}"),
    })
}
