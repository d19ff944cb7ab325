//! The projector: pictures to embeddings, prompts with pictures to pieces.

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::{Compute, EngineError, Model, Token, c_path, check, take_log};
use crate::image::Rgb;
use crate::runtime::sys;

/// A part of a prompt.
#[derive(Debug, Clone)]
pub enum Piece {
    Text(Vec<Token>),
    Media(Arc<Media>),
}

impl PartialEq for Piece {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Piece::Text(a), Piece::Text(b)) => a == b,
            // A picture's embedding may have 100 MB.
            (Piece::Media(a), Piece::Media(b)) => Arc::ptr_eq(a, b) || a == b,
            _ => false,
        }
    }
}

impl Piece {
    pub fn tokens(&self) -> usize {
        match self {
            Piece::Text(tokens) => tokens.len(),
            Piece::Media(media) => media.tokens,
        }
    }
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
        check(path)?;
        take_log();
        let lib = &model.runtime.lib;
        let c = c_path(path)?;
        // SAFETY: defaults; path and model outlive the call, and the model lives in the result.
        let ptr = unsafe {
            let mut params = lib.mtmd_context_params_default();
            params.use_gpu = compute.gpu_layers != 0;
            params.device = model.runtime.chosen_device();
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

    /// Tokenises a prompt that holds a media marker for each of `pictures`. `path` names the pictures in messages.
    ///
    /// # Errors
    /// A picture that the runtime cannot use, or other pictures than the prompt has markers.
    pub fn tokenize(&self, prompt: &str, path: &Path, pictures: &[Rgb]) -> Result<Chunks<'_>, EngineError> {
        self.tokenize_with_ids(prompt, path, pictures, &[])
    }

    /// As [`Self::tokenize`], with an id for each of `pictures`: the parts of the prompt that a picture becomes carry it
    /// ([`Chunks::picture_ids`], [`Media::layout`]).
    ///
    /// # Errors
    /// As [`Self::tokenize`].
    pub fn tokenize_with_ids(
        &self,
        prompt: &str,
        path: &Path,
        pictures: &[Rgb],
        ids: &[CString],
    ) -> Result<Chunks<'_>, EngineError> {
        take_log();
        let lib = &self.model.runtime.lib;
        let unreadable = || EngineError::Picture { path: path.into(), log: take_log() };
        let bitmap = |picture: &Rgb| {
            let (width, height) = (u32::try_from(picture.width).ok()?, u32::try_from(picture.height).ok()?);
            if picture.data.len() != picture.width * picture.height * 3 {
                return None;
            }
            // SAFETY: the bitmap copies width * height * 3 bytes, which are there.
            let bitmap = unsafe { lib.mtmd_bitmap_init(width, height, picture.data.as_ptr()) };
            // SAFETY: owned by the guard.
            Some(Guard(NonNull::new(bitmap)?, |p| unsafe { lib.mtmd_bitmap_free(p) }))
        };
        let bitmaps: Vec<_> = pictures.iter().map(bitmap).collect::<Option<_>>().ok_or_else(unreadable)?;
        for (bitmap, id) in bitmaps.iter().zip(ids) {
            // SAFETY: both live; the library copies the id.
            unsafe { lib.mtmd_bitmap_set_id(bitmap.0.as_ptr(), id.as_ptr()) };
        }
        let mut bitmaps_c: Vec<_> = bitmaps.iter().map(|b| b.0.as_ptr().cast_const()).collect();
        // SAFETY: buffers and bitmaps outlive the calls; the chunks are freed when `Chunks` is dropped.
        unsafe {
            let chunks = NonNull::new(lib.mtmd_input_chunks_init()).ok_or_else(unreadable)?;
            let chunks = Chunks { vision: self, ptr: chunks, path: path.into() };
            let text = sys::mtmd_input_text {
                text: prompt.as_ptr().cast(),
                text_len: prompt.len(),
                add_special: true,
                parse_special: true,
            };
            let (list, count) = (bitmaps_c.as_mut_ptr(), bitmaps_c.len());
            if lib.mtmd_tokenize(self.ptr.as_ptr(), chunks.ptr.as_ptr(), &text, list, count) != 0 {
                return Err(unreadable());
            }
            Ok(chunks)
        }
    }
}

/// A tokenised prompt, its pictures not yet embedded.
pub struct Chunks<'v> {
    vision: &'v Vision,
    ptr: NonNull<sys::mtmd_input_chunks>,
    /// Of its pictures, for messages.
    path: PathBuf,
}

impl Drop for Chunks<'_> {
    fn drop(&mut self) {
        // SAFETY: owned, and freed once.
        unsafe { self.vision.model.runtime.lib.mtmd_input_chunks_free(self.ptr.as_ptr()) }
    }
}

impl Chunks<'_> {
    fn all(&self) -> impl Iterator<Item = *const sys::mtmd_input_chunk> + '_ {
        let lib = &self.vision.model.runtime.lib;
        // SAFETY: the list lives, indices are below its size.
        let n = unsafe { lib.mtmd_input_chunks_size(self.ptr.as_ptr()) };
        // SAFETY: as above.
        (0..n).map(|i| unsafe { lib.mtmd_input_chunks_get(self.ptr.as_ptr(), i) })
    }

    fn is_text(&self, chunk: *const sys::mtmd_input_chunk) -> bool {
        // SAFETY: the chunk lives as long as the list.
        unsafe { self.vision.model.runtime.lib.mtmd_input_chunk_get_type(chunk) == sys::MTMD_INPUT_CHUNK_TYPE_TEXT }
    }

    /// Tokens of the text, and of the pictures.
    pub fn tokens(&self) -> [usize; 2] {
        let mut tokens = [0; 2];
        for chunk in self.all() {
            // SAFETY: as above.
            let n = unsafe { self.vision.model.runtime.lib.mtmd_input_chunk_get_n_tokens(chunk) };
            tokens[usize::from(!self.is_text(chunk))] += n;
        }
        tokens
    }

    /// The parts in order; with `embed` pictures are embedded, otherwise their embeddings are left empty.
    ///
    /// # Errors
    /// A picture the runtime cannot encode.
    pub fn pieces(&self, embed: bool) -> Result<Vec<Piece>, EngineError> {
        // SAFETY: the chunks live as long as the list.
        let mut pieces = self.all().map(|chunk| unsafe { self.piece(chunk) }).collect::<Result<Vec<_>, _>>()?;
        let is_picture = |&i: &usize| embed && matches!(pieces[i], Piece::Media(_));
        let pictures: Vec<usize> = (0..pieces.len()).filter(is_picture).collect();
        let mut rest = pictures.as_slice();
        while !rest.is_empty() {
            let embedded = self.embedded(rest)?;
            let (done, later) = rest.split_at(embedded.len());
            done.iter().zip(embedded).for_each(|(&place, media)| pieces[place] = Piece::Media(media));
            rest = later;
        }
        Ok(pieces)
    }

    /// The pictures at the first of `places` of [`Self::pieces`], embedded: as many as the runtime takes together, at least
    /// one.
    ///
    /// # Errors
    /// A picture the runtime cannot encode; there is none at the first place.
    pub fn embedded(&self, places: &[usize]) -> Result<Vec<Arc<Media>>, EngineError> {
        let Vision { model, ptr } = self.vision;
        let lib = &model.runtime.lib;
        let unreadable = || EngineError::Picture { path: self.path.clone(), log: take_log() };
        let all: Vec<_> = self.all().collect();
        let chunks: Vec<_> = places.iter().filter_map(|&place| all.get(place).copied()).collect();
        // SAFETY: the chunks live as long as the list, the batch as long as its guard; the embedding of a chunk in it has
        // n_embd_inp * n_tokens values (mtmd.h).
        unsafe {
            let batch = NonNull::new(lib.mtmd_batch_init(ptr.as_ptr())).ok_or_else(unreadable)?;
            let _freed = Guard(batch, |batch| lib.mtmd_batch_free(batch));
            let batch = batch.as_ptr();
            let taken = chunks.iter().take_while(|&&chunk| lib.mtmd_batch_add_chunk(batch, chunk) == 0).count();
            if taken == 0 || lib.mtmd_batch_encode(batch) != 0 {
                return Err(unreadable());
            }
            let media = |&chunk| {
                let values = lib.mtmd_batch_get_output_embd(batch, chunk);
                if values.is_null() {
                    return Err(unreadable());
                }
                let mut media = self.media(chunk)?;
                media.embedding = std::slice::from_raw_parts(values, media.tokens * model.embedding_width()).to_vec();
                Ok(Arc::new(media))
            };
            chunks[..taken].iter().map(media).collect()
        }
    }

    /// For each part the id of its picture, empty for text.
    pub fn picture_ids(&self) -> Vec<Vec<u8>> {
        let lib = &self.vision.model.runtime.lib;
        let id = |chunk| {
            // SAFETY: the chunk lives as long as the list, and its id as long as the chunk.
            unsafe {
                let id = lib.mtmd_input_chunk_get_id(chunk);
                if id.is_null() { Vec::new() } else { CStr::from_ptr(id).to_bytes().to_vec() }
            }
        };
        self.all().map(id).collect()
    }

    /// # Safety
    /// `chunk` must live.
    unsafe fn piece(&self, chunk: *const sys::mtmd_input_chunk) -> Result<Piece, EngineError> {
        let lib = &self.vision.model.runtime.lib;
        if !self.is_text(chunk) {
            // SAFETY: the caller keeps the chunk.
            return Ok(Piece::Media(Arc::new(unsafe { self.media(chunk) }?)));
        }
        let mut n = 0;
        // SAFETY: the caller keeps the chunk; the size is the one the library gives.
        let tokens = unsafe {
            let tokens = lib.mtmd_input_chunk_get_tokens_text(chunk, &mut n);
            if n == 0 { Vec::new() } else { std::slice::from_raw_parts(tokens, n).to_vec() }
        };
        Ok(Piece::Text(tokens))
    }

    /// A picture's part, not embedded.
    ///
    /// # Safety
    /// `chunk` must live, and not be text.
    unsafe fn media(&self, chunk: *const sys::mtmd_input_chunk) -> Result<Media, EngineError> {
        let lib = &self.vision.model.runtime.lib;
        let unreadable = || EngineError::Picture { path: self.path.clone(), log: take_log() };
        // SAFETY: the caller keeps the chunk; the size is the one the library gives.
        unsafe {
            let mut size = 0;
            if lib.mtmd_input_chunk_save(chunk, ptr::null_mut(), 0, &mut size) != 0 {
                return Err(unreadable());
            }
            let mut layout = vec![0u8; size];
            if lib.mtmd_input_chunk_save(chunk, layout.as_mut_ptr().cast(), size, &mut size) != 0 {
                return Err(unreadable());
            }
            Ok(Media { layout, tokens: lib.mtmd_input_chunk_get_n_tokens(chunk), embedding: Vec::new() })
        }
    }

    /// Where each picture's tokens stand, in the order of the pieces that are pictures.
    pub fn places(&self) -> Vec<Place> {
        let Vision { model, ptr } = self.vision;
        let lib = &model.runtime.lib;
        let mut places = Vec::new();
        let mut past = 0;
        for chunk in self.all() {
            // SAFETY: the chunk lives as long as the list; the positions have a place for each of its tokens.
            unsafe {
                if !self.is_text(chunk) {
                    let both_ways = lib.mtmd_decode_use_non_causal(ptr.as_ptr(), chunk);
                    let mut place = Place { both_ways, positions: Vec::new(), next: 0 };
                    let image = lib.mtmd_input_chunk_get_tokens_image(chunk);
                    if lib.mtmd_decode_use_mrope(ptr.as_ptr()) && !image.is_null() {
                        let none = sys::mtmd_decoder_pos { t: 0, x: 0, y: 0, z: 0 };
                        let mut all = vec![none; lib.mtmd_input_chunk_get_n_tokens(chunk)];
                        lib.mtmd_helper_image_get_decoder_pos(image, past, all.as_mut_ptr());
                        place.positions = all.iter().map(|p| [p.t, p.y, p.x, p.z]).collect();
                    }
                    place.next = (past + lib.mtmd_input_chunk_get_n_pos(chunk)) as u32;
                    places.push(place);
                }
                past += lib.mtmd_input_chunk_get_n_pos(chunk);
            }
        }
        places
    }
}

/// Where a picture's tokens stand in a prompt that begins at position 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its tokens see one another in both directions.
    pub both_ways: bool,
    /// Of each token: time, height, width and another, where the model has several positions a token (M-RoPE).
    pub positions: Vec<[u32; 4]>,
    /// The position of the token behind it.
    pub next: u32,
}

/// Frees a library object when it goes out of scope.
pub(super) struct Guard<T, F: Fn(*mut T)>(pub(super) NonNull<T>, pub(super) F);

impl<T, F: Fn(*mut T)> Drop for Guard<T, F> {
    fn drop(&mut self) {
        (self.1)(self.0.as_ptr());
    }
}
