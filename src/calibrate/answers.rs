//! The model's own answers: general questions about a calibration picture, answered by the model that is calibrated,
//! become further turns of the picture's conversation. They cost no picture's tokens, and second moments of text then rest
//! on several times as many tokens, of the kinds that the model itself writes.
use super::CalibrateError;
use super::embed::Embedder;
use super::pairs::{ASSISTANT, CAPTION_QUESTION, SYSTEM, USER};
use super::store::replace;
use crate::Error;
use crate::events::{Event, Observer};
use crate::front::Source;
use crate::ggml::GgmlType;
use crate::gguf::plan::{self, TypeChoice};
use crate::gguf::{Changes, FileType, GgufError, Header, Output, list, write};
use crate::image::Rgb;
use crate::prompt::Message;
use crate::prompt::gguf::MARK;
use crate::runtime::engine::{Compute, Decoder, Media, Runtime, Token};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What is asked; each picture gets the next [`TURNS`] of them. None is about a kind of picture.
const QUESTIONS: [&str; 12] = [
    "What is in this picture?",
    "What is the main object?",
    "What is the background like?",
    "How many objects are there?",
    "What is on the left?",
    "What colors do you see?",
    "What is at the bottom?",
    "What kind of thing is this?",
    "Is there any text in it?",
    "What is on the right?",
    "Where is this?",
    "Describe it in one sentence.",
];
const TURNS: usize = 6;
/// Tokens of an answer, at most; a description may be twice as long.
const LONGEST: usize = 32;
/// Tokens that the model can hold at once: a picture of more is asked nothing.
const CONTEXT: usize = 8192;

/// Question and answer, turn by turn.
pub type Turns = Vec<(String, String)>;

/// What was answered, kept so that a resumed run sees the same.
#[derive(Default, Serialize, Deserialize)]
pub struct Answers {
    /// The fingerprint of its weights.
    model: String,
    /// By the entry's name.
    turns: BTreeMap<String, Turns>,
}

impl Answers {
    /// Question and answer, turn by turn, by the name of the entry whose picture they are about.
    pub fn turns(&self) -> &BTreeMap<String, Turns> {
        &self.turns
    }

    /// Keeps them.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn keep(&self, path: &Path) -> Result<(), Error> {
        // invariant: strings only.
        replace(path, &serde_json::to_vec(self).unwrap_or_default())
    }

    /// Those of the model `model` at `path`; none if there are none.
    fn read(path: &Path, model: String) -> Self {
        let earlier: Option<Self> = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        earlier.filter(|a| a.model == model).unwrap_or(Answers { model, ..Answers::default() })
    }
}

/// The model, as far as it answers.
pub struct Answerer<'e> {
    embedder: &'e Embedder<'e>,
    decoder: Decoder<'e>,
    context: usize,
    answers: Answers,
    asked: usize,
    /// Holds the weights that the decoder reads.
    _file: Output,
}

impl<'e> Answerer<'e> {
    /// Writes the model in q8_0 into `dir` for the runtime, for as long as it answers. What it answered in a run that was
    /// interrupted is at `earlier`.
    ///
    /// # Errors
    /// There is no room for the model on the disk or in memory; the runtime refuses it.
    pub fn load(
        embedder: &'e Embedder<'e>,
        text: &Source,
        (runtime, compute): (&Arc<Runtime>, Compute),
        (dir, earlier): (&Path, Option<&Path>),
        observer: &dyn Observer,
    ) -> Result<Self, Error> {
        let types = TypeChoice {
            embedding: Some(GgmlType::Q8_0),
            output: Some(GgmlType::Q8_0),
            ..TypeChoice::of(FileType::Plain(GgmlType::Q8_0))
        };
        let plan = plan::text(&text.tensors, &types);
        let mut header = Header::new(text.metadata.clone());
        list(&mut header, &plan)?;
        let mut file = Output::create(&dir.join("answers.gguf"))?;
        write(text, &header, &plan, Changes::NONE, &mut file, observer)?;
        let context = embedder.context_length().min(CONTEXT);
        let vision = embedder.vision();
        let decoder = Decoder::load_for(TURNS + 1, runtime, &file.readable()?, compute, context, vision)?;
        let model = text.values.fingerprint();
        let answers = match earlier {
            Some(path) => Answers::read(path, model),
            None => Answers { model, ..Answers::default() },
        };
        Ok(Answerer { embedder, decoder, context, answers, asked: 0, _file: file })
    }

    /// `messages` and, behind them, further turns about their one picture; none where there is not one, or where it is
    /// too large to be asked about. Without `messages` the first of them describes the picture. The picture's
    /// embedding is in `seen`, or comes there.
    ///
    /// # Errors
    /// The runtime fails; the template cannot be applied.
    pub fn continued(
        &mut self,
        what: &str,
        messages: &[Message],
        pictures: &[Rgb],
        seen: &mut Vec<Arc<Media>>,
    ) -> Result<Option<Vec<Message>>, Error> {
        let [_] = pictures else { return Ok(None) };
        let system: Vec<Message> = messages.iter().take_while(|m| m.role == SYSTEM).cloned().collect();
        let first = self.asked * TURNS;
        self.asked += 1;
        if !self.answers.turns.contains_key(what) {
            let described = messages.is_empty().then_some((CAPTION_QUESTION, 2 * LONGEST));
            let general = (first..first + TURNS).map(|i| (QUESTIONS[i % QUESTIONS.len()], LONGEST));
            let (mut questions, mut prompts) = (Vec::new(), Vec::new());
            for (question, longest) in described.into_iter().chain(general) {
                let mut prompt = system.clone();
                prompt.push(Message::new(USER, 1, question));
                let most = self.context - longest.min(self.context);
                if let Some(pieces) = self.embedder.prompt(what, &prompt, pictures, most, seen)? {
                    questions.push(question);
                    prompts.push((pieces, longest));
                }
            }
            let answers = self.decoder.answer(&prompts)?;
            let turn = |(&question, tokens): (&&str, Vec<Token>)| Some((question.into(), self.text(&tokens)?));
            let turns: Turns = questions.iter().zip(answers).filter_map(turn).collect();
            self.answers.turns.insert(what.into(), turns);
        }
        let turns = &self.answers.turns[what];
        let mut all = messages.to_vec();
        for (question, answer) in turns {
            let images = usize::from(!all.iter().any(|m| m.role == USER));
            all.extend([Message::new(USER, images, question), Message::new(ASSISTANT, 0, answer)]);
        }
        Ok((!turns.is_empty()).then_some(all))
    }

    /// An answer in words; nothing where there are none.
    fn text(&self, tokens: &[Token]) -> Option<String> {
        let model = self.decoder.model();
        // A special token in the middle would be read as one again.
        let end = tokens.iter().position(|&t| model.ends(t) || model.is_special(t)).unwrap_or(tokens.len());
        let answer = model.text(&tokens[..end]).trim().to_string();
        (!answer.is_empty() && !answer.contains(MARK)).then_some(answer)
    }

    pub fn answers(self) -> Answers {
        self.answers
    }
}

/// An answerer, or a note why there is none: the model may be too large for the device beside which it is calibrated
/// block by block.
///
/// # Errors
/// The disk is full: without answers it would be another calibration, which a run with room could not resume.
pub fn answerer<'e>(
    loaded: Result<Answerer<'e>, Error>,
    observer: &dyn Observer,
) -> Result<Option<Answerer<'e>>, Error> {
    match loaded {
        Ok(answerer) => Ok(Some(answerer)),
        Err(Error::Gguf(GgufError::Write { path, source })) => {
            let problem = format!(
                "the model that answers questions about the pictures cannot be written: {source}; make room, name another \
                 --work-dir, or leave it out with --set own-answers=off, which makes it less exact"
            );
            Err(CalibrateError::File { path, problem }.into())
        }
        Err(e) => {
            let note = "the model does not answer questions about the calibration pictures, which makes it less exact";
            observer.event(Event::Note(format!("{note}: {e}")));
            Ok(None)
        }
    }
}
