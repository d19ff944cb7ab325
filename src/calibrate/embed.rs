//! Conversations become samples: the runtime that inference will use makes the tokens, the pictures' embeddings and the
//! positions (libmtmd, whatever the vision tower), so that calibration sees what the model will see.
use super::CalibrateError;
use super::batch::{Kind, Sample};
use super::pairs::ASSISTANT;
use crate::Error;
use crate::front::Source;
use crate::gguf::{Header, Output, list, plan};
use crate::image::Rgb;
use crate::prompt::gguf::MARK;
use crate::prompt::{ChatTemplate, Message, PromptError, Rendered};
use crate::runtime::engine::{Chunks, Compute, EngineError, Media, Model, Piece, Place, Runtime, Token, Vision};
use crate::text::{Positions, SampleLayout, TextConfig};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

/// What tokenises: with a projector also what sees.
enum PromptReader {
    Text(Model),
    Vision(Vision),
}

/// Everything between a conversation and its embeddings.
pub struct Embedder<'a> {
    text: &'a Source<'a>,
    config: TextConfig,
    reader: PromptReader,
    template: ChatTemplate,
    /// Ends an answer.
    end: Option<Token>,
    /// Holds the header that the reader was loaded from.
    _header: Output,
}

impl<'a> Embedder<'a> {
    /// Loads tokenizer and template of `text`, and the projector in the file `mmproj` if there is one. `dir` is a folder
    /// that can be written: the runtime reads the tokenizer from a file, of which only the header is written.
    ///
    /// # Errors
    /// The runtime refuses the model or the projector; there is no chat template, or it cannot be applied.
    pub fn load(
        text: &'a Source<'a>,
        mmproj: Option<&Path>,
        runtime: &Arc<Runtime>,
        compute: Compute,
        dir: &Path,
    ) -> Result<Self, Error> {
        let config = text.text_config()?;
        let mut header = Header::new(text.metadata.clone());
        list(&mut header, &plan::stored(&text.tensors))?;
        let mut file = Output::create(&dir.join("tokenizer.gguf"))?;
        let bytes = header.encode();
        file.write(&bytes)?;
        file.extend_to(bytes.len() as u64 + header.data_bytes())?;
        let model = Model::load(runtime, &file.readable()?, compute, false)?;
        let no_template = "has no chat template (`tokenizer.chat_template`), so that nothing can be asked of it: \
                           calibrate with `--imatrix FILE`, or give `--method rtn`";
        let template = model
            .template()
            .ok_or_else(|| CalibrateError::File { path: text.values.path("").into(), problem: no_template.into() })??;
        let end = model.end_of_turn();
        let reader = match mmproj {
            Some(path) => PromptReader::Vision(Vision::load(model, path, compute)?),
            None => PromptReader::Text(model),
        };
        Ok(Embedder { text, config, reader, template, end, _header: file })
    }

    fn model(&self) -> &Model {
        match &self.reader {
            PromptReader::Text(model) => model,
            PromptReader::Vision(vision) => vision.model(),
        }
    }

    /// Tokens that the model was trained for.
    pub fn context_length(&self) -> usize {
        self.config.context_length
    }

    /// What sees, with a projector.
    pub(super) fn vision(&self) -> Option<&Vision> {
        match &self.reader {
            PromptReader::Text(_) => None,
            PromptReader::Vision(vision) => Some(vision),
        }
    }

    /// The parts of a prompt whose answer is awaited; none without a projector, or where they are more than `most`
    /// tokens. `seen` has the pictures' parts once they are embedded.
    ///
    /// # Errors
    /// The template cannot be applied; a picture cannot be used.
    pub(super) fn prompt(
        &self,
        what: &str,
        messages: &[Message],
        pictures: &[Rgb],
        most: usize,
        seen: &mut Vec<Arc<Media>>,
    ) -> Result<Option<Vec<Piece>>, Error> {
        let Some(vision) = self.vision() else { return Ok(None) };
        let unfit = |e: PromptError| CalibrateError::Sample { what: what.into(), problem: e.to_string() };
        let prompt = self.template.conversation(messages).map_err(unfit)?;
        let chunks = vision.tokenize(&prompt.text, Path::new(what), pictures)?;
        let fits = chunks.tokens().iter().sum::<usize>() <= most;
        Ok(fits.then(|| pieces(&chunks, seen)).transpose()?)
    }

    /// A calibration sample: the conversation with its pictures, up to the last answer and the end of its turn. Every
    /// answer counts as answer. `what` names the conversation in messages; `seen` has its pictures' parts if they are
    /// embedded already.
    ///
    /// # Errors
    /// [`CalibrateError::Sample`] where the conversation is at fault: it does not end with an answer, pictures without a
    /// projector, more than `max_tokens` tokens, a template that words earlier answers otherwise.
    pub fn sample(
        &self,
        what: &str,
        messages: &[Message],
        pictures: &[Rgb],
        max_tokens: usize,
        seen: &mut Vec<Arc<Media>>,
    ) -> Result<Sample, Error> {
        let unfit = |problem: String| Error::from(CalibrateError::Sample { what: what.into(), problem });
        let Some((last, before)) = messages.split_last().filter(|(last, _)| last.role == ASSISTANT) else {
            return Err(unfit("there is no answer at the end".into()));
        };
        let prompt = self.template.conversation(before).map_err(|e| unfit(e.to_string()))?;
        let mut reply = self.model().tokenize(last.text().trim(), false, false)?;
        if reply.is_empty() {
            return Err(unfit("the answer is empty".into()));
        }
        reply.extend(self.end);
        let room = |[words, seen]: [usize; 2]| match words + seen + reply.len() {
            tokens if tokens > max_tokens => Err(unfit(format!(
                "{tokens} tokens, {seen} of them the pictures'; at most {max_tokens} fit (--set max-tokens=N)"
            ))),
            _ => Ok(()),
        };
        let (pieces, places) = match &self.reader {
            PromptReader::Text(_) if !pictures.is_empty() => {
                return Err(unfit("it has a picture, and the model no projector (--mmproj)".into()));
            }
            PromptReader::Text(model) => {
                let tokens = model.tokenize(&prompt.text, true, true)?;
                room([tokens.len(), 0])?;
                (vec![Piece::Text(tokens)], Vec::new())
            }
            PromptReader::Vision(vision) => {
                let chunks = vision.tokenize(&prompt.text, Path::new(what), pictures)?;
                room(chunks.tokens())?;
                (pieces(&chunks, seen)?, chunks.places())
            }
        };
        let kinds = self.kinds(&prompt, &pieces).map_err(unfit)?;
        self.lay(kinds, pieces, places, reply)
    }

    /// What each token of the prompt is: the answers' among the text are found by walking along the text that the tokens
    /// spell, past what the runtime adds.
    fn kinds(&self, prompt: &Rendered, pieces: &[Piece]) -> Result<Vec<Kind>, String> {
        let mut kinds = Vec::new();
        let text = prompt.text.as_bytes();
        let mut at = 0;
        for piece in pieces {
            let tokens = match piece {
                Piece::Media(media) => {
                    kinds.resize(kinds.len() + media.tokens, Kind::Vision);
                    at += if text[at..].starts_with(MARK.as_bytes()) { MARK.len() } else { 0 };
                    continue;
                }
                Piece::Text(tokens) => tokens,
            };
            for &token in tokens {
                let spelled = self.model().bytes(token);
                let next = behind(text, at, &spelled);
                let answered = next.is_some() && prompt.answers.iter().any(|answer| answer.contains(&at));
                kinds.push(if answered { Kind::Answer } else { Kind::Other });
                at = next.unwrap_or(at);
            }
        }
        let rest = &text[at..];
        // Without earlier answers nothing depends on the way.
        match prompt.answers.is_empty() || rest.iter().all(u8::is_ascii_whitespace) {
            true => Ok(kinds),
            false => Err("its earlier answers cannot be told from the prompt's other tokens".into()),
        }
    }

    /// The tokens of prompt, pictures and reply one after the other.
    fn lay(
        &self,
        mut kinds: Vec<Kind>,
        pieces: Vec<Piece>,
        places: Vec<Place>,
        reply: Vec<Token>,
    ) -> Result<Sample, Error> {
        kinds.resize(kinds.len() + reply.len(), Kind::Answer);
        let (mut ids, mut rows, mut layout) =
            (Vec::new(), EmbeddingRows::new(&self.config, kinds.len()), LayoutBuilder::default());
        let mut places = places.into_iter();
        let pieces: Vec<Piece> = pieces.into_iter().chain([Piece::Text(reply)]).collect();
        let words = self.word_rows(&pieces)?;
        for piece in pieces {
            match piece {
                Piece::Text(tokens) => {
                    for token in tokens {
                        // invariant: there is a row of every token of the pieces.
                        rows.word(&words[&token]);
                        layout.word();
                        ids.push(token as u32);
                    }
                }
                Piece::Media(media) => {
                    let place = places.next().unwrap_or_else(|| layout.plain(media.tokens));
                    layout.picture(ids.len(), media.tokens, place);
                    ids.resize(ids.len() + media.tokens, 0);
                    rows.picture(&media)?;
                }
            }
        }
        let (embeds, injections) = rows.tensors()?;
        Ok(Sample { injections, layout: layout.finish()?, ..Sample::new(embeds, kinds, ids) })
    }

    /// The tokens' rows of the embedding, as they enter the first block: on all cores, a rotated row takes a while.
    fn word_rows(&self, pieces: &[Piece]) -> Result<HashMap<Token, Vec<f32>>, Error> {
        let (config, values) = (&self.config, &self.text.values);
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let row = |token: Token| -> Result<_, Error> {
            let at = usize::try_from(token).ok().filter(|&t| t < vocab).ok_or_else(|| CalibrateError::File {
                path: values.path("").into(),
                problem: format!("token {token} has no row in the embedding of {vocab}"),
            })?;
            let mut row = values.values("token_embd.weight", at * hidden..(at + 1) * hidden)?;
            if config.arch.scaled_embedding {
                let scale = (hidden as f32).sqrt();
                row.iter_mut().for_each(|v| *v *= scale);
            }
            Ok((token, row))
        };
        let tokens = pieces.iter().flat_map(|piece| match piece {
            Piece::Text(tokens) => &tokens[..],
            Piece::Media(_) => &[],
        });
        tokens.copied().collect::<BTreeSet<Token>>().into_par_iter().map(row).collect()
    }
}

/// A prompt's parts. Pictures are embedded where `seen` is empty, and are there after it.
fn pieces(chunks: &Chunks, seen: &mut Vec<Arc<Media>>) -> Result<Vec<Piece>, EngineError> {
    let mut pieces = chunks.pieces(seen.is_empty())?;
    let media = pieces.iter_mut().filter_map(|p| if let Piece::Media(media) = p { Some(media) } else { None });
    if seen.is_empty() {
        *seen = media.map(|media| Arc::clone(media)).collect();
    } else {
        // The same pictures have the same parts, in any prompt.
        for (media, seen) in media.zip(seen) {
            *media = match media.layout == seen.layout {
                true => Arc::clone(seen),
                false => Arc::new(Media { embedding: seen.embedding.clone(), ..Media::clone(media) }),
            };
        }
    }
    Ok(pieces)
}

/// Where `text` goes on behind a token that spells `token` at `at`, or that does so behind white space, or without its
/// own leading space: tokenizers add and drop it. Nothing: the token is none of the text's.
fn behind(text: &[u8], at: usize, token: &[u8]) -> Option<usize> {
    let rest = &text[at..];
    let skipped = rest.iter().take_while(|b| b.is_ascii_whitespace()).count();
    let bare = token.strip_prefix(b" ").unwrap_or(token);
    let fits = |from: usize, token: &[u8]| {
        (!token.is_empty() && rest[from..].starts_with(token)).then(|| at + from + token.len())
    };
    fits(0, token).or_else(|| fits(0, bare)).or_else(|| fits(skipped, token)).or_else(|| fits(skipped, bare))
}

/// Embeddings, row by row, with the features that enter behind the first blocks.
struct EmbeddingRows {
    hidden: usize,
    /// The stream's, then each injection's, `[tokens, hidden]`.
    values: Vec<Vec<f32>>,
}

impl EmbeddingRows {
    fn new(config: &TextConfig, tokens: usize) -> Self {
        let values = (0..=config.deepstack_layers).map(|_| Vec::with_capacity(tokens * config.hidden_size)).collect();
        EmbeddingRows { hidden: config.hidden_size, values }
    }

    fn word(&mut self, row: &[f32]) {
        let (stream, features) = self.values.split_at_mut(1);
        stream[0].extend(row);
        features.iter_mut().for_each(|f| f.resize(stream[0].len(), 0.0));
    }

    fn picture(&mut self, media: &Media) -> Result<(), EngineError> {
        let width = self.hidden * self.values.len();
        if media.embedding.len() != media.tokens * width {
            let log = format!("{} values for {} tokens of {width}", media.embedding.len(), media.tokens);
            return Err(EngineError::Call { what: "a picture's embedding has another width than the model", log });
        }
        for row in media.embedding.chunks_exact(width) {
            row.chunks_exact(self.hidden).zip(&mut self.values).for_each(|(part, values)| values.extend(part));
        }
        Ok(())
    }

    fn tensors(self) -> candle_core::Result<(Tensor, Vec<Tensor>)> {
        let hidden = self.hidden;
        let tensor = |v: Vec<f32>| Tensor::from_vec(v.clone(), (v.len() / hidden, hidden), &Device::Cpu);
        let mut all = self.values.into_iter().map(tensor).collect::<candle_core::Result<Vec<_>>>()?;
        let stream = all.remove(0);
        // Without a picture there is nothing to inject.
        let empty = all
            .iter()
            .all(|t| t.abs().and_then(|t| t.sum_all()).and_then(|t| t.to_scalar::<f32>()).is_ok_and(|s| s == 0.0));
        Ok((stream, if empty { Vec::new() } else { all }))
    }
}

/// Positions and runs, where they are not those of text.
#[derive(Default)]
struct LayoutBuilder {
    next: u32,
    positions: Vec<[u32; 4]>,
    runs: Vec<std::ops::Range<usize>>,
    in_sections: bool,
}

impl LayoutBuilder {
    fn word(&mut self) {
        self.positions.push([self.next, self.next, self.next, 0]);
        self.next += 1;
    }

    /// A picture whose tokens are like text's.
    fn plain(&self, tokens: usize) -> Place {
        Place { both_ways: false, positions: Vec::new(), next: self.next + tokens as u32 }
    }

    fn picture(&mut self, start: usize, tokens: usize, place: Place) {
        if place.both_ways {
            self.runs.push(start..start + tokens);
        }
        if place.positions.is_empty() {
            (0..tokens).for_each(|_| self.word());
        } else {
            self.in_sections = true;
            self.positions.extend(&place.positions);
        }
        self.next = place.next;
    }

    fn finish(self) -> candle_core::Result<Option<Arc<SampleLayout>>> {
        let positions = match self.in_sections {
            true => Some(Positions::new(4, self.positions.concat())?),
            false => None,
        };
        let plain = positions.is_none() && self.runs.is_empty();
        Ok((!plain).then(|| Arc::new(SampleLayout { positions, runs: self.runs })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_in_the_text() {
        let text = b"<s>Hello  w\n";
        assert_eq!(behind(text, 0, b"<s>"), Some(3));
        assert_eq!(behind(text, 3, b" Hello"), Some(8), "a space that the tokenizer put in front");
        assert_eq!(behind(text, 8, b"w"), Some(11), "white space that it dropped");
        assert_eq!((behind(text, 8, b"x"), behind(text, 8, b"")), (None, None));
    }

    /// Text, a picture of 2 x 2 in sections, text: as llama.cpp counts them.
    #[test]
    fn positions_go_on_behind_a_picture() {
        let mut layout = LayoutBuilder::default();
        layout.word();
        let positions = vec![[1, 1, 1, 0], [1, 1, 2, 0], [1, 2, 1, 0], [1, 2, 2, 0]];
        layout.picture(1, 4, Place { both_ways: true, positions: positions.clone(), next: 3 });
        layout.word();
        let layout = layout.finish().unwrap().unwrap();
        let all = [vec![[0, 0, 0, 0]], positions, vec![[3, 3, 3, 0]]].concat();
        assert_eq!(layout.positions, Some(Positions::new(4, all.concat()).unwrap()));
        assert_eq!((layout.runs.len(), layout.runs[0].clone()), (1, 1..5));
        let mut plain = LayoutBuilder::default();
        let place = plain.plain(3);
        plain.picture(0, 3, place);
        assert!(plain.finish().unwrap().is_none());
    }
}
