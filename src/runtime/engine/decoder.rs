//! A text model at work: prompts into its cache, logits out of it.

use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::Instant;

use super::vision::Guard;
use super::{Compute, EngineError, Media, Model, Piece, Runtime, Token, Vision, take_log};
use crate::eval::stats;
use crate::runtime::sys;

/// Where a model's time went, in seconds, and over how many tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Times {
    pub load: f64,
    pub prefill: f64,
    pub prefill_tokens: u64,
    pub score: f64,
    pub score_tokens: u64,
    pub decode: f64,
    pub decode_tokens: u64,
}

/// Sequences of the cache: the prompt, two answers scored at once, a generation.
const PROMPT: i32 = 0;
const GENERATION: i32 = 3;
const SEQUENCES: u32 = 4;

/// One text model at work.
pub struct Decoder<'v> {
    /// Outlives the context below.
    model: Model,
    ptr: NonNull<sys::llama_context>,
    vision: Option<&'v Vision>,
    batch: usize,
    vocab: usize,
    /// What the prompt sequence holds: each piece and the position behind it.
    held: Vec<(Piece, i32)>,
    /// Logits behind the prompt.
    first: Vec<f32>,
    pub times: Times,
}

impl Drop for Decoder<'_> {
    fn drop(&mut self) {
        // SAFETY: owned, and freed once, before the model it points into.
        unsafe { self.model.runtime.lib.llama_free(self.ptr.as_ptr()) }
    }
}

impl<'v> Decoder<'v> {
    /// Loads the model for prompts and answers of at most `context` tokens together.
    ///
    /// # Errors
    /// What the runtime refuses, or too little memory for the context.
    pub fn load(
        runtime: &Arc<Runtime>,
        path: &Path,
        compute: Compute,
        context: usize,
        vision: Option<&'v Vision>,
    ) -> Result<Self, EngineError> {
        let start = Instant::now();
        let model = Model::load(runtime, path, compute, true)?;
        let lib = &runtime.lib;
        let n_ctx = u32::try_from(context.next_multiple_of(256)).unwrap_or(u32::MAX);
        // SAFETY: defaults, and the model lives in the result.
        let ptr = unsafe {
            let mut params = lib.llama_context_default_params();
            params.n_ctx = n_ctx;
            params.n_batch = compute.batch.max(2048);
            params.n_ubatch = compute.batch;
            params.n_seq_max = SEQUENCES;
            params.kv_unified = true;
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
        let ptr = NonNull::new(ptr).ok_or_else(|| EngineError::Model { path: path.into(), log: take_log() })?;
        let vocab = model.vocab_size();
        // SAFETY: the context lives.
        let batch = unsafe { lib.llama_n_batch(ptr.as_ptr()) } as usize;
        let times = Times { load: start.elapsed().as_secs_f64(), ..Times::default() };
        Ok(Self { model, ptr, vision, batch, vocab, held: Vec::new(), first: Vec::new(), times })
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Puts a prompt into the cache. Leading pieces that the last prompt shares, a picture among them, are kept.
    ///
    /// # Errors
    /// The runtime fails to decode.
    pub fn prefill(&mut self, pieces: &[Piece]) -> Result<(), EngineError> {
        take_log();
        let start = Instant::now();
        // At least the last piece is decoded again: its logits are wanted.
        let limit = pieces.len().saturating_sub(1);
        let shared = self.held.iter().zip(&pieces[..limit]).take_while(|((a, _), b)| a == *b).count();
        self.held.truncate(shared);
        let mut past = self.held.last().map_or(0, |(_, end)| *end);
        // SAFETY: the context lives; -1 stands for the end.
        let kept = unsafe {
            let lib = &self.model.runtime.lib;
            let memory = lib.llama_get_memory(self.ptr.as_ptr());
            (1..SEQUENCES as i32).for_each(|s| {
                lib.llama_memory_seq_rm(memory, s, -1, -1);
            });
            past > 0 && lib.llama_memory_seq_rm(memory, PROMPT, past, -1)
        };
        if !kept {
            // SAFETY: as above.
            unsafe {
                let lib = &self.model.runtime.lib;
                lib.llama_memory_clear(lib.llama_get_memory(self.ptr.as_ptr()), true);
            }
            self.held.clear();
            past = 0;
        }
        for (i, piece) in pieces.iter().enumerate().skip(self.held.len()) {
            let last = i + 1 == pieces.len();
            match piece {
                Piece::Text(tokens) => {
                    let mut first = Vec::new();
                    let entries: Vec<_> = tokens
                        .iter()
                        .enumerate()
                        .map(|(k, t)| BatchEntry {
                            token: *t,
                            position: past + k as i32,
                            sequence: PROMPT,
                            output: last && k + 1 == tokens.len(),
                        })
                        .collect();
                    self.decode(&entries, |_, logits| first = logits.to_vec())?;
                    if last {
                        self.first = first;
                    }
                    past += tokens.len() as i32;
                    self.times.prefill_tokens += tokens.len() as u64;
                }
                Piece::Media(media) => {
                    past = self.decode_media(media, past)?;
                    self.times.prefill_tokens += media.tokens as u64;
                }
            }
            self.held.push((piece.clone(), past));
        }
        self.times.prefill += start.elapsed().as_secs_f64();
        Ok(())
    }

    fn decode_media(&mut self, media: &Media, past: i32) -> Result<i32, EngineError> {
        let lib = &self.model.runtime.lib;
        let fail = || EngineError::Call { what: "a picture cannot be decoded by the text model", log: take_log() };
        let vision = self.vision.ok_or_else(fail)?;
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
                PROMPT,
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

    /// Position behind the prompt.
    fn past(&self) -> i32 {
        self.held.last().map_or(0, |(_, end)| *end)
    }

    /// Runs answers after the prompt, teacher-forced, and hands `row(answer, position, logits)` the logits that
    /// predict each of their tokens. At most two answers at once.
    ///
    /// # Errors
    /// The runtime fails to decode.
    pub fn score(
        &mut self,
        answers: &[&[Token]],
        mut row: impl FnMut(usize, usize, &[f32]),
    ) -> Result<(), EngineError> {
        debug_assert!(answers.len() < GENERATION as usize);
        take_log();
        let start = Instant::now();
        let past = self.past();
        let mut entries = Vec::new();
        let mut places = Vec::new();
        for (a, tokens) in answers.iter().enumerate() {
            let sequence = a as i32 + 1;
            self.branch(sequence);
            if !tokens.is_empty() {
                row(a, 0, &self.first);
            }
            for (k, token) in tokens.iter().enumerate().take(tokens.len().saturating_sub(1)) {
                entries.push(BatchEntry { token: *token, position: past + k as i32, sequence, output: true });
                places.push((a, k + 1));
            }
        }
        self.decode(&entries, |i, logits| row(places[i].0, places[i].1, logits))?;
        self.times.score += start.elapsed().as_secs_f64();
        self.times.score_tokens += entries.len() as u64;
        Ok(())
    }

    /// Continues the prompt greedily behind the tokens `start`, up to `limit` tokens in all (`start` among them)
    /// or a token that ends the turn, which is part of the result.
    ///
    /// # Errors
    /// The runtime fails to decode.
    pub fn generate(&mut self, start: &[Token], limit: usize) -> Result<Vec<Token>, EngineError> {
        take_log();
        let mut tokens = start.to_vec();
        let mut logits = self.first.clone();
        self.branch(GENERATION);
        let past = self.past();
        let mut fed = 0;
        loop {
            if tokens.len() > fed {
                let clock = Instant::now();
                let entries: Vec<_> = (fed..tokens.len())
                    .map(|k| BatchEntry {
                        token: tokens[k],
                        position: past + k as i32,
                        sequence: GENERATION,
                        output: k + 1 == tokens.len(),
                    })
                    .collect();
                self.decode(&entries, |_, row| logits.copy_from_slice(row))?;
                let seconds = clock.elapsed().as_secs_f64();
                // Tokens taken over from a scored answer come in one batch: that is no decoding speed.
                if entries.len() == 1 {
                    self.times.decode += seconds;
                    self.times.decode_tokens += 1;
                } else {
                    self.times.score += seconds;
                    self.times.score_tokens += entries.len() as u64;
                }
                fed = tokens.len();
            }
            let next = stats::argmax(&logits) as Token;
            tokens.push(next);
            if self.model.ends(next) {
                return Ok(tokens);
            }
            if tokens.len() >= limit {
                return Ok(tokens);
            }
        }
    }

    /// Measures decoding: `count` tokens one by one behind the prompt, the end of the turn ignored.
    ///
    /// # Errors
    /// The runtime fails to decode.
    pub fn time_decoding(&mut self, count: usize) -> Result<(), EngineError> {
        self.branch(GENERATION);
        let mut token = stats::argmax(&self.first) as Token;
        let start = Instant::now();
        for k in 0..count {
            let entry = BatchEntry { token, position: self.past() + k as i32, sequence: GENERATION, output: true };
            self.decode(&[entry], |_, row| token = stats::argmax(row) as Token)?;
        }
        self.times.decode += start.elapsed().as_secs_f64();
        self.times.decode_tokens += count as u64;
        Ok(())
    }

    /// Lets a sequence share the prompt.
    fn branch(&mut self, sequence: i32) {
        let lib = &self.model.runtime.lib;
        // SAFETY: the context lives and has that many sequences; -1 stands for the ends.
        unsafe {
            let memory = lib.llama_get_memory(self.ptr.as_ptr());
            lib.llama_memory_seq_rm(memory, sequence, -1, -1);
            lib.llama_memory_seq_cp(memory, PROMPT, sequence, -1, -1);
        }
    }

    /// Decodes entries in batches and hands out the logits of those marked for output, by their index among these.
    fn decode(&mut self, entries: &[BatchEntry], mut row: impl FnMut(usize, &[f32])) -> Result<(), EngineError> {
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

struct BatchEntry {
    token: Token,
    position: i32,
    sequence: i32,
    output: bool,
}
