//! `mbq-convert runtime install|source DIR`
use anyhow::Result;
use mbq_convert::runtime;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: RuntimeCommand,
}

#[derive(clap::Subcommand)]
enum RuntimeCommand {
    /// Writes llama.cpp's libraries and tools into DIR; the folder may be moved afterwards
    Install {
        /// Made if it does not exist
        dir: PathBuf,
    },
    /// Writes the patched llama.cpp source into DIR; BUILD.md in it says how to build it
    Source {
        /// Made if it does not exist
        dir: PathBuf,
    },
}

pub fn run(args: Args) -> Result<()> {
    match args.command {
        RuntimeCommand::Install { dir } => {
            runtime::install(&dir)?;
            eprintln!("{}: llama-mtmd-cli and the other tools are here", dir.display());
        }
        RuntimeCommand::Source { dir } => {
            runtime::write_source(&dir)?;
            eprintln!("{}: build it as {} says", dir.display(), dir.join("BUILD.md").display());
        }
    }
    Ok(())
}
