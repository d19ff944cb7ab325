//! A text model: its vocabulary, its chat template, its shape.

use std::ffi::CStr;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::{Compute, EngineError, Runtime, Token, c_path, check, take_log};
use crate::prompt::gguf::MARK;
use crate::prompt::{ChatTemplate, Context, PromptError};
use crate::runtime::sys;

/// A loaded text model, or only its header and vocabulary.
pub struct Model {
    pub(super) runtime: Arc<Runtime>,
    pub(super) path: PathBuf,
    pub(super) ptr: NonNull<sys::llama_model>,
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
    /// What the runtime would not survive ([`assumed`](crate::runtime::assumed)) or refuses, with its own words.
    pub fn load(runtime: &Arc<Runtime>, path: &Path, compute: Compute, weights: bool) -> Result<Self, EngineError> {
        check(path)?;
        take_log();
        let lib = &runtime.lib;
        let c = c_path(path)?;
        let mut devices = [runtime.chosen_device(), ptr::null_mut()];
        // SAFETY: parameters are the library's defaults; the path and the list of devices outlive the call.
        let ptr = unsafe {
            let mut params = lib.llama_model_default_params();
            params.n_gpu_layers = compute.gpu_layers;
            if runtime.device.is_some() {
                params.devices = devices.as_mut_ptr();
            }
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

    /// The model's chat template, if it has one, as llama.cpp applies it: contents are strings where it takes them.
    pub fn template(&self) -> Option<Result<ChatTemplate, PromptError>> {
        let lib = &self.runtime.lib;
        // SAFETY: the model is loaded, strings live as long as it does, ids are the vocabulary's own.
        let (source, bos, eos, adds_bos) = unsafe {
            let source = lib.llama_model_chat_template(self.ptr.as_ptr(), ptr::null());
            if source.is_null() {
                return None;
            }
            let vocab = self.vocab();
            let source = CStr::from_ptr(source).to_string_lossy().into_owned();
            (source, lib.llama_vocab_bos(vocab), lib.llama_vocab_eos(vocab), lib.llama_vocab_get_add_bos(vocab))
        };
        let text = |token: Token| if token < 0 { String::new() } else { self.piece(token) };
        let variables =
            [("bos_token", text(bos).into()), ("eos_token", text(eos).into()), ("enable_thinking", true.into())]
                .map(|(name, value): (_, serde_json::Value)| (name.to_string(), value));
        let variables = variables.into_iter().collect();
        let context = Context { variables, adds_bos, strings: true, image: MARK.into(), behind_image: String::new() };
        Some(ChatTemplate::new(source, context))
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

    /// Whether a token is no text, but a mark of the vocabulary's.
    pub fn is_special(&self, token: Token) -> bool {
        self.words(token).is_empty() && !self.bytes(token).is_empty()
    }

    /// What a token spells; one that is no text by its name if `special`, or else as nothing.
    fn piece_bytes(&self, token: Token, special: bool, out: &mut Vec<u8>) {
        let mut buffer = vec![0u8; 64];
        loop {
            let room = buffer.len() as i32;
            // SAFETY: the buffer has the length given.
            let n = unsafe {
                let to = buffer.as_mut_ptr().cast();
                self.runtime.lib.llama_token_to_piece(self.vocab(), token, to, room, 0, special)
            };
            if n >= 0 {
                out.extend(&buffer[..n as usize]);
                return;
            }
            buffer.resize(n.unsigned_abs() as usize, 0);
        }
    }

    /// What a token spells in an answer, a special one nothing.
    pub fn words(&self, token: Token) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.piece_bytes(token, false, &mut bytes);
        bytes
    }

    /// What a token spells, a special one its name.
    pub fn bytes(&self, token: Token) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.piece_bytes(token, true, &mut bytes);
        bytes
    }

    fn piece(&self, token: Token) -> String {
        self.text(&[token])
    }

    /// Tokens to text, special ones by their names.
    pub fn text(&self, tokens: &[Token]) -> String {
        let mut bytes = Vec::new();
        for token in tokens {
            self.piece_bytes(*token, true, &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
