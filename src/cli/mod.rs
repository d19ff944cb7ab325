//! The command line: arguments, progress bars, messages. `mbq-convert MODEL -o model.gguf` is the main job; the
//! subcommands beside it are one file each.
mod calibrate;
mod chat;
mod clock;
mod compensate;
mod convert;
mod eval;
mod imatrix;
mod inspect;
mod progress;
mod rotate;
mod runtime;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Turns Hugging Face vision-language models into GGUF files for llama.cpp, quantised.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    convert: convert::Args,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Measures what quantised models lost against a reference, with pictures in the prompt
    Eval(eval::Args),
    /// Writes an importance matrix gathered with pictures, for llama-quantize
    Imatrix(imatrix::Args),
    /// Lists what a GGUF file holds
    Inspect(inspect::Args),
    /// Asks a converted model about a picture
    Chat(chat::Args),
    /// Writes the checkpoint with its residual stream rotated: the same model, easier to round to few bits
    Rotate(rotate::Args),
    /// Writes the llama.cpp that this program carries, built or as source
    Runtime(runtime::Args),
}

/// Runs the program; every failure is a message on stderr and a non-zero status.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        None => convert::run(cli.convert),
        Some(Command::Eval(args)) => eval::run(args),
        Some(Command::Imatrix(args)) => imatrix::run(args),
        Some(Command::Inspect(args)) => inspect::run(args),
        Some(Command::Chat(args)) => chat::run(args),
        Some(Command::Rotate(args)) => rotate::run(args),
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

/// The error and its causes on one line; a cause that the text before it already names is not repeated.
fn describe(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |text, cause| match text.as_str() {
        "" => cause,
        said if said.contains(&cause) => text,
        _ => format!("{text}: {cause}"),
    })
}
