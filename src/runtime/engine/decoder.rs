//! A text model at work: prompts into its cache, logits out of it.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::{BatchEntry, Compute, EngineError, Model, Piece, Runtime, Sequences, Token, Vision, take_log};
use crate::eval::stats;

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

/// A prompt and how many tokens its answer may have.
pub type Asked = (Vec<Piece>, usize);

/// One text model at work.
pub struct Decoder<'v> {
    sequences: Sequences,
    /// How many sequences there are, and cells for all of them.
    count: u32,
    cells: usize,
    vision: Option<&'v Vision>,
    /// What the prompt sequence holds: each piece and the position behind it.
    held: Vec<(Piece, i32)>,
    /// Logits behind the prompt.
    first: Vec<f32>,
    pub times: Times,
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
        Self::load_for(1, runtime, path, compute, context, vision)
    }

    /// As [`Self::load`], for up to `answers` at once ([`Self::answer`]).
    ///
    /// # Errors
    /// As there.
    pub fn load_for(
        answers: usize,
        runtime: &Arc<Runtime>,
        path: &Path,
        compute: Compute,
        context: usize,
        vision: Option<&'v Vision>,
    ) -> Result<Self, EngineError> {
        let start = Instant::now();
        let model = Model::load(runtime, path, compute, true)?;
        let count = SEQUENCES.max(answers as u32 + 1);
        let sequences = Sequences::shared(model, compute, context, count)?;
        let times = Times { load: start.elapsed().as_secs_f64(), ..Times::default() };
        Ok(Self { sequences, count, cells: context, vision, held: Vec::new(), first: Vec::new(), times })
    }

    pub fn model(&self) -> &Model {
        self.sequences.model()
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
        (1..self.count as i32).for_each(|s| {
            self.sequences.cut(s, 0);
        });
        if past == 0 || !self.sequences.cut(PROMPT, past) {
            self.sequences.clear();
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
                    self.sequences.decode(&entries, |_, logits| first = logits.to_vec())?;
                    if last {
                        self.first = first;
                    }
                    past += tokens.len() as i32;
                    self.times.prefill_tokens += tokens.len() as u64;
                }
                Piece::Media(media) => {
                    past = self.sequences.decode_media(self.vision, media, past, PROMPT)?;
                    self.times.prefill_tokens += media.tokens as u64;
                }
            }
            self.held.push((piece.clone(), past));
        }
        self.times.prefill += start.elapsed().as_secs_f64();
        Ok(())
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
        self.sequences.decode(&entries, |i, logits| row(places[i].0, places[i].1, logits))?;
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
                self.sequences.decode(&entries, |_, row| logits.copy_from_slice(row))?;
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
            if self.model().ends(next) {
                return Ok(tokens);
            }
            if tokens.len() >= limit {
                return Ok(tokens);
            }
        }
    }

    /// Answers prompts greedily, each with up to its limit of tokens or one that ends the turn, which is part of the
    /// answer. Those that differ in their last text alone are answered side by side: then all read the weights once a token.
    ///
    /// # Errors
    /// The runtime fails to decode.
    pub fn answer(&mut self, prompts: &[Asked]) -> Result<Vec<Vec<Token>>, EngineError> {
        let mut answers = Vec::new();
        while let rest @ [(first, limit), ..] = &prompts[answers.len()..] {
            match self.alike(rest) {
                0 | 1 => {
                    self.prefill(first)?;
                    answers.push(self.generate(&[], *limit)?);
                }
                count => answers.extend(self.answer_alike(&rest[..count])?),
            }
        }
        Ok(answers)
    }

    /// How many of the first prompts can be answered side by side.
    fn alike(&self, prompts: &[Asked]) -> usize {
        let Some((_, shared)) = prompts.first().and_then(|(first, _)| first.split_last()) else { return 0 };
        let mut cells = self.cells.saturating_sub(shared.iter().map(Piece::tokens).sum());
        let fits = |(pieces, limit): &&Asked| {
            let Some((Piece::Text(tail), head)) = pieces.split_last() else { return false };
            let wanted = tail.len() + limit;
            let fits = head == shared && !tail.is_empty() && wanted <= cells;
            cells = cells.saturating_sub(wanted);
            fits
        };
        prompts.iter().take(self.count as usize - 1).take_while(fits).count()
    }

    /// Answers prompts that are [`Self::alike`].
    fn answer_alike(&mut self, prompts: &[Asked]) -> Result<Vec<Vec<Token>>, EngineError> {
        let heads = prompts.first().and_then(|(first, _)| first.split_last());
        self.prefill(heads.map_or(&[][..], |(_, shared)| shared))?;
        let start = Instant::now();
        let (mut entries, mut ends) = (Vec::new(), Vec::new());
        for (sequence, (pieces, _)) in (1..).zip(prompts) {
            self.branch(sequence);
            let mut position = self.past();
            if let Some(Piece::Text(tail)) = pieces.last() {
                for &token in tail {
                    entries.push(BatchEntry { token, position, sequence, output: false });
                    position += 1;
                }
            }
            // Each has a text behind the picture, or it would not be here.
            if let Some(last) = entries.last_mut() {
                last.output = true;
            }
            ends.push(position);
        }
        let mut answers = vec![Vec::new(); prompts.len()];
        let mut open: Vec<usize> = (0..prompts.len()).collect();
        while !open.is_empty() {
            let mut next = Vec::new();
            self.sequences.decode(&entries, |_, logits| next.push(stats::argmax(logits) as Token))?;
            open.iter().zip(next).for_each(|(&a, token)| answers[a].push(token));
            self.times.decode_tokens += open.len() as u64;
            let ended = |answer: &Vec<Token>| answer.last().is_none_or(|&token| self.sequences.model().ends(token));
            open.retain(|&a| answers[a].len() < prompts[a].1 && !ended(&answers[a]));
            entries.clear();
            for &a in &open {
                let position = ends[a] + answers[a].len() as i32 - 1;
                let token = answers[a][answers[a].len() - 1];
                entries.push(BatchEntry { token, position, sequence: a as i32 + 1, output: true });
            }
        }
        self.times.decode += start.elapsed().as_secs_f64();
        Ok(answers)
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
            self.sequences.decode(&[entry], |_, row| token = stats::argmax(row) as Token)?;
        }
        self.times.decode += start.elapsed().as_secs_f64();
        self.times.decode_tokens += count as u64;
        Ok(())
    }

    /// Lets a sequence share the prompt.
    fn branch(&mut self, sequence: i32) {
        self.sequences.cut(sequence, 0);
        self.sequences.copy(PROMPT, sequence);
    }
}
