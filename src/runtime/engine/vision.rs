//! The projector: pictures to embeddings, prompts with pictures to pieces.

use std::path::Path;
use std::ptr::{self, NonNull};

use super::{Compute, EngineError, Model, Token, c_path, take_log};
use crate::runtime::sys;

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
    pub(super) ptr: NonNull<sys::mtmd_context>,
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
pub(super) struct Guard<T, F: Fn(*mut T)>(pub(super) NonNull<T>, pub(super) F);

impl<T, F: Fn(*mut T)> Drop for Guard<T, F> {
    fn drop(&mut self) {
        (self.1)(self.0.as_ptr());
    }
}
