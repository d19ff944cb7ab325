//! The calibration of a whole model, block by block: one block's weights resident, resumable after each block.
use super::batch::{Batch, Chunk, Sample, pack};
use super::budget::{Budget, Phase, trim};
use super::compensate::{Compensated, Compensation, VisionWeight};
use super::grid::{Activations, WeightGrid};
use super::importance::{Importance, Weighting};
use super::mbq::{Found, Group, Loss, Search, apply, unshare};
use super::pass::{Keep, Pass};
use super::sensitivity::{BlockSensitivity, Ratios, ratios, sensitivities};
use super::settings::Method;
use super::store::JobId;
use super::stream::{Room, Stream};
use super::{CalibrateError, smoothquant};
use crate::Error;
use crate::events::{Event, Observer};
use crate::front::Source;
use crate::quant::fold::Folds;
use crate::text::head::Head;
use crate::text::{Block, Name, Producer, Rope, TextConfig, Trace, in_block};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A text model whose blocks are loaded when needed.
pub struct Model<'a> {
    pub source: &'a Source<'a>,
    pub text: TextConfig,
    pub device: Device,
    /// Of blocks that see everything, and of those with a window.
    ropes: [Rope; 2],
}

impl<'a> Model<'a> {
    /// `positions`: one more than the largest that a token has.
    ///
    /// # Errors
    /// What the metadata says of the text model is not understood; the rotary tables do not fit the device.
    pub fn new(source: &'a Source<'a>, positions: usize, device: Device) -> Result<Self, Error> {
        let text = source.text_config()?;
        let ropes = Rope::of_model(source, &text, positions, &device)?;
        Ok(Model { source, text, device, ropes })
    }

    /// Loads one block.
    ///
    /// # Errors
    /// As [`Block::load`].
    pub fn block(&self, layer: usize) -> Result<Block, Error> {
        let rope = &self.ropes[usize::from(self.text.windows[layer].is_some())];
        Block::load(self.source, &self.text, layer, rope, &self.device)
    }

    /// Loads the final norm and the output head.
    ///
    /// # Errors
    /// As [`Head::load`].
    pub fn head(&self) -> Result<Head, Error> {
        Head::load(self.source, &self.text, &self.device)
    }
}

/// Settings of a calibration.
pub struct CalibrateOptions<'a> {
    pub method: Method,
    pub weights: &'a dyn WeightGrid,
    pub activations: Activations,
    pub loss: Loss,
    pub distort: bool,
    /// Weigh vision errors by r; without it, MBQ's search runs unweighted.
    pub balance: bool,
    pub exhaustive: bool,
    pub share_heads: bool,
    /// Look for scales at all (mbq without them is compensation only).
    pub scales: bool,
    /// Gather the importance matrix too, tokens counted so.
    pub importance: Option<Weighting>,
    /// SmoothQuant's exponent.
    pub alpha: f32,
    /// Tokens that are multiplied at once, at least.
    pub chunk_tokens: usize,
    /// Bytes of host memory that may be taken. Activations that do not fit wait in a file.
    pub memory: usize,
    /// The same of the device's memory, where it has its own; none: nine tenths of what is free.
    pub device_memory: Option<usize>,
    /// Where that file is [default: the system's directory for temporary files].
    pub spill: Option<PathBuf>,
    /// How rounding errors are compensated, if they are.
    pub compensation: Option<&'a Compensation>,
    /// Where finished blocks are written down, and the job they belong to.
    pub progress: Option<(PathBuf, JobId)>,
}

/// What a calibration found.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub folds: Folds,
    pub sensitivities: Vec<BlockSensitivity>,
    pub ratios: Vec<Ratios>,
    pub blocks: Vec<Vec<Found>>,
    pub compensated: Vec<Compensated>,
    /// The calibration loss, nats per answer token.
    pub loss: Option<f64>,
    pub importance: Option<Importance>,
}

/// The part of a calibration that is done, as `--resume` reads it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Progress {
    job: JobId,
    loss: Option<f64>,
    sensitivities: Vec<BlockSensitivity>,
    blocks: Vec<Vec<Found>>,
    /// Blocks whose bytes are in the store.
    #[serde(default)]
    compensated: Vec<Compensated>,
}

impl Progress {
    /// What `path` says is done of `job`. Nothing, if the checkpoint at the job's place is another by now.
    fn read(path: &Path, job: &JobId, observer: &dyn Observer) -> Result<Self, Error> {
        let fail = |problem: String| CalibrateError::File { path: path.into(), problem };
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Progress::default()),
            Err(e) => return Err(fail(e.to_string()).into()),
        };
        let progress: Progress = serde_json::from_slice(&bytes)
            .map_err(|e| fail(format!("not a progress file of this version ({e}): start without --resume")))?;
        if progress.job.model == job.model && progress.job.weights != job.weights {
            let note = "the checkpoint has changed since the run that --resume would continue: starting over";
            observer.event(Event::Note(format!("{}: {note}", job.model)));
            return Ok(Progress::default());
        }
        if progress.job != *job {
            let problem = "belongs to another calibration (model, data or settings differ): leave out --resume, or name another --work-dir";
            return Err(fail(problem.into()).into());
        }
        Ok(progress)
    }

    /// Written beside, then renamed: an interruption leaves the last whole state.
    fn write(&self, path: &Path) -> Result<(), Error> {
        let fail = |e: std::io::Error| CalibrateError::File { path: path.into(), problem: e.to_string() };
        let beside = path.with_extension("part");
        // invariant: numbers, strings and lists only.
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        std::fs::write(&beside, bytes).and_then(|()| std::fs::rename(&beside, path)).map_err(fail)?;
        Ok(())
    }
}

impl CalibrateOptions<'_> {
    /// Room for what waits between passes. What a block takes beside it is known once the batch is packed.
    pub fn room(&self, device: &Device) -> Room {
        Room::new(device, self.memory / 2, &self.spill.clone().unwrap_or_else(std::env::temp_dir))
    }
}

/// Calibrates on `samples`.
///
/// # Errors
/// Samples that cannot be used, a tensor that is missing or not finite, a progress file of another job, an importance
/// matrix of zeros.
pub fn run(
    model: &Model,
    samples: &[Sample],
    options: &CalibrateOptions,
    observer: &dyn Observer,
) -> Result<Outcome, Error> {
    if options.method == Method::Rtn && options.importance.is_none() {
        return Ok(Outcome::default());
    }
    let (batch, inputs) = pack(samples, options.chunk_tokens, &options.room(&model.device))?;
    run_packed(model, &batch, inputs, options, observer)
}

/// Calibrates on a packed batch, whose embeddings are in `x`.
///
/// # Errors
/// As [`run`].
pub fn run_packed(
    model: &Model,
    batch: &Batch,
    mut x: Stream,
    options: &CalibrateOptions,
    observer: &dyn Observer,
) -> Result<Outcome, Error> {
    if options.method == Method::Rtn && options.importance.is_none() {
        return Ok(Outcome::default());
    }
    let budget = Budget::new(model, batch, options, observer)?;
    let mut progress = match &options.progress {
        Some((path, job)) => Progress { job: job.clone(), ..Progress::read(path, job, observer)? },
        None => Progress::default(),
    };
    let save = |progress: &Progress| match &options.progress {
        Some((path, _)) => progress.write(path),
        None => Ok(()),
    };
    let scales = options.scales && !matches!(options.method, Method::Gptq | Method::Rtn);
    let balance = matches!(options.method, Method::Mbq | Method::MbqScales) && options.balance && scales;
    let by_ratio = options.compensation.is_some_and(|c| c.settings.vision == VisionWeight::Ratio);
    let weighted = options.importance == Some(Weighting::Balanced);
    let search = Search {
        weights: options.weights,
        activations: options.activations,
        loss: options.loss,
        distort: options.distort,
        exhaustive: options.exhaustive,
        memory: budget.kept,
        keys: budget.keys,
        gather: budget.gather,
        at_once: budget.at_once,
        share_heads: options.share_heads,
    };
    // What the gradients' forward pass makes of the blocks is what the search begins with.
    let mut ahead = Vec::new();
    if (balance || by_ratio || weighted) && progress.sensitivities.is_empty() {
        budget.share(Phase::Search, x.room());
        let most = x.room().left();
        let reuse = scales && options.compensation.is_none() && options.importance.is_none() && model.device.is_cpu();
        budget.share(Phase::Gradients, x.room());
        x.settle()?;
        let reuse = reuse.then_some((&search, most));
        let (sums, loss, kept) = sensitivities(model, batch, &x, budget.at_once, reuse, observer)?;
        (progress.sensitivities, progress.loss, ahead) = (sums, Some(loss), kept);
        save(&progress)?;
    }
    let ratios = ratios(&progress.sensitivities);
    budget.share(if options.compensation.is_some() { Phase::Compensation } else { Phase::Search }, x.room());
    x.settle()?;
    trim(&model.device)?;
    let mut folds = Folds::new();
    let mut importance = options.importance.map(|_| Importance::new(batch));
    let second = options.distort || options.compensation.is_some();
    let mut x_q = second.then(|| x.copy()).transpose()?;
    let mut ahead = ahead.into_iter();
    let layers = model.text.num_layers;
    observer.event(Event::PhaseStart { name: "blocks".into(), total: layers as u64, unit: "blocks" });
    for layer in 0..layers {
        let block = model.block(layer)?;
        let ratios = ratios.get(layer).copied();
        let searched = scales && options.method != Method::SmoothQuant && progress.blocks.len() == layer;
        let smooth = scales && options.method == Method::SmoothQuant;
        let mut keep = Keep { outputs: options.compensation.is_none(), maxima: smooth, ..Keep::default() };
        if searched {
            keep = search.keep(&block)?;
        }
        let mut pass = None;
        if searched || smooth || importance.is_some() || options.compensation.is_none() {
            let seen = |chunk: &Chunk, trace: &Trace| match &mut importance {
                Some(importance) => importance.add(layer, chunk, trace, ratios.filter(|_| weighted)),
                None => Ok(()),
            };
            pass = Some(match ahead.next() {
                Some(kept) => Pass::of(&block, &x, kept),
                None => Pass::run(&block, batch, &x, Activations::Float, keep, budget.at_once, seen)?,
            });
        }
        let scales: Vec<(Group, Vec<f32>)> = match &pass {
            _ if !scales => Vec::new(),
            Some(pass) if smooth => smoothquant::block(&block, pass, options.alpha)?,
            _ => {
                if let (true, Some(pass)) = (searched, &pass) {
                    let x_q = x_q.as_ref().filter(|_| options.distort);
                    let found = search.block(&block, batch, pass, x_q, ratios.filter(|_| balance))?;
                    progress.blocks.push(found);
                    save(&progress)?;
                }
                progress.blocks[layer].iter().map(|f| (f.group, f.scales.clone())).collect()
            }
        };
        let outputs = pass.map(Pass::outputs);
        match (options.compensation, &mut x_q) {
            (Some(compensation), Some(x_q)) => {
                drop(outputs);
                let mut scaled = block.clone();
                scales.iter().try_for_each(|(group, s)| apply(&mut scaled, *group, s))?;
                let done = progress.compensated.len() > layer;
                let streams = (&mut x, &mut *x_q);
                let found = compensation.block(layer, &scaled, batch, options.activations, ratios, streams, done)?;
                if !done {
                    progress.compensated.push(found);
                    save(&progress)?;
                }
            }
            (_, x_q) => {
                if let Some(x_q) = x_q {
                    quantised_stream(&search, layer, &block, &scales, batch, x_q)?;
                }
                if let Some((mut attn_out, mut mlp_out)) = outputs {
                    for c in 0..x.len() {
                        let h = block.after_attention(&x.take(c)?, &attn_out.take(c)?)?;
                        let y = block.after_mlp(&h, &mlp_out.take(c)?)?;
                        x.set(c, batch.chunks[c].inject(layer, y)?)?;
                    }
                }
            }
        }
        for (group, scales) in scales {
            fold(&mut folds, layer, &block, group, scales);
        }
        observer.event(Event::Advance { n: 1, detail: format!("block {layer}") });
    }
    observer.event(Event::PhaseEnd);
    importance.iter().try_for_each(Importance::check)?;
    Ok(Outcome {
        folds,
        sensitivities: progress.sensitivities,
        ratios,
        blocks: progress.blocks,
        compensated: progress.compensated,
        loss: progress.loss,
        importance,
    })
}

/// Moves the second stream on through the finished quantised block.
fn quantised_stream(
    search: &Search,
    layer: usize,
    block: &Block,
    scales: &[(Group, Vec<f32>)],
    batch: &Batch,
    x_q: &mut Stream,
) -> Result<(), Error> {
    let mut scaled = block.clone();
    scales.iter().try_for_each(|(group, s)| apply(&mut scaled, *group, s))?;
    let q = search.quantise(&scaled)?;
    for (c, chunk) in batch.chunks.iter().enumerate() {
        let x = x_q.take(c)?;
        let trace = q.trace(&x, &chunk.spans, &|x| search.activations.apply(x))?;
        x_q.set(c, chunk.inject(layer, q.output(&trace)?)?)?;
    }
    Ok(())
}

/// Writes a group's scales down as folds of the tensors they change.
pub(super) fn fold(folds: &mut Folds, layer: usize, block: &Block, group: Group, scales: Vec<f32>) {
    let mut divide = |tensor: String, s: &[f32]| {
        folds.entry(tensor).or_default().divide_rows = Some(s.to_vec());
    };
    match group.producer() {
        Producer::AttnNorm => divide(in_block(layer, "attn_norm.weight"), &scales),
        Producer::MlpNorm => divide(in_block(layer, "ffn_norm.weight"), &scales),
        Producer::Linear(producer) => {
            let s = if producer == Name::V {
                let (repeats, dim) = block.head_shape();
                unshare(&scales, repeats, dim)
            } else {
                scales.clone()
            };
            divide(producer.weight(layer), &s);
            if block.linear(producer).bias.is_some() {
                divide(producer.bias(layer), &s);
            }
        }
    }
    for name in group.linears() {
        folds.entry(name.weight(layer)).or_default().multiply_cols = Some(scales.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::fold::Fold;
    use crate::text::tests::golden;
    use candle_core::Tensor;

    fn relative(got: &Tensor, want: &Tensor) -> f32 {
        let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        norm(&(got - want).unwrap()) / norm(want)
    }

    fn folded(t: &Tensor, fold: Option<&Fold>) -> Tensor {
        let vector = |v: &[f32]| Tensor::from_slice(v, v.len(), t.device()).unwrap();
        let mut t = t.clone();
        if let Some(rows) = fold.and_then(|f| f.divide_rows.as_deref()) {
            let by = vector(rows);
            let by = if t.rank() == 2 { by.unsqueeze(1).unwrap() } else { by };
            t = t.broadcast_div(&by).unwrap();
        }
        if let Some(cols) = fold.and_then(|f| f.multiply_cols.as_deref()) {
            t = t.broadcast_mul(&vector(cols)).unwrap();
        }
        t
    }

    /// Scales of all four groups, under grouped queries and with biases: the block's output stays what it was, whether the
    /// search applies them or the writer's folds; and nothing outside the block is touched, so that an output head that
    /// shares the embedding's weights stays what it was too.
    #[test]
    fn folding_changes_nothing_in_full_precision() {
        let (golden, block, spans) = golden();
        let x = crate::text::tests::tensor(&golden["x"], &[8, 12]);
        let want = block.forward(&x, &spans).unwrap();
        let scale = |i: usize| [0.25f32, 3.0, 0.9, 1.7, 12.0][i % 5];
        let (mut scaled, mut folds) = (block.clone(), Folds::new());
        for group in Group::ALL {
            let n = block.linear(group.linears()[0]).weight.dim(1).unwrap();
            let scales: Vec<f32> = match group {
                // Two query heads of width 4 read one value head.
                Group::O => (0..n).map(|i| scale(i / 8 * 4 + i % 4)).collect(),
                _ => (0..n).map(scale).collect(),
            };
            apply(&mut scaled, group, &scales).unwrap();
            fold(&mut folds, 3, &block, group, scales);
        }
        // f32 through about ten products: 1e-7 was seen.
        let off = relative(&scaled.forward(&x, &spans).unwrap(), &want);
        assert!(off < 1e-5, "{off}");

        let of = |name: String| folds.get(&name);
        let mut written = block.clone();
        written.norm1 = folded(&block.norm1, of(in_block(3, "attn_norm.weight")));
        written.norm2 = folded(&block.norm2, of(in_block(3, "ffn_norm.weight")));
        for name in Name::ALL {
            let linear = written.linear_mut(name);
            linear.weight = folded(&linear.weight, of(name.weight(3)));
            linear.bias = linear.bias.as_ref().map(|b| folded(b, of(name.bias(3))));
        }
        let off = relative(&written.forward(&x, &spans).unwrap(), &want);
        assert!(off < 1e-5, "{off}");
        assert!(folds.keys().all(|name| name.starts_with("blk.3.")), "{:?}", folds.keys());
        // norm1, norm2, seven weights, v's bias.
        assert_eq!(folds.len(), 10);
    }
}
