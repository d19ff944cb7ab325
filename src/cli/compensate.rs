//! The options of error compensation, and what it leaves on disk until the model is written.
use anyhow::{Context, Result, bail};
use mbq_convert::calibrate::batch::Batch;
use mbq_convert::calibrate::bits::{self, Part};
use mbq_convert::calibrate::compensate::{Settings, Vision};
use mbq_convert::calibrate::store::WorkFiles;
use mbq_convert::calibrate::stream::Stream;
use mbq_convert::calibrate::{Method, Model};
use mbq_convert::checkpoint::Checkpoint;
use mbq_convert::events::{Event, Observer};
use mbq_convert::ggml::GgmlType;
use mbq_convert::gguf::plan::text as text_plan;
use mbq_convert::gguf::{FileType, TypeChoice};
use mbq_convert::model::llava_onevision::LlavaOnevision;
use mbq_convert::quant::levels::Format;
use std::collections::BTreeMap;
use std::path::Path;

#[derive(clap::Args, Clone)]
pub struct Args {
    /// Leave rounding errors as they are: the paper's method
    #[arg(long)]
    no_compensate: bool,
    /// Look for MBQ's scales before errors are compensated too; where nothing is compensated they are always looked for
    #[arg(long)]
    pub scales: bool,
    /// What a vision token weighs in the compensation beside a text token: a number, or `ratio` for the layer's own
    #[arg(long, value_name = "W", default_value = "1", value_parser = vision)]
    vision_weight: Vision,
    /// Compensate in the order of the activations' sizes
    #[arg(long)]
    order: bool,
    /// How far compensation aims at the full-precision stream: 0 to 1
    #[arg(long, value_name = "SHARE", default_value = "0.5", value_parser = share)]
    target: f64,
    /// Aim o and down at what the residual stream has lost, too
    #[arg(long)]
    residual: bool,
    /// Bits per weight that the decoder's linears may have on average, from 3.25 on: those of which it helps most are
    /// q4_0 instead of mbq3
    #[arg(long, value_name = "BITS")]
    bpw: Option<f64>,
}

/// Pairs that parts of the decoder are measured on, or a few more: what is packed with them.
const MEASURED: usize = 8;

impl Args {
    /// Whether `method` compensates errors.
    fn wanted(&self, method: Method) -> bool {
        method == Method::Gptq || (method == Method::Mbq && !self.no_compensate)
    }

    /// Spends `--bpw`: the linears that get another type than `file`'s, and what was measured.
    pub fn widen(
        &self,
        method: Method,
        file: FileType,
        model: &Model,
        (batch, inputs): (&Batch, &Stream),
        observer: &dyn Observer,
    ) -> Result<(BTreeMap<String, GgmlType>, Vec<Part>)> {
        let Some(mean) = self.bpw else { return Ok(Default::default()) };
        if file != FileType::Plain(GgmlType::MBQ3) || !self.wanted(method) {
            bail!("--bpw mixes mbq3 and q4_0 where errors are compensated: leave out --type and --no-compensate");
        }
        let types = [GgmlType::MBQ3, GgmlType::Q4_0];
        let width = types.map(GgmlType::bits_per_weight);
        // Before the work, for the message.
        bits::widened(&[], width, mean).context("--bpw")?;
        let mut pairs = 0;
        let few = batch.chunks.iter().take_while(|chunk| {
            let before = pairs;
            pairs += chunk.spans.len();
            before < MEASURED
        });
        let chunks = &batch.chunks[..few.count()];
        let parts = bits::measure(model, chunks, inputs, types, observer)?;
        let widened = bits::widened(&parts, width, mean)?;
        observer.event(Event::Note(format!("--bpw {mean}: {} of {} parts are q4_0", widened.len(), parts.len())));
        Ok((bits::types(&parts, &widened, types[1]), parts))
    }

    /// The compensation's settings and its linears' types, where the method has one and there are linears that it can be
    /// done for.
    pub fn build(
        &self,
        method: Method,
        types: &TypeChoice,
        config: &LlavaOnevision,
    ) -> Option<(Settings, BTreeMap<String, GgmlType>)> {
        let linears = text_plan(&config.text, types).into_iter().filter(|t| t.is_decoder_linear);
        let types: BTreeMap<String, GgmlType> = linears.map(|t| (t.source, t.ty)).collect();
        let settings = match method {
            Method::Gptq => Settings::GPTQ,
            _ => Settings {
                vision: self.vision_weight,
                order: self.order,
                search_levels: true,
                target: self.target,
                residual: self.residual,
                ..Settings::GPTQ
            },
        };
        (self.wanted(method) && types.values().any(|&ty| Format::of(ty).is_some())).then_some((settings, types))
    }
}

/// The files that a calibration of `checkpoint` for `output` keeps, in `work_dir` or beside the output.
pub fn files(
    work_dir: Option<&Path>,
    checkpoint: &Checkpoint,
    output: &Path,
    observer: &dyn Observer,
) -> Result<WorkFiles> {
    let stem = match work_dir {
        None => output.with_extension("mbq-progress"),
        Some(dir) => {
            std::fs::create_dir_all(dir).with_context(|| format!("--work-dir {}", dir.display()))?;
            dir.join("mbq-progress")
        }
    };
    Ok(WorkFiles::take(stem, &format!("{} to {}", checkpoint.dir().display(), output.display()), observer)?)
}

/// What `--resume` would read, locked.
#[derive(Default)]
pub struct Leftovers(pub Option<WorkFiles>);

impl Leftovers {
    /// Once the model is written nothing is left to resume.
    pub fn remove(self) {
        if let Some(files) = self.0 {
            let _ = files.clear();
        }
    }
}

fn vision(s: &str) -> Result<Vision, String> {
    if s == "ratio" {
        return Ok(Vision::Ratio);
    }
    let weight: f64 = s.parse().map_err(|_| "a number, or ratio".to_string())?;
    if weight >= 0.0 && weight.is_finite() { Ok(Vision::Fixed(weight)) } else { Err("0 or more".into()) }
}

fn share(s: &str) -> Result<f64, String> {
    let share: f64 = s.parse().map_err(|_| "a number from 0 to 1".to_string())?;
    if (0.0..=1.0).contains(&share) { Ok(share) } else { Err("a number from 0 to 1".into()) }
}
