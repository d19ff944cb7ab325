//! A prompt as a slot's cache holds it: tokens, and pictures (or parts of one) as wholes.
use super::error::ApiError;
use super::job::Job;
use crate::runtime::engine::{Chunks, EngineError, Media, Model, Piece, Token, Vision};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// A token, or a picture's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Token(Token),
    Picture {
        key: PartKey,
        /// That it takes.
        tokens: usize,
    },
}

impl Unit {
    /// Tokens that it takes of the context.
    pub fn tokens(&self) -> usize {
        match self {
            Unit::Token(_) => 1,
            Unit::Picture { tokens, .. } => *tokens,
        }
    }
}

/// A picture's part: which file, prepared in which way, which of its tiles.
pub type PartKey = [u8; 32];

/// A tokenised prompt, its pictures not yet embedded.
pub struct Prompt<'v> {
    pub units: Vec<Unit>,
    /// Of each unit that is a picture the place in `chunks`.
    places: HashMap<usize, usize>,
    /// Units that were embedded together with one before them, until it is their turn.
    ahead: HashMap<usize, Arc<Media>>,
    chunks: Option<Chunks<'v>>,
}

impl<'v> Prompt<'v> {
    /// Takes the pictures out of the job.
    ///
    /// # Errors
    /// A picture that the runtime cannot use.
    pub fn new(job: &mut Job, model: &Model, vision: Option<&'v Vision>) -> Result<Self, EngineError> {
        let pictures = std::mem::take(&mut job.pictures);
        let vision = match vision {
            Some(vision) if !pictures.is_empty() => vision,
            _ => {
                let units = model.tokenize(&job.prompt, true, true)?.into_iter().map(Unit::Token).collect();
                return Ok(Prompt { units, places: HashMap::new(), ahead: HashMap::new(), chunks: None });
            }
        };
        let (ids, pixels): (Vec<_>, Vec<_>) = pictures.into_iter().map(|p| (p.id, p.pixels)).unzip();
        let chunks = vision.tokenize_with_ids(&job.prompt, Path::new("of the request"), &pixels, &ids)?;
        drop(pixels);
        let (mut units, mut places) = (Vec::new(), HashMap::new());
        let ids = chunks.picture_ids();
        let mut seen: HashMap<&[u8], u64> = HashMap::new();
        for (place, piece) in chunks.pieces(false)?.into_iter().enumerate() {
            match piece {
                Piece::Text(tokens) => units.extend(tokens.into_iter().map(Unit::Token)),
                Piece::Media(media) => {
                    let id = ids[place].as_slice();
                    let nth = seen.entry(id).or_default();
                    let parts = ids.iter().filter(|other| *other == id).count();
                    places.insert(units.len(), place);
                    units.push(Unit::Picture { key: part_key(&media, *nth, parts), tokens: media.tokens });
                    *nth += 1;
                }
            }
        }
        Ok(Prompt { units, places, ahead: HashMap::new(), chunks: Some(chunks) })
    }

    /// Tokens that it takes of the context.
    pub fn tokens(&self) -> usize {
        self.units.iter().map(Unit::tokens).sum()
    }

    /// The picture that the unit at `index` is, embedded, together with those right behind it that are not `kept` if the
    /// runtime takes them together.
    ///
    /// # Errors
    /// The runtime cannot encode it.
    pub fn embed(&mut self, index: usize, kept: impl Fn(&PartKey) -> bool) -> Result<Arc<Media>, ApiError> {
        if let Some(media) = self.ahead.remove(&index) {
            return Ok(media);
        }
        let lost = || ApiError::internal("a picture of the prompt is lost");
        let chunks = self.chunks.as_ref().ok_or_else(lost)?;
        let missing = |unit: &Unit| matches!(unit, Unit::Picture { key, .. } if !kept(key));
        let behind = self.units.iter().skip(index + 1).take_while(|unit| missing(unit)).count();
        let run = index..index + 1 + behind;
        let places: Vec<usize> = run.clone().filter_map(|unit| self.places.get(&unit).copied()).collect();
        let embedded = chunks.embedded(&places).map_err(|error| ApiError::internal(error.to_string()))?;
        self.ahead.extend(run.zip(embedded));
        self.ahead.remove(&index).ok_or_else(lost)
    }
}

/// The runtime's description names the picture and how it was prepared; which of several parts it is, `nth` tells, and
/// `parts`, since the same picture may be cut otherwise beside others.
fn part_key(media: &Media, nth: u64, parts: usize) -> PartKey {
    let mut hash = Sha256::new();
    hash.update(nth.to_le_bytes());
    hash.update((parts as u64).to_le_bytes());
    hash.update(&media.layout);
    hash.finalize().into()
}

/// Embedded pictures, up to a number of bytes; the one that was not used for longest goes first.
pub struct PictureCache {
    limit: usize,
    bytes: usize,
    clock: u64,
    parts: HashMap<PartKey, (Arc<Media>, u64)>,
}

impl PictureCache {
    pub fn new(limit: usize) -> Self {
        PictureCache { limit, bytes: 0, clock: 0, parts: HashMap::new() }
    }

    pub fn get(&mut self, key: &PartKey) -> Option<Arc<Media>> {
        self.clock += 1;
        let (media, used) = self.parts.get_mut(key)?;
        *used = self.clock;
        Some(media.clone())
    }

    pub fn has(&self, key: &PartKey) -> bool {
        self.parts.contains_key(key)
    }

    /// Keeps `media`, unless it alone is more than the cache may hold.
    pub fn put(&mut self, key: PartKey, media: Arc<Media>) {
        let bytes = size(&media);
        if bytes > self.limit || self.parts.contains_key(&key) {
            return;
        }
        while self.bytes + bytes > self.limit
            && let Some(oldest) = self.parts.iter().min_by_key(|(_, (_, used))| *used).map(|(key, _)| *key)
            && let Some((gone, _)) = self.parts.remove(&oldest)
        {
            self.bytes -= size(&gone);
        }
        self.clock += 1;
        self.bytes += bytes;
        self.parts.insert(key, (media, self.clock));
    }
}

fn size(media: &Media) -> usize {
    media.embedding.len() * size_of::<f32>() + media.layout.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn media(values: usize) -> Arc<Media> {
        Arc::new(Media { layout: vec![], tokens: 1, embedding: vec![0.0; values] })
    }

    #[test]
    fn the_cache_keeps_what_was_used_last() {
        let mut cache = PictureCache::new(40);
        let key = |n: u8| [n; 32];
        cache.put(key(1), media(5));
        cache.put(key(2), media(5));
        assert!(cache.get(&key(1)).is_some());
        cache.put(key(3), media(4));
        assert!(cache.get(&key(2)).is_none() && cache.get(&key(1)).is_some() && cache.get(&key(3)).is_some());
        assert_eq!(cache.bytes, 36);
        cache.put(key(4), media(11));
        assert!(cache.get(&key(4)).is_none() && cache.get(&key(1)).is_some(), "too large: nothing gives way");
        cache.put(key(5), media(10));
        assert_eq!((cache.bytes, cache.parts.len()), (40, 1));
    }

    #[test]
    fn parts_of_a_picture_have_keys_of_their_own() {
        let tile = Media { layout: vec![1, 2], tokens: 1, embedding: vec![] };
        let other = Media { layout: vec![1, 3], ..tile.clone() };
        let keys = [part_key(&tile, 0, 2), part_key(&tile, 1, 2), part_key(&tile, 0, 1), part_key(&other, 0, 2)];
        for (i, key) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(key));
        }
        assert_eq!(keys[0], part_key(&tile, 0, 2));
    }
}
