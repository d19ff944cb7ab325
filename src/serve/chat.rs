//! `POST /v1/chat/completions`: a request's way from its body to its answer.
use super::answer::{Answer, Identity};
use super::error::ApiError;
use super::http::App;
use super::job::{Event, Job, Message, PromptTokens};
use super::pictures::decode;
use super::request::ChatRequest;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::spawn_blocking;
use tokio::time::{timeout, timeout_at};
use tokio_stream::StreamExt;

/// For a body to come: who sends half of one keeps others out meanwhile.
const BODY_TIME: Duration = Duration::from_secs(30);

/// Answers.
pub async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let start = Instant::now();
    let deadline = start + app.timeout;
    check_headers(&app, request.headers())?;
    let place = app.places.clone().try_acquire_owned().map_err(|_| ApiError::busy(app.queue))?;
    let body = body_within(BODY_TIME.min(app.timeout), request.into_body(), app.body_limit).await?;
    let its_app = app.clone();
    let chat = blocking(move || ChatRequest::parse(&body, &its_app.pictures)).await??;
    if let Some(model) = &chat.model {
        app.check_model(model)?;
    }
    let slot = within(&app, deadline, app.slots.clone().acquire_owned()).await?.map_err(|_| ApiError::stopping())?;
    let wanted = (chat.stream, chat.include_usage);
    let (prompt, events) = submit(&app, chat, deadline).await?;
    let identity = Identity::new(&app.card.id);
    let answer = Answer { app, identity, prompt, events, start, _permits: [place, slot] as [OwnedSemaphorePermit; 2] };
    match wanted {
        (true, include_usage) => Ok(answer.stream(include_usage)),
        (false, _) => answer.whole().await,
    }
}

/// # Errors
/// A body of another type, or one that says that it is too long.
fn check_headers(app: &App, headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        let message = "the Content-Type must be application/json";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > app.body_limit as u64) {
        return Err(too_large(app.body_limit));
    }
    Ok(())
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("the body is longer than {limit} bytes (--max-body)");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

/// Reads a body that must be there in `time`, however steadily it comes.
async fn body_within(time: Duration, of: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    timeout(time, body(of, limit)).await.unwrap_or_else(|_| {
        let message = format!("the body did not come within {} seconds", time.as_secs());
        Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message))
    })
}

/// Reads a body, counting.
async fn body(body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut stream = body.into_data_stream();
    while let Some(part) = stream.next().await {
        let part = part.map_err(|error| {
            ApiError::new(StatusCode::BAD_REQUEST, "unreadable_body", format!("the body cannot be read: {error}"))
        })?;
        if bytes.len() + part.len() > limit {
            return Err(too_large(limit));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes)
}

/// Waits no longer than the request may take.
async fn within<T>(app: &App, deadline: Instant, work: impl Future<Output = T>) -> Result<T, ApiError> {
    timeout_at(deadline.into(), work).await.map_err(|_| ApiError::timeout(app.timeout.as_secs()))
}

/// Work that would hold up other requests.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    spawn_blocking(work).await.map_err(|error| ApiError::internal(format!("a request cannot be worked on: {error}")))
}

/// Sends a request to the model, and waits until that takes it.
async fn submit(
    app: &Arc<App>,
    chat: ChatRequest,
    deadline: Instant,
) -> Result<(PromptTokens, UnboundedReceiver<Event>), ApiError> {
    let ChatRequest { messages, pictures, sampling, stop, max_tokens, ignore_eos, .. } = chat;
    let prompt = {
        let app = app.clone();
        blocking(move || app.template.prompt(&messages)).await?
    };
    let prompt = prompt.map_err(|error| ApiError::invalid("messages", error.to_string()))?;
    let turn = app.decoding.acquire().await.map_err(|_| ApiError::stopping())?;
    let pictures = blocking(move || decode(pictures)).await??;
    drop(turn);
    let (sender, mut events) = unbounded_channel();
    let timeout = app.timeout.as_secs();
    let job = Job { prompt, pictures, sampling, stop, max_tokens, ignore_eos, deadline, timeout, events: sender };
    let ended = || ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "model_ended", "the model has ended; start it again");
    app.jobs.send(Message::Job(Box::new(job))).map_err(|_| ended())?;
    match events.recv().await {
        Some(Event::Started(prompt)) => Ok((prompt, events)),
        Some(Event::Failed(error)) => Err(error),
        _ => Err(ended()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use tokio_stream::Stream;

    /// `part` again and again, a millisecond between them.
    fn trickle(part: &'static [u8], times: usize) -> Body {
        let parts = tokio_stream::iter(0..times).then(move |_| async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            Ok::<_, Infallible>(part)
        });
        Body::from_stream(parts)
    }

    fn never() -> impl Stream<Item = Result<&'static [u8], Infallible>> + Send {
        tokio_stream::pending()
    }

    #[tokio::test]
    async fn a_body_has_a_time_and_a_length() {
        let (start, soon) = (Instant::now(), Duration::from_millis(50));
        let refusal = async |body: Body| body_within(soon, body, 1 << 20).await.map_err(|e| e.status.as_u16());
        let read = body_within(Duration::from_secs(60), trickle(b"ab", 3), 6).await;
        assert_eq!(read.unwrap(), b"ababab");
        assert_eq!(refusal(Body::from_stream(never())).await, Err(408), "nothing comes");
        let half = tokio_stream::once(Ok(b"half".as_slice())).chain(never());
        assert_eq!(refusal(Body::from_stream(half)).await, Err(408), "half of it");
        assert_eq!(refusal(trickle(b"a", 1_000_000)).await, Err(408), "steadily, but slowly");
        assert!(start.elapsed() < Duration::from_secs(20), "it is the time given that counts");
        let long = body_within(Duration::from_secs(60), trickle(b"ab", 4), 7).await.unwrap_err();
        assert_eq!((long.status.as_u16(), long.code), (413, Some("request_too_large")));
    }
}
