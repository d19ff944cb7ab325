//! The calibration's options.
use anyhow::{Context, Result};
use candle_core::Device;
use mbq_convert::calibrate::compensate::VisionWeight;
use mbq_convert::calibrate::importance::Weighting;
use mbq_convert::calibrate::{Imatrix, Job, Method, Switches};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
#[command(next_help_heading = "Calibration")]
pub struct Args {
    /// Conversations about pictures: LLaVA/ShareGPT4V, OpenAI or LlamaFactory JSON or JSONL, JSONL of {image, question,
    /// answer}, or a folder of pictures with .txt captions [default: a small built-in set]
    #[arg(long, value_name = "FILE|DIR")]
    calib: Option<PathBuf>,
    /// Where the pairs' pictures are [default: beside the file]
    #[arg(long, value_name = "DIR")]
    image_root: Option<PathBuf>,
    /// How many pairs to use [default: 128]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    /// What a vision token weighs in the compensation beside a text token: a number, or `ratio` for the layer's own
    /// [default: 1]
    #[arg(long, value_name = "W", value_parser = vision_weight)]
    vision_weight: Option<VisionWeight>,
    /// Bits per weight that the decoder's linears may have on average, from 3.25 on: those of which it helps most are
    /// q4_0 instead of mbq3
    #[arg(long, value_name = "BITS")]
    bpw: Option<f64>,
    /// Importance matrix for ggml's quantisers (and beside the model as .imatrix.gguf, for llama-quantize): mean x^2
    /// over vision and answer tokens, weighed by their modality's sensitivity (balanced) or alike (image); none; or a file
    /// that llama-imatrix wrote
    #[arg(long, value_name = "balanced|image|none|FILE", default_value = "none", value_parser = imatrix)]
    imatrix: ImatrixArg,
    /// cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device)]
    device: DeviceArg,
    /// Memory that calibration may take, such as 16G; after a comma the same of the GPU's [default: half of what is free,
    /// nine tenths of the GPU's]
    #[arg(long, value_name = "SIZE[,SIZE]", value_parser = memory)]
    memory: Option<MemoryArg>,
    /// Where the progress file is kept, and activations that do not fit the memory [default: beside the output]
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Continue after the last finished block of an interrupted run
    #[arg(long)]
    resume: bool,
    /// Switches for research, see docs/calibration.md: seed, max-tokens, activations, own-answers, scales, loss, distort,
    /// balance, exhaustive, share-heads, target, residual, two-sided
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl Args {
    /// The job that they describe.
    pub fn job(&self, method: Method, runtime: Option<&Path>) -> Result<Job> {
        let switches = Switches::read(&self.set).map_err(anyhow::Error::msg).context("--set")?;
        let device = match self.device {
            DeviceArg::Cpu => Device::Cpu,
            DeviceArg::Cuda(n) => Device::new_cuda(n)
                .with_context(|| format!("--device cuda:{n} (a build with `--features cuda` and a GPU are needed)"))?,
        };
        Ok(Job {
            method,
            list: self.calib.clone(),
            image_root: self.image_root.clone(),
            samples: self.samples.map(|n| n as usize),
            vision_weight: self.vision_weight,
            bpw: self.bpw,
            imatrix: self.imatrix.0.clone(),
            switches,
            device,
            memory: self.memory.as_ref().map(|m| m.host),
            device_memory: self.memory.as_ref().and_then(|m| m.device),
            work_dir: self.work_dir.clone(),
            resume: self.resume,
            runtime: runtime.map(Path::to_path_buf),
        })
    }

    /// The pairs' name, for the record.
    pub fn source(&self) -> String {
        self.calib.as_ref().map_or_else(|| "built-in".into(), |path| path.display().to_string())
    }
}

#[derive(Clone)]
struct ImatrixArg(Option<Imatrix>);

fn imatrix(s: &str) -> Result<ImatrixArg, String> {
    Ok(ImatrixArg(match s {
        "balanced" => Some(Imatrix::Gathered(Weighting::Balanced)),
        "image" => Some(Imatrix::Gathered(Weighting::Image)),
        "none" => None,
        path if Path::new(path).is_file() => Some(Imatrix::File(path.into())),
        _ => return Err("one of balanced, image, none, or a file that exists".into()),
    }))
}

#[derive(Clone, Copy)]
enum DeviceArg {
    Cpu,
    Cuda(usize),
}

fn device(s: &str) -> Result<DeviceArg, String> {
    match s.split_once(':') {
        None if s == "cpu" => Ok(DeviceArg::Cpu),
        None if s == "cuda" => Ok(DeviceArg::Cuda(0)),
        Some(("cuda", n)) => n.parse().map(DeviceArg::Cuda).map_err(|_| format!("{n} is no device number")),
        _ => Err("one of cpu, cuda, cuda:N".into()),
    }
}

#[derive(Clone)]
struct MemoryArg {
    host: usize,
    device: Option<usize>,
}

fn memory(s: &str) -> Result<MemoryArg, String> {
    let (host, device) = s.split_once(',').map_or((s, None), |(host, device)| (host, Some(device)));
    let size = |s| super::size(s, 1024);
    Ok(MemoryArg { host: size(host)?, device: device.map(size).transpose()? })
}

fn vision_weight(s: &str) -> Result<VisionWeight, String> {
    if s == "ratio" {
        return Ok(VisionWeight::Ratio);
    }
    let weight: f64 = s.parse().map_err(|_| "a number, or ratio".to_string())?;
    if weight >= 0.0 && weight.is_finite() { Ok(VisionWeight::Fixed(weight)) } else { Err("0 or more".into()) }
}
