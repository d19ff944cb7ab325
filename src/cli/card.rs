//! `mbq-convert card MODEL.gguf`, `mbq-convert card --check DIR`
use super::Common;
use anyhow::{Context, Result, bail};
use mbq_convert::gguf::Output;
use mbq_convert::publish::{CardOptions, card, check};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub struct Args {
    /// Models of one checkpoint, each with the record (.mbq.json) and the mmproj of its conversion beside it
    #[arg(required_unless_present = "check", value_name = "MODEL.gguf")]
    models: Vec<PathBuf>,
    /// Where to write the card; - for standard output [default: README.md beside the first model]
    #[arg(short, long, value_name = "FILE", conflicts_with = "check")]
    output: Option<PathBuf>,
    /// Measured quality: what `mbq-convert eval --json FILE` wrote
    #[arg(long, value_name = "FILE", conflicts_with = "check")]
    eval: Option<PathBuf>,
    /// The checkpoint's repository [default: what the files say]
    #[arg(long, value_name = "ORG/NAME", conflicts_with = "check")]
    base_model: Option<String>,
    /// Who publishes it
    #[arg(long, value_name = "NAME", conflicts_with = "check")]
    quantized_by: Option<String>,
    /// Write no card: check that a folder can be uploaded. The status is not 0 where something is wrong
    #[arg(long, value_name = "DIR", conflicts_with = "models")]
    check: Option<PathBuf>,
}

pub fn run(args: Args, common: &Common) -> Result<()> {
    if let Some(dir) = &args.check {
        return run_check(dir, common);
    }
    let options = CardOptions { base_model: args.base_model, quantized_by: args.quantized_by, eval: args.eval };
    let made = card(&args.models, &options)?;
    let beside = |model: &PathBuf| model.with_file_name("README.md");
    let path = args.output.or_else(|| args.models.first().map(beside)).context("no model is given")?;
    if path == Path::new("-") {
        print!("{}", made.text);
    } else {
        let mut output = Output::create(&path)?;
        output.write(made.text.as_bytes())?;
        Output::publish(vec![output])?;
    }
    if !common.quiet {
        made.notes.iter().for_each(|note| eprintln!("note: {note}"));
        if path != Path::new("-") {
            eprintln!("{}", path.display());
        }
    }
    Ok(())
}

fn run_check(dir: &Path, common: &Common) -> Result<()> {
    let checked = check(dir)?;
    let wrong = checked.problems.iter().filter(|p| p.wrong).count();
    if !common.quiet {
        for problem in &checked.problems {
            println!("{}: {problem}", if problem.wrong { "WRONG" } else { "note" });
        }
        let counts = [(checked.models, "model"), (checked.mmprojs, "mmproj file"), (checked.records, "record")];
        println!("{}", counts.map(|(n, thing)| counted(n, thing)).join(", "));
    }
    if wrong > 0 {
        bail!("{}: {}: this folder should not be uploaded", dir.display(), counted(wrong, "fault"));
    }
    if !common.quiet {
        println!("nothing is wrong: this folder can be uploaded");
    }
    Ok(())
}

/// `1 model`, `2 models`.
fn counted(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}
