//! Keys and values of a search's candidates for q, k, v: a round asks for other queries of samples that rounds before
//! have seen, whose keys stay the same.
use super::mbq::Attention;
use candle_core::{Result, Tensor};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Of one sample, `[tokens, kv width]` each.
type Pair = (Tensor, Tensor);

/// By candidate and sample.
#[derive(Default)]
struct State {
    bytes: usize,
    pairs: BTreeMap<(usize, usize), Pair>,
}

/// What is kept, in `room` bytes at most; the rest is made each time, to the same values.
pub(super) struct Keys {
    room: usize,
    state: Mutex<State>,
}

fn bytes((k, v): &Pair) -> usize {
    4 * (k.elem_count() + v.elem_count())
}

impl Keys {
    pub fn new(room: usize) -> Self {
        Keys { room, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves whole pairs behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all but these candidates'.
    pub fn retain(&self, candidates: &[usize]) {
        let mut state = self.state();
        state.pairs.retain(|(candidate, _), _| candidates.contains(candidate));
        state.bytes = state.pairs.values().map(bytes).sum();
    }

    /// Keys and values of all rows of `of`; `make` gives those of its rows at `spans`, joined.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get(&self, candidate: usize, of: &Attention, make: impl Fn(&Tensor) -> Result<Pair>) -> Result<Pair> {
        let kept: Vec<Option<Pair>> = {
            let state = self.state();
            of.samples.iter().map(|&sample| state.pairs.get(&(candidate, sample)).cloned()).collect()
        };
        let missing: Vec<Tensor> = of
            .spans
            .iter()
            .zip(&kept)
            .filter(|(_, kept)| kept.is_none())
            .map(|(span, _)| of.all.narrow(0, span.start, span.len))
            .collect::<Result<_>>()?;
        if missing.len() == kept.len() && self.room == 0 {
            return make(&of.all);
        }
        let made = match missing.len() {
            0 => None,
            n if n == kept.len() => Some(make(&of.all)?),
            _ => Some(make(&Tensor::cat(&missing, 0)?)?),
        };
        let (mut ks, mut vs, mut at) = (Vec::new(), Vec::new(), 0);
        for ((span, &sample), kept) in of.spans.iter().zip(&of.samples).zip(kept) {
            let (k, v) = match (kept, &made) {
                (Some(pair), _) => pair,
                (None, Some((k, v))) => {
                    // Its own memory: a part of the whole would hold all of it.
                    let part = |t: &Tensor| t.narrow(0, at, span.len)?.copy();
                    let pair = (part(k)?, part(v)?);
                    at += span.len;
                    let mut state = self.state();
                    if state.bytes + bytes(&pair) <= self.room {
                        state.bytes += bytes(&pair);
                        state.pairs.insert((candidate, sample), pair.clone());
                    }
                    pair
                }
                (None, None) => candle_core::bail!("sample {sample} has neither kept nor made keys"),
            };
            ks.push(k);
            vs.push(v);
        }
        Ok((Tensor::cat(&ks, 0)?, Tensor::cat(&vs, 0)?))
    }
}
