//! `mbq-convert runtime install|source|patch DIR`
use anyhow::{Result, bail};
use mbq_convert::runtime;
use std::path::{Path, PathBuf};

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
    /// Changes a llama.cpp checkout of yours as this program's is changed; where a change does not fit, nothing is written
    Patch {
        /// The checkout's top folder
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
        RuntimeCommand::Patch { dir } => patch(&dir)?,
    }
    Ok(())
}

fn patch(dir: &Path) -> Result<()> {
    let done = runtime::patch(dir)?;
    if !done.failed.is_empty() {
        done.failed.iter().for_each(|what| eprintln!("{what}"));
        bail!(
            "{}: {} changes do not fit, nothing was written; the patches are made for llama.cpp {}",
            dir.display(),
            done.failed.len(),
            runtime::LLAMA_CPP
        );
    }
    match (done.changed.len(), done.present.len()) {
        (0, _) => eprintln!("{}: already applied", dir.display()),
        (changed, 0) => eprintln!("{}: {changed} files changed or added", dir.display()),
        (changed, present) => {
            eprintln!("{}: {changed} files changed or added, {present} had the changes already", dir.display());
        }
    }
    Ok(())
}
