//! `mbq-convert eval`: arguments and output of an evaluation.

use std::path::{Path, PathBuf};

use mbq_convert::eval::{html, run};
use mbq_convert::gguf::Output;
use mbq_convert::runtime::engine::Compute;

/// Every candidate runs teacher-forced on the reference's own greedy answers and on the given ones; reported are
/// the KL divergence from the reference, top-1 agreement, perplexity ratio and exact-match accuracy with 95 %
/// bootstrap intervals, and paired tests between candidates. Interrupt it at any time: the same command resumes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// GGUF models to measure.
    #[arg(required = true, value_name = "CANDIDATE.gguf")]
    pub candidates: Vec<PathBuf>,
    /// The model they are compared with, usually F16.
    #[arg(long, value_name = "F16.gguf")]
    pub reference: PathBuf,
    /// The projector, needed for questions with pictures. A rotated model's own is found beside it, or given by a second
    /// --mmproj.
    #[arg(long, value_name = "MMPROJ.gguf")]
    pub mmproj: Vec<PathBuf>,
    /// Questions, one JSON object a line: {"image": …, "question": …, "answer": …, "kind": …}. Without "image" the
    /// question is text only; "prompt" in place of "question" is raw text that the answer continues.
    #[arg(long, value_name = "QUESTIONS.jsonl")]
    pub data: PathBuf,
    /// Folder that picture paths start from [default: the folder of the question file].
    #[arg(long, value_name = "DIR")]
    pub image_root: Option<PathBuf>,
    /// Only the first N questions.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Longest greedy answer in tokens.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,
    /// Write all numbers, question by question, to this file ("-" for standard output in place of the table).
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a self-contained page with the plot of divergence against size.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Where embeddings and the reference's log-probabilities are kept [default: the user's cache folder].
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// CPU threads [default: all].
    #[arg(long, value_name = "N")]
    pub threads: Option<i32>,
    /// Layers on the GPU [default: all, if the runtime has one].
    #[arg(long, value_name = "N", default_value_t = -1, allow_hyphen_values = true)]
    pub gpu_layers: i32,
    /// The GPU to run on, by ggml's name of it: Vulkan0, CUDA0 [default: llama.cpp's choice].
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// Bootstrap resamples.
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub resamples: usize,
    /// Seed of the resampling.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
}

/// Runs the command.
pub fn run(args: Args, common: &super::Common) -> anyhow::Result<()> {
    // Before hours of work.
    for output in [&args.json, &args.html].into_iter().flatten().filter(|path| **path != Path::new("-")) {
        Output::create(output)?;
    }
    let threads = match args.threads {
        Some(n) => n.max(1),
        None => std::thread::available_parallelism().map_or(1, |n| n.get() as i32),
    };
    let beside = args.data.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let setup = run::Setup {
        image_root: args.image_root.clone().unwrap_or_else(|| beside.into()),
        reference: args.reference,
        candidates: args.candidates,
        mmproj: args.mmproj,
        data: args.data,
        limit: args.limit,
        runtime: mbq_convert::runtime::directory(common.runtime.as_deref())?,
        cache: args.cache.map_or_else(|| Ok(mbq_convert::runtime::cache_dir()?.join("eval")), anyhow::Ok)?,
        compute: Compute { threads, gpu_layers: args.gpu_layers, batch: 512, exact: false },
        device: args.device,
        max_tokens: args.max_tokens.max(1),
        resamples: args.resamples,
        seed: args.seed,
    };
    let bars = common.bars();
    let report = run::run(&setup, &bars)?;
    bars.clear();
    let to_screen = args.json.as_deref() == Some(Path::new("-"));
    if to_screen {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", report.table());
    }
    if let Some(path) = args.json.filter(|_| !to_screen) {
        write(&path, serde_json::to_string_pretty(&report)?.as_bytes())?;
    }
    if let Some(path) = args.html {
        write(&path, html::page(&report).as_bytes())?;
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut output = Output::create(path)?;
    output.write(bytes)?;
    Ok(Output::publish(vec![output])?)
}
