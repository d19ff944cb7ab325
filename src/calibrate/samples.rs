//! From a list of conversations to the packed batch: entries are drawn, their pictures loaded, all of it embedded.
use super::CalibrateError;
use super::answers::{Answerer, Answers};
use super::batch::{Batch, Packer, Sample};
use super::builtin;
use super::embed::Embedder;
use super::pairs::{Conversation, List};
use super::stream::{Room, Stream};
use crate::Error;
use crate::digest::hex;
use crate::events::{Event, Observer};
use crate::image::Rgb;
use crate::prompt::Message;
use sha2::{Digest, Sha256};
use std::path::Path;

/// Which conversations are used.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    /// A file or folder; none: the built-in set.
    pub list: Option<&'a Path>,
    pub image_root: Option<&'a Path>,
    /// How many, at most.
    pub samples: usize,
    pub seed: u64,
    /// Conversations of more tokens cannot be used.
    pub max_tokens: usize,
}

/// The embedded conversations.
pub struct Samples {
    pub batch: Batch,
    pub inputs: Stream,
    /// SHA-256 of what enters the text model, in hexadecimal digits.
    pub data: String,
    pub source: String,
    /// The model's own, if it was asked.
    pub answers: Option<Answers>,
    /// Drawn entries that could not be used, each with the reason.
    pub skipped: Vec<String>,
}

/// Reasons that an error or note names.
const NAMED: usize = 3;

/// Draws and embeds. An entry that cannot be used (a picture missing or broken, no answer, too long) is skipped and not
/// replaced, so that the others do not depend on it; a note counts them. With `answerer` the model's own answers about
/// the pictures are further turns.
///
/// # Errors
/// More than one in ten of the drawn entries cannot be used; a fault of the checkpoint; no room.
pub fn embed(
    embedder: &Embedder,
    answerer: Option<Answerer>,
    draw: Draw,
    chunk_tokens: usize,
    room: &Room,
    observer: &dyn Observer,
) -> Result<Samples, Error> {
    let packer = Packer::new(chunk_tokens, room);
    let mut gathered = Gathered { packer, hash: Sha256::new(), skipped: Vec::new(), answerer, observer };
    let source = match draw.list {
        Some(path) => {
            gathered.list(embedder, draw, path)?;
            path.display().to_string()
        }
        None => {
            gathered.built_in(embedder, draw)?;
            "built-in".into()
        }
    };
    observer.event(Event::PhaseEnd);
    let Gathered { packer, hash, skipped, answerer, .. } = gathered;
    let answers = answerer.map(Answerer::answers);
    let (batch, inputs) = packer.finish()?;
    Ok(Samples { batch, inputs, data: hex(&hash.finalize()), source, answers, skipped })
}

struct Gathered<'a> {
    packer: Packer,
    hash: Sha256,
    skipped: Vec<String>,
    answerer: Option<Answerer<'a>>,
    observer: &'a dyn Observer,
}

impl Gathered<'_> {
    fn begin(&self, n: usize) {
        self.observer.event(Event::PhaseStart { name: "vision".into(), total: n as u64, unit: "samples" });
    }

    fn list(&mut self, embedder: &Embedder, draw: Draw, path: &Path) -> Result<(), Error> {
        let list = List::read(path, draw.image_root)?;
        let drawn = list.draw(draw.samples, draw.seed);
        // All that can be found wrong without the tower is found before it works for minutes.
        let mut usable = Vec::new();
        for &index in &drawn {
            match list.conversation(index) {
                Ok(conversation) => usable.push((list.name(index), conversation)),
                Err(problem) => self.skip(path, drawn.len(), format!("{}: {problem}", list.name(index)))?,
            }
        }
        self.begin(usable.len());
        for (name, c) in usable {
            let pictures = c.pictures.iter().map(|p| p.load()).collect::<Result<Vec<_>, _>>();
            let unfit = |problem| Error::from(CalibrateError::Sample { what: name.clone(), problem });
            let sample = pictures
                .map_err(unfit)
                .and_then(|p| self.conversation(embedder, &name, &c.messages, &p, draw.max_tokens));
            match sample {
                Ok(sample) => self.add(sample, &name)?,
                Err(Error::Calibrate(e @ CalibrateError::Sample { .. })) => {
                    self.skip(path, drawn.len(), e.to_string())?;
                }
                Err(e) => return Err(e),
            }
        }
        if !self.skipped.is_empty() {
            let (bad, first) = (self.skipped.len(), self.named());
            let note = format!("{bad} of {} drawn entries were skipped: {first}", drawn.len());
            self.observer.event(Event::Note(note));
        }
        Ok(())
    }

    fn built_in(&mut self, embedder: &Embedder, draw: Draw) -> Result<(), Error> {
        let set = builtin::pairs()?;
        let n = set.len().min(draw.samples);
        let note = format!("no --calib given: calibrating on the built-in set of {n} drawn pictures");
        self.observer.event(Event::Note(note));
        self.begin(n);
        for p in &set[..n] {
            let messages = Conversation::single(p.question, p.answer, true);
            let picture = std::slice::from_ref(&p.image);
            let sample = self.conversation(embedder, p.name, &messages, picture, draw.max_tokens)?;
            self.add(sample, p.name)?;
        }
        Ok(())
    }

    /// The conversation, with the model's own turns where they fit.
    fn conversation(
        &mut self,
        embedder: &Embedder,
        name: &str,
        messages: &[Message],
        pictures: &[Rgb],
        max_tokens: usize,
    ) -> Result<Sample, Error> {
        let mut seen = Vec::new();
        let own = match &mut self.answerer {
            Some(answerer) => answerer.continued(name, messages, pictures, &mut seen)?,
            None => None,
        };
        match own.map(|own| embedder.sample(name, &own, pictures, max_tokens, &mut seen)) {
            Some(Err(Error::Calibrate(CalibrateError::Sample { .. }))) if !messages.is_empty() => {
                // Too long, or a template that words earlier answers otherwise.
                embedder.sample(name, messages, pictures, max_tokens, &mut seen)
            }
            Some(sample) => sample,
            None if messages.is_empty() => {
                let problem = "it has no caption (a .txt beside it), and the model is not asked or has no answer";
                Err(CalibrateError::Sample { what: name.into(), problem: problem.into() }.into())
            }
            None => embedder.sample(name, messages, pictures, max_tokens, &mut seen),
        }
    }

    fn add(&mut self, sample: Sample, name: &str) -> Result<(), Error> {
        let values = sample.embeds.flatten_all()?.to_vec1::<f32>()?;
        for part in values.chunks(4096) {
            let bytes: Vec<u8> = part.iter().flat_map(|v| v.to_le_bytes()).collect();
            self.hash.update(bytes);
        }
        sample.ids.iter().for_each(|id| self.hash.update(id.to_le_bytes()));
        self.packer.push(sample)?;
        self.observer.event(Event::Advance { n: 1, detail: name.into() });
        Ok(())
    }

    fn skip(&mut self, path: &Path, drawn: usize, reason: String) -> Result<(), Error> {
        self.skipped.push(reason);
        let bad = self.skipped.len();
        if bad * 10 > drawn {
            return Err(CalibrateError::TooManyBad { path: path.into(), bad, drawn, first: self.named() }.into());
        }
        Ok(())
    }

    /// The first few reasons.
    fn named(&self) -> String {
        let more = if self.skipped.len() > NAMED { "; …" } else { "" };
        format!("{}{more}", self.skipped[..self.skipped.len().min(NAMED)].join("; "))
    }
}
