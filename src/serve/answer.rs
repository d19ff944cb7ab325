//! Answers as OpenAI's clients read them: whole, or as a stream of events.
use super::error::ApiError;
use super::http::{App, LogsItself};
use super::job::{Event, Finish, PromptTokens};
use super::request::rand_seed;
use axum::Json;
use axum::http::{Method, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::Stream;

/// Where answers are asked for.
const PATH: &str = "/v1/chat/completions";

/// What all parts of an answer carry.
pub struct Identity {
    id: String,
    created: u64,
    model: String,
}

impl Identity {
    pub fn new(model: &str) -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let id = format!("chatcmpl-{:016x}{:016x}", rand_seed(), rand_seed());
        Identity { id, created: now.map_or(0, |d| d.as_secs()), model: model.into() }
    }

    fn object(&self, kind: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices})
    }
}

/// An answer that the model is at. Dropping it frees the slot.
pub struct Answer {
    pub app: Arc<App>,
    pub identity: Identity,
    pub prompt: PromptTokens,
    pub events: UnboundedReceiver<Event>,
    pub start: Instant,
    pub _permits: [OwnedSemaphorePermit; 2],
}

impl Answer {
    fn usage(&self, tokens: usize) -> Value {
        let PromptTokens { all, cached } = self.prompt;
        json!({
            "prompt_tokens": all,
            "completion_tokens": tokens,
            "total_tokens": all + tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        })
    }

    /// The answer in one piece.
    ///
    /// # Errors
    /// It fails on the way.
    pub async fn whole(mut self) -> Result<Response, ApiError> {
        let mut log = AnswerLog::new(&self);
        let mut text = String::new();
        let (finish, tokens, seconds) = loop {
            match self.events.recv().await {
                Some(Event::Started(_)) => {}
                Some(Event::Text(part)) => text += &part,
                Some(Event::Done { finish, tokens, seconds }) => break (finish, tokens, seconds),
                Some(Event::Failed(error)) => return Err(log.quiet(error)),
                None => return Err(log.quiet(ApiError::internal("the model has ended"))),
            }
        };
        log.done(tokens, seconds);
        let message = json!({"role": "assistant", "content": text, "refusal": null});
        let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": finish.word()});
        let mut object = self.identity.object("chat.completion", json!([choice]));
        object["usage"] = self.usage(tokens);
        let mut response = Json(object).into_response();
        response.extensions_mut().insert(LogsItself);
        Ok(response)
    }

    /// The answer as it comes.
    pub fn stream(self, include_usage: bool) -> Response {
        let log = AnswerLog::new(&self);
        let mut events = EventStream { answer: self, include_usage, ready: VecDeque::new(), ended: false, log };
        events.put_choice(json!({"role": "assistant", "content": "", "refusal": null}), None);
        let mut response = Sse::new(events).keep_alive(KeepAlive::default()).into_response();
        response.headers_mut().insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
        response.extensions_mut().insert(LogsItself);
        response
    }
}

/// Server-sent events: the role, texts, the reason of the end, the usage if it was asked for, and `[DONE]`.
struct EventStream {
    answer: Answer,
    include_usage: bool,
    ready: VecDeque<sse::Event>,
    ended: bool,
    log: AnswerLog,
}

impl EventStream {
    fn put(&mut self, object: &Value) {
        self.ready.push_back(sse::Event::default().data(object.to_string()));
    }

    fn put_choice(&mut self, delta: Value, finish: Option<Finish>) {
        let reason = finish.map(Finish::word);
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason});
        let mut object = self.answer.identity.object("chat.completion.chunk", json!([choice]));
        if self.include_usage {
            object["usage"] = Value::Null;
        }
        self.put(&object);
    }

    fn take(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Started(_)) => return,
            Some(Event::Text(text)) => return self.put_choice(json!({"content": text}), None),
            Some(Event::Done { finish, tokens, seconds }) => {
                self.put_choice(json!({}), Some(finish));
                if self.include_usage {
                    let mut object = self.answer.identity.object("chat.completion.chunk", json!([]));
                    object["usage"] = self.answer.usage(tokens);
                    self.put(&object);
                }
                self.log.done(tokens, seconds);
            }
            Some(Event::Failed(error)) => {
                self.log.failed(&error);
                self.put(&error.body());
            }
            None => {
                let error = ApiError::internal("the model has ended");
                self.log.failed(&error);
                self.put(&error.body());
            }
        }
        self.ended = true;
        self.ready.push_back(sse::Event::default().data("[DONE]"));
    }
}

impl Stream for EventStream {
    type Item = Result<sse::Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            let event = ready!(self.answer.events.poll_recv(context));
            self.take(event);
        }
    }
}

/// Tells of an answer when it is done with, however it ends.
struct AnswerLog {
    app: Arc<App>,
    prompt: PromptTokens,
    start: Instant,
    line: Option<(u16, String)>,
}

impl AnswerLog {
    fn new(answer: &Answer) -> Self {
        let line = Some((499, ", the client left".into()));
        AnswerLog { app: answer.app.clone(), prompt: answer.prompt, start: answer.start, line }
    }

    fn done(&mut self, tokens: usize, seconds: f64) {
        let PromptTokens { all, cached } = self.prompt;
        let speed = match tokens {
            0 | 1 => String::new(),
            _ if seconds <= 0.0 => String::new(),
            _ => format!(", {:.1} tokens/s", (tokens - 1) as f64 / seconds),
        };
        self.line = Some((200, format!(", prompt {all} tokens ({cached} cached), answer {tokens}{speed}")));
    }

    /// Of a stream that has begun.
    fn failed(&mut self, error: &ApiError) {
        self.line = Some((200, format!(", cut off: {}", error.code.unwrap_or("error"))));
    }

    /// Leaves the line to the one of the response.
    fn quiet(&mut self, error: ApiError) -> ApiError {
        self.line = None;
        error
    }
}

impl Drop for AnswerLog {
    fn drop(&mut self) {
        if let Some((status, more)) = self.line.take() {
            self.app.log_line(&Method::POST, PATH, status, self.start, &more);
        }
    }
}
