//! How the memory that calibration may take is shared out: what the work on a block needs comes first, the rest is for
//! the activations that wait between passes.
#![cfg_attr(feature = "cuda", allow(unsafe_code))]
use super::batch::Batch;
use super::compensate::GATHER;
use super::estimate::{fits, gib};
use super::model::TextModel;
use super::run::CalibrateOptions;
use super::stream::Room;
use crate::Error;
use crate::events::{Event, Observer};
use crate::text::SCORES;
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver;
use candle_core::{Device, Result};

/// What is being done.
#[derive(Debug, Clone, Copy)]
pub(super) enum Phase {
    Gradients,
    Search,
    Compensation,
}

/// Bytes, by what they are for. Estimates from the shapes, a little generous.
#[derive(Debug)]
pub(super) struct Budget {
    memory: usize,
    /// None on the CPU.
    device: Option<usize>,
    needs: [usize; 3],
    /// Of the host while a device works.
    host: usize,
    /// For candidates' weights that are kept from round to round of a search.
    pub kept: usize,
    /// For candidates' keys and values, the same.
    pub keys: usize,
    /// For rows that are gathered at once in a search.
    pub gather: usize,
    /// Chunks or candidates that are worked on at a time: on the CPU as many as there are threads, as far as an eighth
    /// of the memory holds them.
    pub at_once: usize,
}

impl Budget {
    /// # Errors
    /// The device does not say how much memory it has.
    pub fn new(
        model: &TextModel,
        batch: &Batch,
        options: &CalibrateOptions,
        observer: &dyn Observer,
    ) -> std::result::Result<Self, Error> {
        let c = &model.text;
        let cpu = model.device.is_cpu();
        let device = match options.device_memory {
            _ if cpu => None,
            Some(bytes) => Some(bytes),
            None => Some(free(&model.device)? / 10 * 9),
        };
        if let Some(bytes) = device {
            hold(&model.device, bytes.saturating_sub(1 << 30))?;
        }
        let total = device.unwrap_or(options.memory);
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let wide = (c.num_heads + c.num_kv_heads) * c.head_dim;
        let block = 4 * (2 * hidden * wide + 3 * hidden * inner);
        let matrix = 4 * hidden * inner;
        let rows = batch.chunks.iter().map(|c| c.tokens()).max().unwrap_or(0);
        let scores = |heads: usize| 4 * heads * batch.longest * batch.longest;
        let scores = scores(c.num_heads).min(SCORES.max(scores(c.num_heads / c.num_kv_heads)));
        let forward = 4 * rows * (6 * hidden + 3 * wide + 4 * inner) + 5 * scores;
        let backward = 4 * rows * (12 * hidden + 4 * wide + 9 * inner) + 8 * scores;
        let threads = if cpu { rayon::current_num_threads() } else { 1 };
        let at_once = (total / 8 / backward.max(1)).clamp(1, threads);
        // The program, its libraries and their workspaces.
        let base = if cpu { 200 << 20 } else { 1 << 30 };
        let head = 4 * c.vocab_size * (hidden + 4 * 128);
        let (kept, keys, gather) = (total / 8, total / 16, (total / 16).min(2 << 30));
        let second = if options.distort { block } else { 0 };
        // While they are gathered: inputs and what is owed, in parts and joined; second moments of both, the latter as large
        // as a linear. Then the moments with their factor, in f64 and in f32, and a quarter of the former at work. Then
        // moments, factor, and a linear in several states.
        let square = 4 * inner * inner;
        let gathered = if cpu { 0 } else { 4 * 4 * GATHER * inner };
        let moments =
            (forward + gathered + square + 2 * matrix).max(9 * square / 2 + 2 * matrix).max(2 * square + 8 * matrix);
        let search = if options.scales { kept + keys + gather + 2 * matrix + 4 * at_once * matrix } else { 0 };
        let needs = [
            base + (block + block / 4 + at_once * backward).max(head),
            base + block + second + at_once * forward + search,
            base + 2 * block + moments.max(forward + search),
        ];
        let host = (768 << 20) + 4 * matrix;
        let budget = Budget { memory: options.memory, device, needs, host, kept, keys, gather, at_once };
        let need = if options.compensation.is_some() { needs[2] } else { needs[1] };
        if cpu {
            // What the program has taken is not left any more.
            fits("the work on one block", need - base)?;
        }
        if need > total {
            let flag = if cpu { "--memory" } else { "--memory's second number" };
            observer.event(Event::Note(format!(
                "work on one block takes about {:.1} GiB, more than the {:.1} GiB of {flag}: all else waits elsewhere",
                gib(need),
                gib(total)
            )));
        }
        Ok(budget)
    }

    /// Leaves `room` what `phase` does not need.
    pub fn share(&self, phase: Phase, room: &Room) {
        // What the driver cannot hand out again in one piece. Most where tensors of all chunks' lengths come and go: 4.9 of
        // 24 GiB were seen on an H100.
        let pieces = self.device.unwrap_or(0) / if matches!(phase, Phase::Gradients) { 4 } else { 16 };
        let need = self.needs[phase as usize] + pieces;
        match self.device {
            None => room.limit(self.memory.saturating_sub(need), 0),
            Some(device) => room.limit(self.memory.saturating_sub(self.host), device.saturating_sub(need)),
        }
    }
}

/// Bytes that are free on the device.
#[cfg(feature = "cuda")]
fn free(device: &Device) -> Result<usize> {
    let (free, _) =
        device.as_cuda_device()?.cuda_stream().context().mem_get_info().map_err(candle_core::Error::wrap)?;
    Ok(free)
}

#[cfg(not(feature = "cuda"))]
fn free(_: &Device) -> Result<usize> {
    Ok(usize::MAX)
}

/// Lets the driver keep so many freed bytes for what comes next: by default it gives them back whenever the program
/// waits for a result, and maps them again after it. Nothing on the CPU.
///
/// # Errors
/// The driver's.
#[cfg(feature = "cuda")]
pub fn hold(device: &Device, bytes: usize) -> Result<()> {
    let attribute = driver::sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut bytes = bytes as u64;
    // SAFETY: this attribute is a 64 bit number.
    with_pool(device, |pool| unsafe {
        driver::result::mem_pool::set_attribute(pool, attribute, (&raw mut bytes).cast())
    })
}

/// Gives back what the driver holds and nobody uses: pieces of one phase's sizes may fit nothing of the next one's.
///
/// # Errors
/// The driver's.
#[cfg(feature = "cuda")]
pub(super) fn trim(device: &Device) -> Result<()> {
    // SAFETY: the pool is the device's own.
    with_pool(device, |pool| unsafe { driver::result::mem_pool::trim_to(pool, 0) })
}

/// The device's own pool, once all work is done; nothing on the CPU.
#[cfg(feature = "cuda")]
fn with_pool(
    device: &Device,
    f: impl FnOnce(driver::sys::CUmemoryPool) -> std::result::Result<(), driver::DriverError>,
) -> Result<()> {
    if device.is_cpu() {
        return Ok(());
    }
    let stream = device.as_cuda_device()?.cuda_stream();
    let context = stream.context();
    let run = || {
        stream.synchronize()?;
        context.bind_to_thread()?;
        // SAFETY: the device is the context's own.
        f(unsafe { driver::result::device::get_default_mem_pool(context.cu_device())? })
    };
    run().map_err(candle_core::Error::wrap)
}

/// Nothing: this build has no devices.
///
/// # Errors
/// None.
#[cfg(not(feature = "cuda"))]
pub fn hold(_: &Device, _: usize) -> Result<()> {
    Ok(())
}

#[cfg(not(feature = "cuda"))]
pub(super) fn trim(_: &Device) -> Result<()> {
    Ok(())
}
