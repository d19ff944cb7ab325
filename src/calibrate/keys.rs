//! Keys and values of a search's candidates for q, k, v: a round asks for other queries of samples that rounds before
//! have seen, whose keys stay the same.
use super::gather::AttentionRows;
use candle_core::{Result, Tensor};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Of one sample, `[tokens, kv width]` each.
type KeysAndValues = (Tensor, Tensor);

/// By candidate and sample.
#[derive(Default)]
struct KeysState {
    bytes: usize,
    pairs: BTreeMap<(usize, usize), KeysAndValues>,
}

/// What is kept, in `room` bytes at most; the rest is made each time, to the same values.
pub(super) struct Keys {
    room: usize,
    state: Mutex<KeysState>,
}

fn bytes((k, v): &KeysAndValues) -> usize {
    4 * (k.elem_count() + v.elem_count())
}

impl Keys {
    pub fn new(room: usize) -> Self {
        Keys { room, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, KeysState> {
        // A panic elsewhere leaves whole pairs behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all but these candidates'.
    pub fn retain(&self, candidates: &[usize]) {
        let mut state = self.state();
        state.pairs.retain(|(candidate, _), _| candidates.contains(candidate));
        state.bytes = state.pairs.values().map(bytes).sum();
    }

    /// Keys and values of each sample of `of`; `make` gives those of some samples' rows, joined.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get(
        &self,
        candidate: usize,
        of: &AttentionRows,
        make: impl Fn(&Tensor) -> Result<KeysAndValues>,
    ) -> Result<Vec<KeysAndValues>> {
        let mut pairs: Vec<Option<KeysAndValues>> = {
            let state = self.state();
            of.samples.iter().map(|&sample| state.pairs.get(&(candidate, sample)).cloned()).collect()
        };
        let missing: Vec<usize> = (0..pairs.len()).filter(|&i| pairs[i].is_none()).collect();
        let input = |&i: &usize| of.all.narrow(0, of.spans[i].start, of.spans[i].len);
        let made = match missing.len() {
            0 => None,
            n if n == pairs.len() => Some(make(&of.all)?),
            _ => Some(make(&Tensor::cat(&missing.iter().map(input).collect::<Result<Vec<_>>>()?, 0)?)?),
        };
        if let Some((k, v)) = made {
            let mut at = 0;
            for i in missing {
                let len = of.spans[i].len;
                let mut pair = (k.narrow(0, at, len)?, v.narrow(0, at, len)?);
                at += len;
                let mut state = self.state();
                if state.bytes + bytes(&pair) <= self.room {
                    // Their own memory: a part of the whole holds all of it, and `copy` copies that.
                    pair = (pair.0.force_contiguous()?, pair.1.force_contiguous()?);
                    state.bytes += bytes(&pair);
                    state.pairs.insert((candidate, of.samples[i]), pair.clone());
                }
                pairs[i] = Some(pair);
            }
        }
        Ok(pairs.into_iter().flatten().collect())
    }
}
