//! `mbq-convert inspect FILE.gguf`
use anyhow::Result;
use mbq_convert::gguf::{GgufFile, Value};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// A GGUF file
    file: PathBuf,
    /// Leave out the tensor list
    #[arg(long)]
    no_tensors: bool,
}

pub fn run(args: Args) -> Result<()> {
    let file = GgufFile::open(&args.file)?;
    println!("{}: GGUF version {}", args.file.display(), file.version);
    for (key, value) in file.metadata.iter() {
        println!("{key} = {}", show(value));
    }
    let (mut bits, mut weights) = (0u64, 0u64);
    for t in &file.tensors {
        bits += 8 * t.size.unwrap_or(0);
        weights += t.elements() as u64;
        if !args.no_tensors {
            let ty = t.ty().map_or_else(|| format!("type {}", t.type_id), |ty| ty.to_string());
            println!("{:40} {ty:8} {:?}", t.name, t.shape);
        }
    }
    let bpw = if weights == 0 { 0.0 } else { bits as f64 / weights as f64 };
    println!("{} tensors, {weights} weights, {bpw:.3} bits per weight", file.tensors.len());
    Ok(())
}

/// One line: long strings and arrays by their beginning.
fn show(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = match value {
        Value::Array(values) => {
            let first: Vec<String> = values.iter().take(8).map(|v| show(&v)).collect();
            let more = if values.len() > 8 { format!(", … ({} in all)", values.len()) } else { String::new() };
            return format!("[{}{more}]", first.join(", "));
        }
        Value::String(text) => format!("{:?}", String::from_utf8_lossy(text)),
        Value::Bool(v) => v.to_string(),
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        // invariant: the others are integers.
        v => v.as_u64().map(|v| v.to_string()).or(v.as_i64().map(|v| v.to_string())).unwrap_or_default(),
    };
    match text.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}
