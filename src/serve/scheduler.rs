//! The model's thread: slots, and whose tokens come next.
//!
//! Every slot is a sequence of the model's cache. A step reads one portion of one prompt (512 tokens, or a picture) and
//! then one token for all answers that are being written, in one batch. So a long prompt does not stop the answers of
//! others for longer than a portion takes, and a prompt is cut into the same portions whoever else is there.
use super::answer_text::AnswerText;
use super::error::ApiError;
use super::job::{Event, Finish, Job, Message, PromptTokens};
use super::prompt::{PictureCache, Prompt, Unit};
use super::sampler::Sampler;
use crate::runtime::engine::{BatchEntry, EngineError, Sequences, Token, Vision};
use axum::http::StatusCode;
use std::collections::VecDeque;
use std::time::Instant;
use tokio::sync::mpsc::UnboundedReceiver;

/// Sequences at work on jobs.
pub struct Scheduler<'v> {
    pub sequences: Sequences,
    pub vision: Option<&'v Vision>,
    pub inbox: UnboundedReceiver<Message>,
    pub pictures: PictureCache,
    pub slots: Vec<Slot<'v>>,
    /// Tokens that a slot holds.
    pub context: usize,
    /// Tokens of a portion.
    pub batch: usize,
    /// Bytes of the vocabulary's longest token.
    pub longest_token: usize,
    /// The vocabulary puts a space in front of an answer.
    pub leading_space: bool,
    pub waiting: VecDeque<Job>,
    /// Steps so far.
    pub clock: u64,
}

/// A sequence of the cache.
#[derive(Default)]
pub struct Slot<'v> {
    /// What the cache holds, with the position behind each unit.
    held: Vec<(Unit, i32)>,
    running: Option<Running<'v>>,
    /// When it was used last.
    used: u64,
}

/// A job in a slot.
struct Running<'v> {
    job: Job,
    prompt: Prompt<'v>,
    sampler: Sampler,
    text: AnswerText,
    /// Tokens of the answer, at most.
    limit: usize,
    /// Tokens of the answer so far.
    tokens: usize,
    /// The answer's last token, which is not in the cache yet; none while the prompt is read.
    next: Option<Token>,
    /// When its first token was there.
    first: Option<Instant>,
}

impl Slot<'_> {
    /// Position behind what it holds.
    fn past(&self) -> i32 {
        self.held.last().map_or(0, |(_, end)| *end)
    }

    /// How many of `units` it holds already. The last is always read again: its logits are wanted.
    fn shared(&self, units: &[Unit]) -> usize {
        let limit = units.len().saturating_sub(1);
        self.held.iter().zip(&units[..limit]).take_while(|((held, _), unit)| held == *unit).count()
    }

    /// Reads its prompt.
    fn reads(&self) -> bool {
        self.running.as_ref().is_some_and(|running| running.next.is_none())
    }
}

impl<'v> Scheduler<'v> {
    /// Works until the server ends.
    pub fn run(mut self) {
        while self.take_jobs() {
            self.clock += 1;
            self.end_jobs();
            self.begin_jobs();
            self.read_prompts();
            self.write_answers();
        }
        let error = ApiError::stopping();
        for job in self.waiting.drain(..).chain(self.slots.iter_mut().filter_map(|s| Some(s.running.take()?.job))) {
            let _ = job.events.send(Event::Failed(error.clone()));
        }
    }

    /// Takes in what was sent; sleeps where there is nothing to do. False: the server ends.
    fn take_jobs(&mut self) -> bool {
        let mut message = match self.waiting.is_empty() && self.slots.iter().all(|slot| slot.running.is_none()) {
            true => self.inbox.blocking_recv().or(Some(Message::Stop)),
            false => self.inbox.try_recv().ok(),
        };
        while let Some(Message::Job(job)) = message {
            self.waiting.push_back(*job);
            message = self.inbox.try_recv().ok();
        }
        message.is_none()
    }

    /// Ends jobs whose client is gone or whose time is over.
    fn end_jobs(&mut self) {
        let now = Instant::now();
        let is_over = |job: &Job| {
            if job.deadline < now {
                let _ = job.events.send(Event::Failed(ApiError::timeout(job.timeout)));
            }
            job.deadline < now || job.events.is_closed()
        };
        self.waiting.retain(|job| !is_over(job));
        for slot in &mut self.slots {
            slot.running.take_if(|running| is_over(&running.job));
        }
    }

    /// Gives waiting jobs free slots.
    fn begin_jobs(&mut self) {
        while self.slots.iter().any(|slot| slot.running.is_none())
            && let Some(mut job) = self.waiting.pop_front()
        {
            match self.tokenize(&mut job) {
                Ok(prompt) => self.begin(job, prompt),
                Err(error) => drop(job.events.send(Event::Failed(error))),
            }
        }
    }

    /// # Errors
    /// A prompt that is longer than a slot, or that the runtime does not take.
    fn tokenize(&self, job: &mut Job) -> Result<Prompt<'v>, ApiError> {
        // So much text cannot fit, and need not be tokenised to know it.
        let least = job.prompt.len() / self.longest_token.max(1);
        if least >= self.context {
            return Err(self.too_long(&format!("at least {least}")));
        }
        let pictures = !job.pictures.is_empty();
        let prompt = Prompt::new(job, self.sequences.model(), self.vision).map_err(|error| match error {
            EngineError::Picture { .. } if pictures => ApiError::invalid("messages", error.to_string()),
            error => failed(error),
        })?;
        let tokens = prompt.tokens();
        if tokens >= self.context {
            return Err(self.too_long(&tokens.to_string()));
        }
        match prompt.units.last() {
            Some(Unit::Token(_)) => Ok(prompt),
            _ => Err(ApiError::invalid(
                "messages",
                "the model's chat template makes a prompt of them that ends without text",
            )),
        }
    }

    fn too_long(&self, tokens: &str) -> ApiError {
        let message = format!(
            "the messages take {tokens} tokens; with room for an answer this server's context of {} has too few (--context \
             makes it larger, smaller pictures take less of it)",
            self.context
        );
        let mut error = ApiError::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message);
        error.param = Some("messages".into());
        error
    }

    /// Gives a job the free slot that holds most of its prompt, if that is worth it, else the one that was idle longest.
    fn begin(&mut self, job: Job, prompt: Prompt<'v>) {
        let worth = |slot: &Slot| {
            let shared = slot.shared(&prompt.units);
            // A common system prompt alone is no reason to forget another conversation.
            if shared * 2 >= slot.held.len() { shared } else { 0 }
        };
        let free = (0..self.slots.len()).filter(|&i| self.slots[i].running.is_none());
        let best = free.max_by_key(|&i| (worth(&self.slots[i]), std::cmp::Reverse(self.slots[i].used)));
        // invariant: only called with a free slot.
        let Some(index) = best else { return };
        let shared = self.slots[index].shared(&prompt.units);
        self.forget_from(index, shared);
        let slot = &mut self.slots[index];
        let all = prompt.tokens();
        let cached = slot.held.iter().map(|(unit, _)| unit.tokens()).sum();
        let _ = job.events.send(Event::Started(PromptTokens { all, cached }));
        let room = self.context - all;
        let limit = job.max_tokens.unwrap_or(room).min(room);
        let sampler = Sampler::new(job.sampling.clone());
        let text = AnswerText::new(job.stop.clone(), self.leading_space);
        slot.used = self.clock;
        slot.running = Some(Running { job, prompt, sampler, text, limit, tokens: 0, next: None, first: None });
    }

    /// Forgets all but the first `count` units of a slot, or all where the model can do no less.
    fn forget_from(&mut self, index: usize, count: usize) {
        let slot = &mut self.slots[index];
        slot.held.truncate(count);
        if !self.sequences.cut(index as i32, slot.past()) {
            slot.held.clear();
            self.sequences.cut(index as i32, 0);
        }
    }

    /// Reads a portion of the prompt whose turn it is: that of the slot that was used longest ago.
    fn read_prompts(&mut self) {
        let reading = (0..self.slots.len()).filter(|&i| self.slots[i].reads());
        let Some(index) = reading.min_by_key(|&i| self.slots[i].used) else { return };
        self.slots[index].used = self.clock;
        if let Err(error) = self.read_portion(index) {
            self.fail(index, error);
        }
    }

    fn read_portion(&mut self, index: usize) -> Result<(), ApiError> {
        let Scheduler { sequences, vision, pictures, slots, batch, .. } = self;
        let slot = &mut slots[index];
        let (at, mut past) = (slot.held.len(), slot.past());
        let Some(running) = &mut slot.running else { return Ok(()) };
        let units = &running.prompt.units;
        if let Some(&unit @ Unit::Picture { key, .. }) = units.get(at) {
            let media = match pictures.get(&key) {
                Some(media) => media,
                None => {
                    let media = running.prompt.embed(at, |key| pictures.has(key))?;
                    pictures.put(key, media.clone());
                    media
                }
            };
            let end = sequences.decode_media(*vision, &media, past, index as i32).map_err(failed)?;
            slot.held.push((unit, end));
            return Ok(());
        }
        let text = units[at..].iter().map_while(|unit| if let Unit::Token(token) = unit { Some(*token) } else { None });
        let mut entries = Vec::new();
        for token in text.take(*batch) {
            let output = at + entries.len() + 1 == units.len();
            entries.push(BatchEntry { token, position: past, sequence: index as i32, output });
            past += 1;
        }
        let mut first = None;
        sequences.decode(&entries, |_, logits| first = Some(running.sampler.next(logits))).map_err(failed)?;
        slot.held.extend(entries.iter().map(|e| (Unit::Token(e.token), e.position + 1)));
        if let Some(token) = first {
            self.answer(index, token)?;
        }
        Ok(())
    }

    /// One token for every answer that is being written.
    fn write_answers(&mut self) {
        let mut entries = Vec::new();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if let Some(token) = slot.running.as_ref().and_then(|running| running.next) {
                let position = slot.past();
                entries.push(BatchEntry { token, position, sequence: index as i32, output: true });
                slot.held.push((Unit::Token(token), position + 1));
                slot.used = self.clock;
            }
        }
        if entries.is_empty() {
            return;
        }
        let mut chosen = Vec::new();
        let Scheduler { sequences, slots, .. } = self;
        let decoded = sequences.decode(&entries, |i, logits| {
            let running = slots[entries[i].sequence as usize].running.as_mut();
            chosen.push(running.and_then(|running| running.sampler.next(logits)));
        });
        match decoded {
            Ok(()) => {
                for (entry, token) in entries.iter().zip(chosen) {
                    if let Err(error) = self.answer(entry.sequence as usize, token) {
                        self.fail(entry.sequence as usize, error);
                    }
                }
            }
            Err(error) => {
                let error = failed(error);
                entries.iter().for_each(|e| self.fail(e.sequence as usize, error.clone()));
            }
        }
    }

    /// Hands out an answer's next token.
    ///
    /// # Errors
    /// There is none: the model's logits are no numbers.
    fn answer(&mut self, index: usize, token: Option<Token>) -> Result<(), ApiError> {
        let slot = &mut self.slots[index];
        let Some(running) = &mut slot.running else { return Ok(()) };
        let token =
            token.ok_or_else(|| ApiError::internal("the model gives logits that are not numbers; it is broken"))?;
        let model = self.sequences.model();
        running.tokens += 1;
        running.next = Some(token);
        let seconds = running.first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
        let (mut text, mut finish) = (String::new(), None);
        if model.ends(token) && !running.job.ignore_eos {
            finish = Some(Finish::Stop);
        } else {
            let (part, stopped) = running.text.push(&model.words(token));
            text = part;
            if stopped {
                finish = Some(Finish::Stop);
            } else if running.tokens >= running.limit {
                finish = Some(Finish::Length);
            }
        }
        if finish.is_some() {
            text += &running.text.finish();
        }
        let events = &running.job.events;
        // A client that is gone is found out in the next step.
        if !text.is_empty() {
            let _ = events.send(Event::Text(text));
        }
        if let Some(finish) = finish {
            let _ = events.send(Event::Done { finish, tokens: running.tokens, seconds });
            slot.running = None;
        }
        Ok(())
    }

    /// Ends a job that failed; what its slot holds is not relied on any more.
    fn fail(&mut self, index: usize, error: ApiError) {
        if let Some(running) = self.slots[index].running.take() {
            let _ = running.job.events.send(Event::Failed(error));
        }
        self.forget_from(index, 0);
    }
}

fn failed(error: EngineError) -> ApiError {
    ApiError::internal(error.to_string())
}
