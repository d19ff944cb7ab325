//! The installed runtime as an evaluation sees it: pictures to embeddings, prompts to logits.
//!
//! [`Runtime`] is the loaded library, [`Vision`] tokenises prompts and embeds pictures with the
//! projector, [`Decoder`] runs one text model. All unsafe calls of the evaluation are here. Each
//! safe type owns its pointers, which are non-null once it exists and freed when it is dropped.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::prompt::Template;
use crate::runtime::sys;

/// A token id.
pub type Token = i32;

/// What the runtime refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    #[error("cannot load the runtime from {path}: {what}; install one with `mbq-convert runtime install`")]
    Runtime { path: PathBuf, what: String },
    #[error("the runtime cannot load {path}: {log}")]
    Model { path: PathBuf, log: String },
    #[error("the runtime cannot use {path} with {model}: {log}")]
    Projector { path: PathBuf, model: PathBuf, log: String },
    #[error("the runtime cannot read picture {path}: {log}")]
    Picture { path: PathBuf, log: String },
    #[error("{what}: {log}")]
    Call { what: &'static str, log: String },
    #[error("{0} is not a path the runtime can take: it holds a zero byte or is not UTF-8")]
    Path(PathBuf),
}

/// What llama.cpp said last at warning level and above; it says why a call failed only there.
static LOG: Mutex<Vec<String>> = Mutex::new(Vec::new());

unsafe extern "C" fn keep_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() || (level != sys::GGML_LOG_LEVEL_ERROR && level != sys::GGML_LOG_LEVEL_WARN) {
        return;
    }
    // SAFETY: llama.cpp hands over a C string that lives for the call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned();
    if let Ok(mut log) = LOG.lock() {
        if log.len() >= 8 {
            log.remove(0);
        }
        log.push(text);
    }
}

fn take_log() -> String {
    let lines = LOG.lock().map(|mut l| std::mem::take(&mut *l)).unwrap_or_default();
    if lines.is_empty() { "no reason given".into() } else { lines.join("; ") }
}

/// The loaded library.
pub struct Runtime {
    lib: sys::Mtmd,
    dir: PathBuf,
}

/// How models are run.
#[derive(Debug, Clone, Copy)]
pub struct Compute {
    /// CPU threads.
    pub threads: i32,
    /// Layers on the GPU; negative for all.
    pub gpu_layers: i32,
    /// Tokens computed at once.
    pub batch: u32,
    /// No flash attention and a cache in f32: closest to the exact result; otherwise what llama.cpp's tools do.
    pub exact: bool,
}

impl Runtime {
    /// Loads the libraries of the installed runtime in `dir`.
    ///
    /// # Errors
    /// No library there, or one that lacks a function this version calls.
    pub fn open(dir: &Path) -> Result<Arc<Self>, EngineError> {
        let name = if cfg!(target_os = "macos") {
            "libmtmd.dylib"
        } else if cfg!(windows) {
            "mtmd.dll"
        } else {
            "libmtmd.so"
        };
        let path = [dir.join(name), dir.join("bin").join(name), dir.join("lib").join(name)]
            .into_iter()
            .find(|p| p.is_file())
            .ok_or_else(|| EngineError::Runtime { path: dir.into(), what: format!("there is no {name}") })?;
        let fail = |e: libloading::Error| EngineError::Runtime { path: path.clone(), what: e.to_string() };
        // SAFETY: the file is llama.cpp's own library, whose initialisers only register things; the bindings are
        // generated from the headers of the pinned version.
        let lib = unsafe { sys::Mtmd::new(&path) }.map_err(fail)?;
        let dir = path.parent().unwrap_or(dir).to_owned();
        let c_dir = c_path(&dir)?;
        // SAFETY: the callback is a plain function without user data; the path outlives the call.
        unsafe {
            lib.llama_log_set(Some(keep_log), ptr::null_mut());
            lib.mtmd_helper_log_set(Some(keep_log), ptr::null_mut());
            lib.ggml_backend_load_all_from_path(c_dir.as_ptr());
            lib.llama_backend_init();
        }
        take_log();
        Ok(Arc::new(Self { lib, dir }))
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Version of llama.cpp, and the features of the processor it uses.
    pub fn describe(&self) -> String {
        // SAFETY: both return static strings.
        unsafe {
            let text = |p: *const c_char| CStr::from_ptr(p).to_string_lossy().trim().to_owned();
            format!("llama.cpp {}; {}", text(self.lib.llama_version()), text(self.lib.llama_print_system_info()))
        }
    }
}

fn c_path(path: &Path) -> Result<CString, EngineError> {
    path.to_str().and_then(|p| CString::new(p).ok()).ok_or_else(|| EngineError::Path(path.into()))
}

/// A loaded text model, or only its header and vocabulary.
pub struct Model {
    runtime: Arc<Runtime>,
    path: PathBuf,
    ptr: NonNull<sys::llama_model>,
}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: owned, and freed once.
        unsafe { self.runtime.lib.llama_model_free(self.ptr.as_ptr()) }
    }
}

impl Model {
    /// Loads `path`; with `weights` false only what its header says, which still finds an unknown architecture or
    /// type, a missing tensor or a wrong shape.
    ///
    /// # Errors
    /// What the runtime refuses, with its own words.
    pub fn load(runtime: &Arc<Runtime>, path: &Path, compute: Compute, weights: bool) -> Result<Self, EngineError> {
        take_log();
        let lib = &runtime.lib;
        let c = c_path(path)?;
        // SAFETY: parameters are the library's defaults; the path outlives the call.
        let ptr = unsafe {
            let mut params = lib.llama_model_default_params();
            params.n_gpu_layers = compute.gpu_layers;
            params.no_alloc = !weights;
            if !weights {
                params.load_mode = sys::LLAMA_LOAD_MODE_NONE;
            }
            lib.llama_model_load_from_file(c.as_ptr(), params)
        };
        let ptr = NonNull::new(ptr).ok_or_else(|| EngineError::Model { path: path.into(), log: take_log() })?;
        Ok(Self { runtime: runtime.clone(), path: path.into(), ptr })
    }

    fn vocab(&self) -> *const sys::llama_vocab {
        // SAFETY: the model is loaded; the vocabulary lives as long.
        unsafe { self.runtime.lib.llama_model_get_vocab(self.ptr.as_ptr()) }
    }

    /// Number of tokens of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        // SAFETY: as above.
        unsafe { self.runtime.lib.llama_vocab_n_tokens(self.vocab()) }.max(0) as usize
    }

    /// Values of one embedding that the model takes.
    pub fn embedding_width(&self) -> usize {
        // SAFETY: the model is loaded.
        unsafe { self.runtime.lib.llama_model_n_embd_inp(self.ptr.as_ptr()) }.max(0) as usize
    }

    /// Tokens the model was trained for.
    pub fn context_length(&self) -> usize {
        // SAFETY: the model is loaded.
        unsafe { self.runtime.lib.llama_model_n_ctx_train(self.ptr.as_ptr()) }.max(0) as usize
    }

    /// The model's chat template, if it has one.
    pub fn template(&self) -> Option<Template> {
        let lib = &self.runtime.lib;
        // SAFETY: the model is loaded, strings live as long as it does, ids are the vocabulary's own.
        unsafe {
            let source = lib.llama_model_chat_template(self.ptr.as_ptr(), ptr::null());
            if source.is_null() {
                return None;
            }
            let text = |token: Token| {
                if token < 0 { String::new() } else { self.piece(token) }
            };
            Some(Template {
                source: CStr::from_ptr(source).to_string_lossy().into_owned(),
                bos: text(lib.llama_vocab_bos(self.vocab())),
                eos: text(lib.llama_vocab_eos(self.vocab())),
                adds_bos: lib.llama_vocab_get_add_bos(self.vocab()),
            })
        }
    }

    /// The token after a turn: end-of-turn where the vocabulary has one, else end-of-text.
    pub fn end_of_turn(&self) -> Option<Token> {
        let lib = &self.runtime.lib;
        // SAFETY: the vocabulary lives.
        let (eot, eos) = unsafe { (lib.llama_vocab_eot(self.vocab()), lib.llama_vocab_eos(self.vocab())) };
        [eot, eos].into_iter().find(|t| *t >= 0)
    }

    /// Whether a token ends a generation.
    pub fn ends(&self, token: Token) -> bool {
        // SAFETY: the vocabulary lives; any id may be asked for.
        token >= 0 && unsafe { self.runtime.lib.llama_vocab_is_eog(self.vocab(), token) }
    }

    /// Text to tokens. `special` reads the names of special tokens in the text as those tokens; `first` puts in
    /// front what the vocabulary wants there.
    ///
    /// # Errors
    /// A text of more than 2^31 bytes or tokens.
    pub fn tokenize(&self, text: &str, first: bool, special: bool) -> Result<Vec<Token>, EngineError> {
        let fail = || EngineError::Call { what: "a text is too long for the tokenizer", log: take_log() };
        let len = i32::try_from(text.len()).map_err(|_| fail())?;
        let mut tokens = vec![0; text.len() + 8];
        let room = i32::try_from(tokens.len()).map_err(|_| fail())?;
        // SAFETY: text and buffer have the lengths given.
        let n = unsafe {
            let (from, to) = (text.as_ptr().cast(), tokens.as_mut_ptr());
            self.runtime.lib.llama_tokenize(self.vocab(), from, len, to, room, first, special)
        };
        tokens.truncate(usize::try_from(n).map_err(|_| fail())?);
        Ok(tokens)
    }

    fn piece_bytes(&self, token: Token, out: &mut Vec<u8>) {
        let mut buffer = vec![0u8; 64];
        loop {
            let room = buffer.len() as i32;
            // SAFETY: the buffer has the length given.
            let n = unsafe {
                let to = buffer.as_mut_ptr().cast();
                self.runtime.lib.llama_token_to_piece(self.vocab(), token, to, room, 0, true)
            };
            if n >= 0 {
                out.extend(&buffer[..n as usize]);
                return;
            }
            buffer.resize(n.unsigned_abs() as usize, 0);
        }
    }

    fn piece(&self, token: Token) -> String {
        self.text(&[token])
    }

    /// Tokens to text, special ones by their names.
    pub fn text(&self, tokens: &[Token]) -> String {
        let mut bytes = Vec::new();
        for token in tokens {
            self.piece_bytes(*token, &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// A part of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Piece {
    Text(Vec<Token>),
    Media(Media),
}

/// A picture (or a part of one) behind the projector.
#[derive(Debug, Clone, PartialEq)]
pub struct Media {
    /// The runtime's own description: number and positions of tokens.
    pub layout: Vec<u8>,
    pub tokens: usize,
    /// `tokens` rows of the model's embedding width.
    pub embedding: Vec<f32>,
}

/// Tokeniser and projector, for the prompts of all models with that vocabulary and width.
pub struct Vision {
    /// Outlives the context below, which points into it.
    model: Model,
    ptr: NonNull<sys::mtmd_context>,
}

impl Drop for Vision {
    fn drop(&mut self) {
        // SAFETY: owned, and freed once, before the model it points into.
        unsafe { self.model.runtime.lib.mtmd_free(self.ptr.as_ptr()) }
    }
}

impl Vision {
    /// Loads projector `path` for `model`, whose weights are not needed.
    ///
    /// # Errors
    /// A file that is no projector, or one for another width.
    pub fn load(model: Model, path: &Path, compute: Compute) -> Result<Self, EngineError> {
        take_log();
        let lib = &model.runtime.lib;
        let c = c_path(path)?;
        // SAFETY: defaults; path and model outlive the call, and the model lives in the result.
        let ptr = unsafe {
            let mut params = lib.mtmd_context_params_default();
            params.use_gpu = compute.gpu_layers != 0;
            params.n_threads = compute.threads;
            if compute.exact {
                params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
            }
            params.print_timings = false;
            params.warmup = false;
            lib.mtmd_init_from_file(c.as_ptr(), model.ptr.as_ptr(), params)
        };
        let fail = || EngineError::Projector { path: path.into(), model: model.path.clone(), log: take_log() };
        let ptr = NonNull::new(ptr).ok_or_else(fail)?;
        // SAFETY: loaded.
        if !unsafe { lib.mtmd_support_vision(ptr.as_ptr()) } {
            let error = EngineError::Projector {
                path: path.into(),
                model: model.path.clone(),
                log: "it has no vision encoder".into(),
            };
            // SAFETY: owned, and not used after.
            unsafe { lib.mtmd_free(ptr.as_ptr()) };
            return Err(error);
        }
        Ok(Self { model, ptr })
    }

    /// The model it was loaded with.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tokenises a prompt that holds one media marker; with `embed` also embeds the picture (`bytes`, an image file)
    /// there, otherwise its embedding is left empty.
    ///
    /// # Errors
    /// A picture the runtime cannot decode or encode.
    pub fn pieces(&self, prompt: &str, picture: &Path, bytes: &[u8], embed: bool) -> Result<Vec<Piece>, EngineError> {
        take_log();
        let lib = &self.model.runtime.lib;
        let unreadable = || EngineError::Picture { path: picture.into(), log: take_log() };
        // SAFETY: buffers outlive the calls; bitmap and chunks are freed by their guards; chunk pointers are used
        // only while the chunk list lives; the embedding has n_embd_inp * n_tokens values (mtmd.h).
        unsafe {
            let options = lib.mtmd_helper_init_opt_default();
            let wrapper =
                lib.mtmd_helper_bitmap_init_from_buf(self.ptr.as_ptr(), bytes.as_ptr(), bytes.len(), false, options);
            let bitmap = NonNull::new(wrapper.bitmap).ok_or_else(unreadable)?;
            let bitmap = Guard(bitmap, |p| lib.mtmd_bitmap_free(p));
            let chunks = lib.mtmd_input_chunks_init();
            let chunks = Guard(NonNull::new(chunks).ok_or_else(unreadable)?, |p| lib.mtmd_input_chunks_free(p));
            let text = sys::mtmd_input_text {
                text: prompt.as_ptr().cast(),
                text_len: prompt.len(),
                add_special: true,
                parse_special: true,
            };
            let mut bitmaps = [bitmap.0.as_ptr().cast_const()];
            if lib.mtmd_tokenize(self.ptr.as_ptr(), chunks.0.as_ptr(), &text, bitmaps.as_mut_ptr(), 1) != 0 {
                return Err(unreadable());
            }
            let count = lib.mtmd_input_chunks_size(chunks.0.as_ptr());
            (0..count)
                .map(|i| self.piece(lib.mtmd_input_chunks_get(chunks.0.as_ptr(), i), embed, &unreadable))
                .collect()
        }
    }

    /// # Safety
    /// `chunk` must live.
    unsafe fn piece(
        &self,
        chunk: *const sys::mtmd_input_chunk,
        embed: bool,
        unreadable: &dyn Fn() -> EngineError,
    ) -> Result<Piece, EngineError> {
        let lib = &self.model.runtime.lib;
        // SAFETY: the caller keeps the chunk; sizes are those the library gives.
        unsafe {
            if lib.mtmd_input_chunk_get_type(chunk) == sys::MTMD_INPUT_CHUNK_TYPE_TEXT {
                let mut n = 0;
                let tokens = lib.mtmd_input_chunk_get_tokens_text(chunk, &mut n);
                let tokens = if n == 0 { Vec::new() } else { std::slice::from_raw_parts(tokens, n).to_vec() };
                return Ok(Piece::Text(tokens));
            }
            let mut size = 0;
            if lib.mtmd_input_chunk_save(chunk, ptr::null_mut(), 0, &mut size) != 0 {
                return Err(unreadable());
            }
            let mut layout = vec![0u8; size];
            if lib.mtmd_input_chunk_save(chunk, layout.as_mut_ptr().cast(), size, &mut size) != 0 {
                return Err(unreadable());
            }
            let tokens = lib.mtmd_input_chunk_get_n_tokens(chunk);
            if !embed {
                return Ok(Piece::Media(Media { layout, tokens, embedding: Vec::new() }));
            }
            if lib.mtmd_encode_chunk(self.ptr.as_ptr(), chunk) != 0 {
                return Err(unreadable());
            }
            let values = lib.mtmd_get_output_embd(self.ptr.as_ptr());
            if values.is_null() {
                return Err(unreadable());
            }
            let embedding = std::slice::from_raw_parts(values, tokens * self.model.embedding_width()).to_vec();
            Ok(Piece::Media(Media { layout, tokens, embedding }))
        }
    }
}

/// Frees a library object when it goes out of scope.
struct Guard<T, F: Fn(*mut T)>(NonNull<T>, F);

impl<T, F: Fn(*mut T)> Drop for Guard<T, F> {
    fn drop(&mut self) {
        (self.1)(self.0.as_ptr());
    }
}

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
                        .map(|(k, t)| Entry {
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
                entries.push(Entry { token: *token, position: past + k as i32, sequence, output: true });
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
                    .map(|k| Entry {
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
            let next = super::stats::argmax(&logits) as Token;
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
        let mut token = super::stats::argmax(&self.first) as Token;
        let start = Instant::now();
        for k in 0..count {
            let entry = Entry { token, position: self.past() + k as i32, sequence: GENERATION, output: true };
            self.decode(&[entry], |_, row| token = super::stats::argmax(row) as Token)?;
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
    fn decode(&mut self, entries: &[Entry], mut row: impl FnMut(usize, &[f32])) -> Result<(), EngineError> {
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

struct Entry {
    token: Token,
    position: i32,
    sequence: i32,
    output: bool,
}
