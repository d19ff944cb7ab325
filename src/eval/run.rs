//! The evaluation itself: check everything, embed pictures, run the reference, run each candidate.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::data::{DataError, Question, QuestionForm, Questions};
use super::models::{Models, name};
use super::record::{self, Answered, Measures, Prompt, ReferenceRows, ReferenceWriter};
use super::report::{self, Report};
use super::stats;
use super::store::{CacheKey, CacheStore, StoreError};
use crate::events::{Event, Observer};
use crate::gguf::{GgufError, GgufFile, ReadError};
use crate::image::{self, ImageError};
use crate::prompt::{ChatTemplate, Message, PromptError};
use crate::runtime::engine::{Compute, Decoder, EngineError, Model, Piece, Runtime, Times, Token, Vision};

/// What to evaluate, and how.
#[derive(Debug, Clone)]
pub struct Setup {
    pub reference: PathBuf,
    pub candidates: Vec<PathBuf>,
    /// Needed as soon as a question has a picture; several where models were not made with the same.
    pub mmproj: Vec<PathBuf>,
    pub data: PathBuf,
    pub image_root: PathBuf,
    /// Only the first so many questions.
    pub limit: Option<usize>,
    /// Directory of the installed runtime.
    pub runtime: PathBuf,
    pub cache: PathBuf,
    pub compute: Compute,
    /// The device to run on, by ggml's name; none: llama.cpp chooses.
    pub device: Option<String>,
    /// Longest greedy answer.
    pub max_tokens: usize,
    pub resamples: usize,
    pub seed: u64,
}

/// Why an evaluation stops.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Header(#[from] ReadError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Prompt(#[from] PromptError),
    #[error(transparent)]
    CacheStore(#[from] StoreError),
    #[error(
        "{candidate} and the reference {reference} have different vocabularies ({what}): their probabilities \
             cannot be compared"
    )]
    Vocabulary { candidate: PathBuf, reference: PathBuf, what: String },
    #[error(
        "{path} takes embeddings of width {width}, the reference of width {expected}: they cannot share a projector"
    )]
    Width { path: PathBuf, width: usize, expected: usize },
    #[error("{path} is a projector (mmproj), not a text model; give it as --mmproj")]
    IsProjector { path: PathBuf },
    #[error("{path} is a text model ({architecture}), not a projector; give it as a candidate or --reference")]
    NotProjector { path: PathBuf, architecture: String },
    #[error("{path}: no model here takes its pictures from this projector: leave it out")]
    UnusedProjector { path: PathBuf },
    #[error(transparent)]
    Pair(GgufError),
    #[error("{0} questions have pictures: give the projector with --mmproj")]
    NoProjector(usize),
    #[error("the reference {0} has no chat template; use \"prompt\" in place of \"question\", or a file that has one")]
    NoTemplate(PathBuf),
    #[error("question {id}: {path} gives logits that are not numbers; the model is broken")]
    NotNumbers { id: String, path: PathBuf },
    #[error("the reference {0}: {1}")]
    Template(PathBuf, String),
    #[error("question {id}: prompt and answers take {tokens} tokens, the model was trained for {limit}")]
    TooLong { id: String, tokens: usize, limit: usize },
    #[error(transparent)]
    Picture(#[from] ImageError),
}

/// A question on its way through the models.
struct Item<'q> {
    question: &'q Question,
    key: CacheKey,
    picture: Option<CacheKey>,
    prompt: Prompt,
}

/// Tokens decoded one by one to state a model's speed, where its own answers gave fewer.
const SPEED_TOKENS: usize = 32;

/// Checks everything that can be checked without long work, then runs.
///
/// # Errors
/// See [`EvalError`]; what was computed before stays in the cache.
pub fn run(setup: &Setup, observer: &dyn Observer) -> Result<Report, EvalError> {
    let start = Instant::now();
    let (mut models, questions) = Models::read(setup)?;
    let runtime = Runtime::open_on(&setup.runtime, setup.device.as_deref())?;
    let model = preflight(setup, &runtime)?;
    models.hash(observer)?;

    let clock = Instant::now();
    let mut inputs = all_inputs(setup, &models, &questions, model, &runtime, observer)?;
    let prepare_seconds = clock.elapsed().as_secs_f64();

    let mut context = 0;
    for inputs in &inputs {
        context = context.max(cells(setup, &inputs.items, &models.reference)?);
    }
    let work = Evaluation { setup, runtime: &runtime, context, observer };
    let of = identity(setup, &models, &runtime, 0);
    let settings = json!({"max_tokens": setup.max_tokens, "batch": setup.compute.batch, "of": of});
    let mut references = CacheStore::open(&setup.cache, "reference", &settings)?;
    work.phase(&format!("reference {}", name(&models.reference.path)), questions.list.len());
    let reference_times = work.reference(&mut inputs[0], &mut references)?;
    observer.event(Event::PhaseEnd);

    let mut measured = Vec::new();
    for (i, candidate) in (1..).zip(&models.candidates) {
        work.phase(&name(&candidate.path), questions.list.len());
        let own = models.own_projector(i);
        let at = own.and_then(|own| inputs.iter().position(|known| known.projector.as_deref() == Some(own.1)));
        let inputs = &mut inputs[at.unwrap_or(0)];
        let mut key = json!({"candidate": models.digest(i), "of": settings});
        if let Some((_, digest)) = own {
            key["mmproj"] = digest.into();
        }
        let mut store = CacheStore::open(&setup.cache, "candidate", &key)?;
        let times = work.candidate(candidate, inputs, &mut references, &mut store)?;
        let outcomes = outcomes(&inputs.items, &mut store)?;
        measured.push(report::Measured { header: candidate, mmproj: own, digest: models.digest(i), times, outcomes });
        observer.event(Event::PhaseEnd);
    }
    let cost = report::Cost {
        wall: start.elapsed().as_secs_f64(),
        prepare: prepare_seconds,
        encode: inputs.iter().map(|i| i.encode).sum(),
        reference: reference_times,
        cache_bytes: inputs.iter().map(|i| i.prompts.len()).sum::<u64>() + references.len(),
    };
    let list: Vec<_> = inputs[0].items.iter().map(|i| i.question).collect();
    let reference = (&models.reference, models.digest(0));
    Ok(report::build(setup, &runtime, reference, models.projector(0), &questions, &list, &measured, &cost))
}

/// What prompts and pictures of model `i` depend on.
fn identity(setup: &Setup, models: &Models, runtime: &Runtime, i: usize) -> serde_json::Value {
    json!({"format": 3, "reference": models.digest(0), "mmproj": models.projector(i).map(|p| p.1),
        "runtime": runtime.describe(), "exact": setup.compute.exact, "gpu": setup.compute.gpu_layers != 0})
}

/// The inputs of all models: first the reference's, then those of each other projector.
fn all_inputs<'q>(
    setup: &Setup,
    models: &Models,
    questions: &'q Questions,
    model: Model,
    runtime: &Arc<Runtime>,
    observer: &dyn Observer,
) -> Result<Vec<Inputs<'q>>, EvalError> {
    let mut all: Vec<Inputs> = Vec::new();
    let mut model = Some(model);
    for i in 0..=models.candidates.len() {
        let projector = models.projector(i);
        if all.iter().any(|known| known.projector.as_deref() == projector.map(|p| p.1)) {
            continue;
        }
        let phase = match models.own_projector(i) {
            None => "prompts and pictures".into(),
            Some((header, _)) => format!("pictures by {}", name(&header.path)),
        };
        observer.event(Event::PhaseStart { name: phase, total: questions.list.len() as u64, unit: "questions" });
        let model = match model.take() {
            Some(model) => model,
            None => Model::load(runtime, &setup.reference, setup.compute, false)?,
        };
        let mut prompts = CacheStore::open(&setup.cache, "prompts", &identity(setup, models, runtime, i))?;
        let mmproj = projector.map(|(header, _)| header.path.as_path());
        let (items, vision, encode) = prepare(setup, questions, model, mmproj, &mut prompts, observer)?;
        all.push(Inputs { projector: projector.map(|(_, digest)| digest.into()), items, prompts, vision, encode });
        observer.event(Event::PhaseEnd);
    }
    Ok(all)
}

/// What models with the same projector run on.
struct Inputs<'q> {
    /// The projector's digest.
    projector: Option<String>,
    items: Vec<Item<'q>>,
    prompts: CacheStore,
    vision: Option<Vision>,
    /// Seconds of embedding pictures.
    encode: f64,
}

/// Lets the runtime look at every model without its weights; returns the reference.
fn preflight(setup: &Setup, runtime: &Arc<Runtime>) -> Result<Model, EvalError> {
    let reference = Model::load(runtime, &setup.reference, setup.compute, false)?;
    for path in &setup.candidates {
        let candidate = Model::load(runtime, path, setup.compute, false)?;
        let (width, expected) = (candidate.embedding_width(), reference.embedding_width());
        if width != expected {
            return Err(EvalError::Width { path: path.clone(), width, expected });
        }
        if candidate.vocab_size() != reference.vocab_size() {
            let what = format!("{} tokens against {}", reference.vocab_size(), candidate.vocab_size());
            let (candidate, reference) = (path.clone(), setup.reference.clone());
            return Err(EvalError::Vocabulary { candidate, reference, what });
        }
    }
    Ok(reference)
}

type Prepared<'q> = (Vec<Item<'q>>, Option<Vision>, f64);

/// Tokenises every prompt and embeds every picture that the cache lacks. Returns the seconds of embedding too.
fn prepare<'q>(
    setup: &Setup,
    questions: &'q Questions,
    model: Model,
    mmproj: Option<&Path>,
    prompts: &mut CacheStore,
    observer: &dyn Observer,
) -> Result<Prepared<'q>, EvalError> {
    let own = model.template();
    let template = || match &own {
        Some(Ok(template)) => Ok(template),
        Some(Err(problem)) => Err(EvalError::Template(setup.reference.clone(), problem.to_string())),
        None => Err(EvalError::NoTemplate(setup.reference.clone())),
    };
    let end = model.end_of_turn();
    let mut vision = None;
    let mut text_model = None;
    match mmproj {
        Some(path) if questions.has_images() => vision = Some(Vision::load(model, path, setup.compute)?),
        _ => text_model = Some(model),
    }
    let mut items = Vec::new();
    let mut encode = 0.0;
    for question in &questions.list {
        let model = match (&vision, &text_model) {
            (Some(v), _) => v.model(),
            (None, Some(m)) => m,
            // invariant: one of the two was set above.
            (None, None) => return Err(EvalError::NoTemplate(setup.reference.clone())),
        };
        let bytes = question.image.as_deref().map(image::load::read).transpose()?;
        let picture = bytes.as_deref().map(record::picture_key);
        let key = record::question_key(question, picture.as_ref());
        let known = match prompts.get(&key)? {
            Some(bytes) if picture.is_none_or(|p| prompts.has(&p)) => serde_json::from_slice(&bytes).ok(),
            _ => None,
        };
        let prompt = match known {
            Some(prompt) => prompt,
            None => {
                let clock = Instant::now();
                let pieces = tokenize(question, model, vision.as_ref(), bytes.as_deref(), &template, prompts)?;
                if question.image.is_some() {
                    encode += clock.elapsed().as_secs_f64();
                }
                let mut given = model.tokenize(&question.answer, false, false)?;
                if question.form == QuestionForm::Chat {
                    given.extend(end);
                }
                remember(&pieces, given, picture, key, prompts)?
            }
        };
        items.push(Item { question, key, picture, prompt });
        observer.event(Event::Advance { n: 1, detail: question.id.clone() });
    }
    Ok((items, vision, encode))
}

/// Keeps a prompt and the embeddings of its picture in the cache.
fn remember(
    pieces: &[Piece],
    given: Vec<Token>,
    picture: Option<CacheKey>,
    key: CacheKey,
    prompts: &mut CacheStore,
) -> Result<Prompt, EvalError> {
    let prompt = Prompt::new(pieces, given);
    if let Some(picture) = picture.filter(|picture| !prompts.has(picture)) {
        let media: Vec<_> =
            pieces.iter().filter_map(|p| if let Piece::Media(m) = p { Some(Arc::clone(m)) } else { None }).collect();
        prompts.put(picture, &record::media_to_bytes(&media))?;
    }
    // invariant: numbers always serialise.
    prompts.put(key, &serde_json::to_vec(&prompt).unwrap_or_default())?;
    Ok(prompt)
}

fn tokenize<'t>(
    question: &Question,
    model: &Model,
    vision: Option<&Vision>,
    bytes: Option<&[u8]>,
    template: &dyn Fn() -> Result<&'t ChatTemplate, EvalError>,
    prompts: &CacheStore,
) -> Result<Vec<Piece>, EvalError> {
    let turn = |pictures: usize| -> Result<String, EvalError> {
        Ok(template()?.prompt(&[Message::new("user", pictures, &question.text)])?)
    };
    Ok(match (question.form, &question.image, vision, bytes) {
        (QuestionForm::Raw, ..) => vec![Piece::Text(model.tokenize(&question.text, true, false)?)],
        (QuestionForm::Chat, Some(path), Some(vision), Some(bytes)) => {
            let embed = !prompts.has(&record::picture_key(bytes));
            let picture = image::decode_rgb(path, bytes)?;
            // As llama-mtmd-cli does it: the picture directly before the text.
            vision.tokenize(&turn(1)?, path, std::slice::from_ref(&picture))?.pieces(embed)?
        }
        (QuestionForm::Chat, ..) => vec![Piece::Text(model.tokenize(&turn(0)?, true, true)?)],
    })
}

/// Cells the longest question needs.
fn cells(setup: &Setup, items: &[Item], reference: &GgufFile) -> Result<usize, EvalError> {
    let limit = reference.arch_u64("context_length").unwrap_or(u64::MAX) as usize;
    let mut longest = 0;
    for item in items {
        let answer = item.prompt.given.len().max(setup.max_tokens);
        let tokens = item.prompt.tokens + answer;
        if tokens > limit {
            return Err(EvalError::TooLong { id: item.question.id.clone(), tokens, limit });
        }
        let own = setup.max_tokens.max(SPEED_TOKENS);
        longest = longest.max(item.prompt.tokens + item.prompt.given.len() + setup.max_tokens + own);
    }
    Ok(longest)
}

fn outcomes(items: &[Item], store: &mut CacheStore) -> Result<Vec<Answered>, EvalError> {
    let mut all = Vec::new();
    for item in items {
        let bytes = store.get(&item.key)?.unwrap_or_default();
        all.push(serde_json::from_slice(&bytes).map_err(|e| store.damaged(e.to_string()))?);
    }
    Ok(all)
}

/// The record that keeps a model's times.
const TIMES: CacheKey = [0; 32];

fn times(store: &mut CacheStore) -> Result<Times, EvalError> {
    Ok(store.get(&TIMES)?.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default())
}

/// The model's times so far; one that ran has decoded enough tokens to be timed.
fn finish(decoder: Option<Decoder>, store: &mut CacheStore) -> Result<Times, EvalError> {
    let Some(mut decoder) = decoder else { return times(store) };
    if decoder.times.decode_tokens < SPEED_TOKENS as u64 {
        decoder.time_decoding(SPEED_TOKENS)?;
    }
    add_times(store, &decoder.times)
}

fn add_times(store: &mut CacheStore, new: &Times) -> Result<Times, EvalError> {
    let old = times(store)?;
    let sum = Times {
        load: old.load + new.load,
        prefill: old.prefill + new.prefill,
        prefill_tokens: old.prefill_tokens + new.prefill_tokens,
        score: old.score + new.score,
        score_tokens: old.score_tokens + new.score_tokens,
        decode: old.decode + new.decode,
        decode_tokens: old.decode_tokens + new.decode_tokens,
    };
    // invariant: numbers always serialise.
    store.put(TIMES, &serde_json::to_vec(&sum).unwrap_or_default())?;
    Ok(sum)
}

struct Evaluation<'w> {
    setup: &'w Setup,
    runtime: &'w Arc<Runtime>,
    context: usize,
    observer: &'w dyn Observer,
}

impl Evaluation<'_> {
    fn load<'v>(&self, path: &Path, vision: Option<&'v Vision>) -> Result<Decoder<'v>, EvalError> {
        Ok(Decoder::load(self.runtime, path, self.setup.compute, self.context, vision)?)
    }

    fn phase(&self, name: &str, questions: usize) {
        self.observer.event(Event::PhaseStart { name: name.into(), total: questions as u64, unit: "questions" });
    }

    fn done(&self, item: &Item) {
        self.observer.event(Event::Advance { n: 1, detail: item.question.id.clone() });
    }

    fn prefill(&self, decoder: &mut Decoder, item: &Item, prompts: &mut CacheStore) -> Result<(), EvalError> {
        let media = match &item.picture {
            Some(key) => {
                let bytes = prompts.get(key)?.unwrap_or_default();
                record::media_from_bytes(&bytes).ok_or_else(|| prompts.damaged("a picture's record"))?
            }
            None => Vec::new(),
        };
        let pieces = item.prompt.with_media(&media).ok_or_else(|| prompts.damaged("a prompt's record"))?;
        Ok(decoder.prefill(&pieces)?)
    }

    /// Runs the reference on every question that its cache lacks: its greedy answer, then both answers in one
    /// batch, just as a candidate will run them.
    fn reference(&self, inputs: &mut Inputs, store: &mut CacheStore) -> Result<Times, EvalError> {
        let Inputs { items, prompts, vision, .. } = inputs;
        let mut decoder = None;
        for item in items.iter() {
            if !store.has(&item.key) {
                let decoder = match &mut decoder {
                    Some(d) => d,
                    none => none.insert(self.load(&self.setup.reference, vision.as_ref())?),
                };
                self.prefill(decoder, item, prompts)?;
                let greedy = match item.question.form {
                    QuestionForm::Chat => decoder.generate(&[], self.setup.max_tokens)?,
                    QuestionForm::Raw => Vec::new(),
                };
                let text = answer_text(decoder.model(), &greedy);
                let same = greedy == item.prompt.given;
                let answers = answers(&greedy, &item.prompt.given, same);
                let mut writer = ReferenceWriter::new(greedy.clone(), text);
                let mut numbers = true;
                decoder.score(&answers.each(), |a, k, logits| {
                    let (answer, tokens) = answers.list[a];
                    numbers &= writer.row(answer, tokens[k], logits);
                })?;
                if !numbers {
                    let path = self.setup.reference.clone();
                    return Err(EvalError::NotNumbers { id: item.question.id.clone(), path });
                }
                store.put(item.key, &writer.into_bytes(same))?;
            }
            self.done(item);
        }
        finish(decoder, store)
    }

    fn candidate(
        &self,
        header: &GgufFile,
        inputs: &mut Inputs,
        references: &mut CacheStore,
        store: &mut CacheStore,
    ) -> Result<Times, EvalError> {
        let Inputs { items, prompts, vision, .. } = inputs;
        let mut decoder = None;
        for item in items.iter() {
            if !store.has(&item.key) {
                let decoder = match &mut decoder {
                    Some(d) => d,
                    none => none.insert(self.load(&header.path, vision.as_ref())?),
                };
                let bytes = references.get(&item.key)?.unwrap_or_default();
                let reference = ReferenceRows::from_bytes(&bytes, decoder.model().vocab_size())
                    .ok_or_else(|| references.damaged("a question's record"))?;
                self.prefill(decoder, item, prompts)?;
                let outcome = self.measure(decoder, header, item, &reference, references)?;
                // invariant: finite numbers and strings always serialise.
                store.put(item.key, &serde_json::to_vec(&outcome).unwrap_or_default())?;
            }
            self.done(item);
        }
        finish(decoder, store)
    }

    fn measure(
        &self,
        decoder: &mut Decoder,
        header: &GgufFile,
        item: &Item,
        reference: &ReferenceRows,
        references: &CacheStore,
    ) -> Result<Answered, EvalError> {
        let head = &reference.head;
        let same = head.greedy == item.prompt.given;
        let answers = answers(&head.greedy, &item.prompt.given, same);
        let mut measures: [Measures; 2] = Default::default();
        let mut own = Vec::new();
        let (mut log_p, mut log_q) = (Vec::new(), Vec::new());
        let (mut numbers, mut whole) = (true, true);
        decoder.score(&answers.each(), |a, k, logits| {
            let (answer, tokens) = answers.list[a];
            stats::log_softmax(logits, &mut log_q);
            whole &= reference.row(answer, k, &mut log_p).is_some();
            let top = stats::argmax(logits) as Token;
            if answer == 0 {
                own.push(top);
            }
            let (kl, nll) = (stats::kl(&log_p, &log_q), -log_q[tokens[k] as usize]);
            numbers &= kl.is_finite() && nll.is_finite();
            let m = &mut measures[answer];
            m.kl.push(kl);
            m.nll.push(nll);
            m.nll_reference.push(head.nll[answer][k]);
            m.agree.push(top == head.top[answer][k]);
        })?;
        if !whole {
            return Err(references.damaged("a question's rows").into());
        }
        if !numbers {
            return Err(EvalError::NotNumbers { id: item.question.id.clone(), path: header.path.clone() });
        }
        if same {
            measures[1] = measures[0].clone();
        }
        let answer = match item.question.form {
            QuestionForm::Raw => String::new(),
            QuestionForm::Chat => self.own_answer(decoder, &own, &head.greedy)?,
        };
        Ok(Answered { measures, answer, reference: head.text.clone() })
    }

    /// A candidate's own greedy answer. As long as its first choices, `own`, are the reference's, it is the reference's;
    /// from the first difference on it goes its own way.
    fn own_answer(&self, decoder: &mut Decoder, own: &[Token], greedy: &[Token]) -> Result<String, EvalError> {
        let agreed = own.iter().zip(greedy).take_while(|(a, b)| a == b).count();
        let tokens = match own.get(agreed) {
            None => greedy.to_vec(),
            Some(next) => {
                let start = [&greedy[..agreed], &[*next]].concat();
                if decoder.model().ends(*next) { start } else { decoder.generate(&start, self.setup.max_tokens)? }
            }
        };
        Ok(answer_text(decoder.model(), &tokens))
    }
}

/// The answers to run: (0, greedy) unless there is none, and (1, given) unless it is the same.
struct Answers<'a> {
    list: Vec<(usize, &'a [Token])>,
}

impl<'a> Answers<'a> {
    fn each(&self) -> Vec<&'a [Token]> {
        self.list.iter().map(|(_, t)| *t).collect()
    }
}

fn answers<'a>(greedy: &'a [Token], given: &'a [Token], same: bool) -> Answers<'a> {
    let mut list = Vec::new();
    if !greedy.is_empty() {
        list.push((0, greedy));
    }
    if !same {
        list.push((1, given));
    }
    Answers { list }
}

/// A greedy answer as text, without the token that ended it.
fn answer_text(model: &Model, tokens: &[Token]) -> String {
    let end = tokens.len() - usize::from(tokens.last().is_some_and(|t| model.ends(*t)));
    model.text(&tokens[..end])
}
