//! The calibration of a whole model, block by block: one block's weights resident, resumable after each block.
use super::batch::{Batch, Chunk, Sample, pack};
use super::budget::{Budget, Phase, trim};
use super::compensate::{Compensated, Compensation, VisionWeight};
use super::grid::{Activations, WeightGrid};
use super::importance::{Importance, Weighting};
use super::mbq::{FoundScales, Group, Loss, Ratios, ratios};
use super::model::TextModel;
use super::outputs::OutputMoments;
use super::pass::{Keep, Kept, Pass};
use super::progress::Progress;
use super::scaling::{apply, fold};
use super::search::Search;
use super::sensitivity::{BlockSensitivity, sensitivities};
use super::settings::Method;
use super::smoothquant;
use super::store::JobId;
use super::stream::{Room, Stream};
use crate::Error;
use crate::events::{Event, Observer};
use crate::quant::fold::Folds;
use crate::text::{Block, Trace};
use candle_core::Device;
use std::path::PathBuf;

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
    pub blocks: Vec<Vec<FoundScales>>,
    pub compensated: Vec<Compensated>,
    /// The calibration loss, nats per answer token.
    pub loss: Option<f64>,
    pub importance: Option<Importance>,
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
    model: &TextModel,
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
    model: &TextModel,
    batch: &Batch,
    mut x: Stream,
    options: &CalibrateOptions,
    observer: &dyn Observer,
) -> Result<Outcome, Error> {
    if options.method == Method::Rtn && options.importance.is_none() {
        return Ok(Outcome::default());
    }
    let mut run = Run::new(model, batch, options, observer)?;
    let ahead = run.gradients(&mut x, observer)?;
    let at_outputs = run.output_moments(&mut x, observer)?;
    run.budget.share(if options.compensation.is_some() { Phase::Compensation } else { Phase::Search }, x.room());
    x.settle()?;
    trim(&model.device)?;
    let second = options.distort || options.compensation.is_some();
    let mut x_q = second.then(|| x.copy()).transpose()?;
    let mut ahead = ahead.into_iter();
    let layers = model.text.num_layers;
    observer.event(Event::PhaseStart { name: "blocks".into(), total: layers as u64, unit: "blocks" });
    for layer in 0..layers {
        run.block(layer, &mut x, &mut x_q, ahead.next(), at_outputs.as_ref())?;
        observer.event(Event::Advance { n: 1, detail: format!("block {layer}") });
    }
    observer.event(Event::PhaseEnd);
    run.importance.iter().try_for_each(Importance::check)?;
    let Run { folds, ratios, progress, importance, .. } = run;
    let Progress { sensitivities, blocks, compensated, loss, .. } = progress;
    Ok(Outcome { folds, sensitivities, ratios, blocks, compensated, loss, importance })
}

/// Moves `x`, an entry for each of `chunks`, on through `block`, `activations` applied to what enters a linear.
pub(super) fn advance(
    block: &Block,
    layer: usize,
    chunks: &[Chunk],
    x: &mut Stream,
    activations: Activations,
) -> candle_core::Result<()> {
    for (c, chunk) in chunks.iter().enumerate() {
        let trace = block.trace(&x.take(c)?, &chunk.spans, &|x| activations.apply(x))?;
        x.set(c, chunk.inject(layer, block.output(&trace)?)?)?;
    }
    Ok(())
}

/// A calibration under way.
struct Run<'r, 'm> {
    model: &'r TextModel<'m>,
    batch: &'r Batch,
    options: &'r CalibrateOptions<'r>,
    budget: Budget,
    /// Whether scales are looked for, and vision errors weighed in that.
    scales: bool,
    balance: bool,
    ratios: Vec<Ratios>,
    progress: Progress,
    importance: Option<Importance>,
    folds: Folds,
}

impl<'r, 'm> Run<'r, 'm> {
    fn new(
        model: &'r TextModel<'m>,
        batch: &'r Batch,
        options: &'r CalibrateOptions,
        observer: &dyn Observer,
    ) -> Result<Self, Error> {
        let budget = Budget::new(model, batch, options, observer)?;
        let progress = match &options.progress {
            Some((path, job)) => Progress { job: job.clone(), ..Progress::read(path, job, observer)? },
            None => Progress::default(),
        };
        let scales = options.scales && !matches!(options.method, Method::Gptq | Method::Rtn);
        Ok(Run {
            model,
            batch,
            options,
            budget,
            scales,
            balance: matches!(options.method, Method::Mbq | Method::MbqScales) && options.balance && scales,
            ratios: Vec::new(),
            progress,
            importance: options.importance.map(|_| Importance::new(batch)),
            folds: Folds::new(),
        })
    }

    fn search(&self) -> Search<'_> {
        Search { options: self.options, budget: &self.budget }
    }

    fn save(&self) -> Result<(), Error> {
        match &self.options.progress {
            Some((path, _)) => self.progress.write(path),
            None => Ok(()),
        }
    }

    /// Finds the ratios, where something asks for them. What the gradients' forward pass makes of the blocks is what the
    /// search begins with.
    fn gradients(&mut self, x: &mut Stream, observer: &dyn Observer) -> Result<Vec<Kept>, Error> {
        let (options, budget) = (self.options, &self.budget);
        let by_ratio = options.compensation.is_some_and(|c| c.settings.vision == VisionWeight::Ratio);
        let wanted = self.balance || by_ratio || options.importance == Some(Weighting::Balanced);
        let mut ahead = Vec::new();
        if wanted && self.progress.sensitivities.is_empty() {
            budget.share(Phase::Search, x.room());
            let most = x.room().left();
            let alone = options.compensation.is_none() && options.importance.is_none();
            let reuse = self.scales && alone && self.model.device.is_cpu();
            budget.share(Phase::Gradients, x.room());
            x.settle()?;
            let reuse = reuse.then_some((self.search(), most));
            let found = sensitivities(self.model, self.batch, x, budget.at_once, reuse, observer)?;
            (self.progress.sensitivities, self.progress.loss, ahead) = (found.0, Some(found.1), found.2);
            self.save()?;
        }
        self.ratios = ratios(&self.progress.sensitivities);
        Ok(ahead)
    }

    /// What errors at the outputs of `o` and `down` cost, where compensation asks for it and blocks are left to do.
    fn output_moments(&self, x: &mut Stream, observer: &dyn Observer) -> Result<Option<OutputMoments>, Error> {
        let wanted = self.options.compensation.is_some_and(|c| c.settings.two_sided);
        if !wanted || self.progress.compensated.len() == self.model.text.num_layers {
            return Ok(None);
        }
        self.budget.share(Phase::Gradients, x.room());
        x.settle()?;
        Ok(Some(OutputMoments::gather(self.model, self.batch, x, self.budget.at_once, observer)?))
    }

    /// One block: its pass, its scales, its compensation; both streams move on.
    fn block(
        &mut self,
        layer: usize,
        x: &mut Stream,
        x_q: &mut Option<Stream>,
        ahead: Option<Kept>,
        at_outputs: Option<&OutputMoments>,
    ) -> Result<(), Error> {
        let block = self.model.block(layer)?;
        let (options, batch) = (self.options, self.batch);
        let pass = self.pass(layer, &block, x, ahead)?;
        let scales = self.block_scales(layer, &block, pass.as_ref(), x_q.as_ref())?;
        let outputs = pass.map(Pass::outputs);
        let mut scaled = block.clone();
        scales.iter().try_for_each(|(group, s)| apply(&mut scaled, *group, s))?;
        match (options.compensation, x_q) {
            (Some(compensation), Some(x_q)) => {
                drop(outputs);
                let done = self.progress.compensated.len() > layer;
                let ratios = self.ratios.get(layer).copied();
                let found = compensation.block(
                    layer,
                    &scaled,
                    batch,
                    options.activations,
                    (ratios, at_outputs),
                    (x, x_q),
                    done,
                )?;
                if !done {
                    self.progress.compensated.push(found);
                    self.save()?;
                }
            }
            (_, x_q) => {
                if let Some(x_q) = x_q {
                    advance(&self.search().quantise(&scaled)?, layer, &batch.chunks, x_q, options.activations)?;
                }
                if let Some((mut attn_out, mut mlp_out)) = outputs {
                    // What the pass has made is not made again.
                    for c in 0..x.len() {
                        let h = block.after_attention(&x.take(c)?, &attn_out.take(c)?)?;
                        let y = block.after_mlp(&h, &mlp_out.take(c)?)?;
                        x.set(c, batch.chunks[c].inject(layer, y)?)?;
                    }
                }
            }
        }
        for (group, scales) in scales {
            fold(&mut self.folds, layer, &block, group, scales);
        }
        Ok(())
    }

    /// Whether the block's scales are still to be searched.
    fn is_searched(&self, layer: usize) -> bool {
        self.scales && self.options.method != Method::SmoothQuant && self.progress.blocks.len() == layer
    }

    fn is_smoothed(&self) -> bool {
        self.scales && self.options.method == Method::SmoothQuant
    }

    /// The block's full-precision pass, where something is to be learned from it.
    fn pass<'b>(
        &mut self,
        layer: usize,
        block: &'b Block,
        x: &'b Stream,
        ahead: Option<Kept>,
    ) -> Result<Option<Pass<'b>>, Error> {
        let (searched, smoothed) = (self.is_searched(layer), self.is_smoothed());
        let alone = self.options.compensation.is_none();
        if !(searched || smoothed || self.importance.is_some() || alone) {
            return Ok(None);
        }
        let mut keep = Keep { outputs: alone, maxima: smoothed, ..Keep::default() };
        if searched {
            keep = self.search().keep(block)?;
        }
        let weighted = self.options.importance == Some(Weighting::Balanced);
        let ratios = self.ratios.get(layer).copied().filter(|_| weighted);
        let seen = |chunk: &Chunk, trace: &Trace| match &mut self.importance {
            Some(importance) => importance.add(layer, chunk, trace, ratios),
            None => Ok(()),
        };
        Ok(Some(match ahead {
            Some(kept) => Pass::of(block, x, kept),
            None => Pass::run(block, self.batch, x, Activations::Float, keep, self.budget.at_once, seen)?,
        }))
    }

    /// The block's scales, searched or read from the progress.
    fn block_scales(
        &mut self,
        layer: usize,
        block: &Block,
        pass: Option<&Pass>,
        x_q: Option<&Stream>,
    ) -> Result<Vec<(Group, Vec<f32>)>, Error> {
        if !self.scales {
            return Ok(Vec::new());
        }
        if let (true, Some(pass)) = (self.is_smoothed(), pass) {
            return Ok(smoothquant::block(block, pass, self.options.alpha)?);
        }
        if let (true, Some(pass)) = (self.is_searched(layer), pass) {
            let x_q = x_q.filter(|_| self.options.distort);
            let ratios = self.ratios.get(layer).copied().filter(|_| self.balance);
            self.progress.blocks.push(self.search().block(block, self.batch, pass, x_q, ratios)?);
            self.save()?;
        }
        Ok(self.progress.blocks[layer].iter().map(|f| (f.group, f.scales.clone())).collect())
    }
}
