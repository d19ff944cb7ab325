//! How long a calibration will take, and how much memory it may.
use super::{CalibrateError, TextModel};
use crate::Error;
use crate::events::{Event, Observer};
use crate::memory::{self, MemoryLimit};
use candle_core::{DType, Tensor};
use std::time::Instant;

/// What the program and the runtime take, whatever the model.
const BASE: usize = 256 << 20;
/// What a thread reserves of the address space.
const THREAD: usize = 128 << 20;

/// Bytes that a calibration may take: what the user allows, else half of what is free, or 4 GiB where the system does not
/// say.
///
/// # Errors
/// The system gives less than the user allows, or than any calibration takes.
pub(super) fn allowed(asked: Option<usize>) -> Result<usize, CalibrateError> {
    let threads = rayon::current_num_threads();
    for limit in memory::limits() {
        let least = if limit.by == memory::ADDRESS_SPACE { 2 * BASE + threads * THREAD } else { BASE };
        fits_in("a calibration", least, limit)?;
        fits_in("--memory", asked.unwrap_or(0), limit)?;
    }
    Ok(asked.unwrap_or_else(|| memory::free().map_or(4 << 30, |free| free / 2)))
}

/// Refuses work of `need` bytes where the system would end it.
///
/// # Errors
/// A cgroup or a ulimit leaves less.
pub(super) fn fits(what: &str, need: usize) -> Result<(), CalibrateError> {
    memory::limits().try_for_each(|limit| fits_in(what, need, limit))
}

fn fits_in(what: &str, need: usize, limit: MemoryLimit) -> Result<(), CalibrateError> {
    match need > limit.left {
        true => Err(CalibrateError::Memory { what: what.into(), need: gib(need), left: gib(limit.left), by: limit.by }),
        false => Ok(()),
    }
}

/// Bytes in GiB, for messages.
pub(super) fn gib(bytes: usize) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// Says how long the calibration will take, from the model's shape, its `passes` and a short product.
pub(super) fn estimate(model: &TextModel, tokens: usize, passes: f64, observer: &dyn Observer) -> Result<(), Error> {
    let c = &model.text;
    let cpu = model.device.is_cpu();
    // Enough work for all of an accelerator.
    let (rows, columns) = if cpu { (512, 1024) } else { (4096, 4096) };
    let a = Tensor::ones((rows, c.hidden_size), DType::F32, &model.device)?;
    let b = Tensor::ones((c.hidden_size, columns), DType::F32, &model.device)?;
    // A number of its own is waited for: of a part of the product all would be fetched.
    let product = || a.matmul(&b)?.narrow(0, 0, 1)?.sum_all()?.to_scalar::<f32>();
    product()?;
    let start = Instant::now();
    let mut n = 0;
    while start.elapsed().as_secs_f64() < 0.2 {
        product()?;
        n += 1;
    }
    let rate = (n * 2 * rows * c.hidden_size * columns) as f64 / start.elapsed().as_secs_f64();
    let attention = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * c.head_dim;
    let weights = (c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)) as f64;
    let seconds = passes * 2.0 * weights * tokens as f64 / rate;
    let mut note = format!("{tokens} tokens; about {} for the calibration at {:.0} GFLOP/s", span(seconds), rate / 1e9);
    if seconds > 3600.0 && cpu {
        note += "; fewer --samples or a GPU (--device cuda) would shorten it";
    }
    observer.event(Event::Note(note));
    Ok(())
}

fn span(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
