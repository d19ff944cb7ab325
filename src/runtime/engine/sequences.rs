//! A text model with a cache for several sequences, and batches of their tokens through it.

use std::ptr::{self, NonNull};

use super::vision::Guard;
use super::{Compute, EngineError, Media, Model, Token, Vision, take_log};
use crate::runtime::sys;

/// A sequence has a multiple of so many cells of the cache.
const CELLS: usize = 256;

/// A model and its cache.
pub struct Sequences {
    /// Outlives the context below.
    model: Model,
    ptr: NonNull<sys::llama_context>,
    /// Tokens of a call, at most.
    batch: usize,
    vocab: usize,
}

impl Drop for Sequences {
    fn drop(&mut self) {
        // SAFETY: owned, and freed once, before the model it points into.
        unsafe { self.model.runtime.lib.llama_free(self.ptr.as_ptr()) }
    }
}

/// A token of a batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchEntry {
    pub token: Token,
    pub position: i32,
    pub sequence: i32,
    /// Its logits are wanted.
    pub output: bool,
}

impl Sequences {
    /// `cells` tokens for all `count` sequences together, which can share them ([`Self::copy`]).
    ///
    /// # Errors
    /// Too little memory.
    pub fn shared(model: Model, compute: Compute, cells: usize, count: u32) -> Result<Self, EngineError> {
        Self::new(model, compute, cells.next_multiple_of(CELLS), count, true)
    }

    /// `cells` tokens for each of `count` sequences, none of which sees or slows another's.
    ///
    /// # Errors
    /// Too little memory.
    pub fn apart(model: Model, compute: Compute, cells: usize, count: u32) -> Result<Self, EngineError> {
        let all = cells.next_multiple_of(CELLS).saturating_mul(count as usize);
        Self::new(model, compute, all, count, false)
    }

    fn new(model: Model, compute: Compute, cells: usize, count: u32, unified: bool) -> Result<Self, EngineError> {
        let lib = &model.runtime.lib;
        // SAFETY: defaults, and the model lives in the result.
        let ptr = unsafe {
            let mut params = lib.llama_context_default_params();
            params.n_ctx = u32::try_from(cells).unwrap_or(u32::MAX);
            params.n_batch = compute.batch.max(2048);
            params.n_ubatch = compute.batch;
            params.n_seq_max = count;
            params.kv_unified = unified;
            params.swa_full = true;
            params.n_threads = compute.threads;
            params.n_threads_batch = compute.threads;
            params.no_perf = true;
            if compute.exact {
                params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
                params.type_k = sys::GGML_TYPE_F32;
                params.type_v = sys::GGML_TYPE_F32;
            }
            lib.llama_init_from_model(model.ptr.as_ptr(), params)
        };
        let ptr = NonNull::new(ptr).ok_or_else(|| EngineError::Model { path: model.path.clone(), log: take_log() })?;
        let vocab = model.vocab_size();
        // SAFETY: the context lives.
        let batch = unsafe { lib.llama_n_batch(ptr.as_ptr()) } as usize;
        Ok(Self { model, ptr, batch, vocab })
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Forgets all sequences.
    pub fn clear(&mut self) {
        let lib = &self.model.runtime.lib;
        // SAFETY: the context lives.
        unsafe { lib.llama_memory_clear(lib.llama_get_memory(self.ptr.as_ptr()), true) }
    }

    /// Forgets a sequence from position `from` on. False where the model can only forget all of it, which is left to do.
    pub fn cut(&mut self, sequence: i32, from: i32) -> bool {
        let lib = &self.model.runtime.lib;
        // SAFETY: the context lives; -1 stands for the ends.
        unsafe {
            let memory = lib.llama_get_memory(self.ptr.as_ptr());
            lib.llama_memory_seq_rm(memory, sequence, if from > 0 { from } else { -1 }, -1)
        }
    }

    /// Lets sequence `to` share what `from` holds; of a cache made by [`Self::shared`].
    pub fn copy(&mut self, from: i32, to: i32) {
        let lib = &self.model.runtime.lib;
        // SAFETY: the context lives and has that many sequences; -1 stands for the ends.
        unsafe {
            let memory = lib.llama_get_memory(self.ptr.as_ptr());
            lib.llama_memory_seq_cp(memory, from, to, -1, -1);
        }
    }

    /// Puts a picture into `sequence` from position `past` on; returns the position behind it.
    ///
    /// # Errors
    /// A picture of another width than the model's, or one that it cannot decode.
    pub fn decode_media(
        &mut self,
        vision: Option<&Vision>,
        media: &Media,
        past: i32,
        sequence: i32,
    ) -> Result<i32, EngineError> {
        let lib = &self.model.runtime.lib;
        let fail = || EngineError::Call { what: "a picture cannot be decoded by the text model", log: take_log() };
        let vision = vision.ok_or_else(fail)?;
        if media.embedding.len() != media.tokens * self.model.embedding_width() {
            return Err(fail());
        }
        let mut embedding = media.embedding.clone();
        let mut end = past;
        // SAFETY: layout and embedding outlive the calls; the embedding has the size the library reads, checked above
        // against the number of tokens of the loaded chunk below.
        unsafe {
            let chunk = lib.mtmd_input_chunk_load(media.layout.as_ptr().cast(), media.layout.len());
            let chunk = Guard(NonNull::new(chunk).ok_or_else(fail)?, |p| lib.mtmd_input_chunk_free(p));
            if lib.mtmd_input_chunk_get_n_tokens(chunk.0.as_ptr()) != media.tokens {
                return Err(fail());
            }
            let code = lib.mtmd_helper_decode_image_chunk(
                vision.ptr.as_ptr(),
                self.ptr.as_ptr(),
                chunk.0.as_ptr(),
                embedding.as_mut_ptr(),
                past,
                sequence,
                self.batch as i32,
                &mut end,
                None,
                ptr::null_mut(),
            );
            if code != 0 {
                return Err(fail());
            }
        }
        Ok(end)
    }

    /// Decodes entries in batches and hands out the logits of those marked for output, by their index among these.
    ///
    /// # Errors
    /// A full cache, or what else the runtime refuses.
    pub fn decode(&mut self, entries: &[BatchEntry], mut row: impl FnMut(usize, &[f32])) -> Result<(), EngineError> {
        let lib = &self.model.runtime.lib;
        let fail = |what| EngineError::Call { what, log: take_log() };
        let mut index = 0;
        for part in entries.chunks(self.batch) {
            let mut tokens: Vec<_> = part.iter().map(|e| e.token).collect();
            let mut positions: Vec<_> = part.iter().map(|e| e.position).collect();
            let mut counts = vec![1i32; part.len()];
            let mut sequences: Vec<_> = part.iter().map(|e| e.sequence).collect();
            let mut pointers: Vec<*mut i32> = sequences.iter_mut().map(ptr::from_mut).collect();
            let mut outputs: Vec<_> = part.iter().map(|e| i8::from(e.output)).collect();
            let batch = sys::llama_batch {
                n_tokens: part.len() as i32,
                token: tokens.as_mut_ptr(),
                embd: ptr::null_mut(),
                pos: positions.as_mut_ptr(),
                n_seq_id: counts.as_mut_ptr(),
                seq_id: pointers.as_mut_ptr(),
                logits: outputs.as_mut_ptr(),
            };
            // SAFETY: all arrays have n_tokens entries and outlive the call; logits hold n_vocab values until the
            // next call.
            unsafe {
                match lib.llama_decode(self.ptr.as_ptr(), batch) {
                    0 => {}
                    1 => return Err(fail("the runtime's cache is too small for a prompt")),
                    _ => return Err(fail("the runtime cannot decode a prompt")),
                }
                for (i, _) in part.iter().enumerate().filter(|(_, e)| e.output) {
                    let logits = lib.llama_get_logits_ith(self.ptr.as_ptr(), i as i32);
                    if logits.is_null() {
                        return Err(fail("the runtime gives no logits"));
                    }
                    row(index, std::slice::from_raw_parts(logits, self.vocab));
                    index += 1;
                }
            }
        }
        Ok(())
    }
}
