//! `mbq-convert inspect FILE.gguf`
use super::{Common, mb};
use anyhow::{Result, bail};
use mbq_convert::gguf::GgufFile;
use mbq_convert::inspect::{
    InspectOptions, Inspection, MemoryEstimate, PictureTokens, Severity, Verification, inspect, show,
};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// A GGUF file, or the first file of a split model
    file: PathBuf,
    /// List the tensors
    #[arg(long)]
    tensors: bool,
    /// Read everything and check it: where the data lies, NaN and infinities, scales of zero, SHA-256 digests of the
    /// record .mbq.json, whether the mmproj is the model's. The status is not 0 where something is wrong
    #[arg(long)]
    verify: bool,
    /// Tokens of context that memory is estimated for [default: the model's, 4096 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    context: Option<u64>,
    /// The vision file of a language model [default: the mmproj*.gguf beside it]
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// Print everything as JSON, the tensors too
    #[arg(long, conflicts_with = "tensors")]
    json: bool,
}

pub fn run(args: Args, common: &Common) -> Result<()> {
    let options = InspectOptions { context: args.context, mmproj: args.mmproj, verify: args.verify };
    let inspection = inspect(&args.file, &options)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&inspection)?);
    } else if !common.quiet {
        print(&inspection, args.tensors)?;
    }
    match &inspection.verification {
        Some(verification) if !verification.sound => {
            let error = verification.findings.iter().find(|f| f.severity == Severity::Error);
            bail!("{}", error.map(ToString::to_string).unwrap_or_default())
        }
        _ => Ok(()),
    }
}

fn print(i: &Inspection, tensors: bool) -> Result<()> {
    println!("{}: GGUF version {}", i.file.display(), i.gguf_version);
    // The lines need the values, of which the JSON has only what machines need.
    for (key, value) in GgufFile::open(&i.file)?.metadata.iter() {
        println!("{key} = {}", show(value));
    }
    if tensors {
        for t in &i.tensors {
            println!("{:40} {:8} {:?}", t.name, t.type_name, t.shape);
        }
    }
    if i.files.len() > 1 {
        i.files.iter().for_each(|f| println!("{}: {:.1} MB", f.name, mb(f.bytes)));
    }
    for t in &i.types {
        println!(
            "{:8} {:5} tensors, {:10.1} M weights, {:10.1} MB",
            t.name,
            t.tensors,
            t.weights as f64 / 1e6,
            mb(t.bytes)
        );
    }
    let bits = i.bits_per_weight.map_or("?".into(), |b| format!("{b:.3}"));
    println!("{} tensors, {} weights, {bits} bits per weight", i.tensor_count, i.weights);
    match i.runtime.stock {
        true => println!("runs in any llama.cpp that knows {}", i.architecture),
        false => println!("needs mbq-convert's llama.cpp: {}", i.runtime.reasons.join(", ")),
    }
    if let Some(memory) = &i.memory {
        print_memory(memory);
    }
    if let Some(verification) = &i.verification {
        print_verification(verification);
    }
    Ok(())
}

fn print_memory(m: &MemoryEstimate) {
    let mmproj = m.mmproj.map_or(String::new(), |bytes| format!(" + mmproj {:.1}", mb(bytes)));
    println!(
        "memory for {} tokens: about {:.1} MB = weights {:.1} + cache {:.1} + logits of a batch {:.1}{mmproj}; other \
         buffers come on top",
        m.context,
        mb(m.total),
        mb(m.weights),
        mb(m.kv_cache),
        mb(m.logits)
    );
    match &m.picture {
        Some(PictureTokens { pixels_per_token: Some(pixels), .. }) => {
            println!("a picture takes a token for {pixels} pixels");
        }
        Some(PictureTokens { per_tile: Some(tokens), most_tiles: Some(1), .. }) => {
            println!("a picture takes {tokens} tokens")
        }
        Some(PictureTokens { per_tile: Some(tokens), most_tiles, .. }) => {
            let most = most_tiles.map_or(String::new(), |n| format!(", at most {n} times ({})", n * tokens));
            println!("a picture takes {tokens} tokens for each tile that it is cut into{most}");
        }
        _ => (),
    }
}

fn print_verification(v: &Verification) {
    for finding in &v.findings {
        let word = if finding.severity == Severity::Error { "WRONG" } else { "note" };
        println!("{word}: {finding}");
    }
    v.digests.iter().for_each(|d| println!("sha256 {}  {}", d.sha256, d.name));
    match (&v.record, v.sound) {
        (Some(record), true) => println!("sound: all numbers are finite, the files are those of {}", record.display()),
        (None, true) => println!("sound: all numbers are finite"),
        (_, false) => println!("not sound"),
    }
}
