//! What the HTTP side and the model's thread say to each other.
use super::error::ApiError;
use super::pictures::Picture;
use super::sampler::Sampling;
use std::time::Instant;
use tokio::sync::mpsc::UnboundedSender;

/// What is sent to the model.
pub enum Message {
    Job(Box<Job>),
    /// The server ends.
    Stop,
}

/// A prompt that wants an answer.
pub struct Job {
    /// As the model's template words it, a mark for each picture.
    pub prompt: String,
    pub pictures: Vec<Picture>,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub max_tokens: Option<usize>,
    /// Goes on behind the model's own end, up to `max_tokens`.
    pub ignore_eos: bool,
    /// When the answer must be complete.
    pub deadline: Instant,
    /// Seconds that it had, for the message.
    pub timeout: u64,
    /// As many as the answer has tokens, so that it needs no bound. Closed: nobody waits for the answer any more.
    pub events: UnboundedSender<Event>,
}

/// What becomes of a job: `Started`, texts and `Done`; or `Failed` at any time.
#[derive(Debug)]
pub enum Event {
    /// The prompt is taken.
    Started(PromptTokens),
    Text(String),
    Done {
        finish: Finish,
        /// Tokens of the answer, the one that ended it too.
        tokens: usize,
        /// From the first of them to the last.
        seconds: f64,
    },
    Failed(ApiError),
}

/// Tokens of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptTokens {
    pub all: usize,
    /// Of these, what the slot held already.
    pub cached: usize,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// By the model's own end, or a stop string.
    Stop,
    /// By `max_tokens` or the end of the context.
    Length,
}

impl Finish {
    /// OpenAI's word.
    pub fn word(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
        }
    }
}
