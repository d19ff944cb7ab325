//! The addresses of the server, and what every request passes.
use super::error::ApiError;
use super::guard::Guard;
use super::job::Message;
use super::pictures::Pictures;
use super::{ModelCard, chat, page};
use crate::prompt::ChatTemplate;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedSender;

/// What all requests share.
pub struct App {
    pub card: ModelCard,
    pub guard: Guard,
    pub pictures: Pictures,
    pub template: ChatTemplate,
    pub jobs: UnboundedSender<Message>,
    /// A permit is a place in the server: in a slot or in the queue.
    pub places: Arc<Semaphore>,
    /// A permit is a slot; who waits for one is served in order.
    pub slots: Arc<Semaphore>,
    /// Pictures are decoded by two requests at a time: one may take half a gigabyte on the way.
    pub decoding: Semaphore,
    pub queue: usize,
    /// Bytes of a request's body, at most.
    pub body_limit: usize,
    /// For a whole request.
    pub timeout: Duration,
    /// One line for each request.
    pub log: bool,
}

/// Marks a response whose request is logged when its answer ends.
#[derive(Clone)]
pub struct LogsItself;

/// All addresses.
pub fn router(app: Arc<App>) -> Router {
    let mut router = Router::new()
        .route("/health", get(health))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat::completions));
    for address in page::addresses() {
        router = router
            .route(address, get(async move || page::file(address).unwrap_or_else(|| nothing_here().into_response())));
    }
    router
        .fallback(async || nothing_here())
        .method_not_allowed_fallback(async || {
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this address takes another method")
        })
        .layer(from_fn_with_state(app.clone(), every_request))
        .with_state(app)
}

fn nothing_here() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this address")
}

/// Guards, logs, and says that nothing may be taken for what it is not.
async fn every_request(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let checked = app.guard.check(&method, &path, request.uri().authority(), request.headers());
    let mut response = match checked {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let policy = HeaderName::from_static("cross-origin-resource-policy");
    headers.insert(policy, HeaderValue::from_static("same-origin"));
    if response.extensions().get::<LogsItself>().is_none() {
        app.log_line(&method, &path, response.status().as_u16(), start, "");
    }
    response
}

impl App {
    /// Tells of a request that is done, without anything of what was said.
    pub fn log_line(&self, method: &Method, path: &str, status: u16, start: Instant, more: &str) {
        if self.log {
            // Addresses are a stranger's words.
            let path: String = path.chars().take(80).flat_map(char::escape_default).collect();
            let time = chrono::Local::now().format("%H:%M:%S");
            let seconds = start.elapsed().as_secs_f64();
            let _ = writeln!(std::io::stderr(), "{time} {method} {path} {status} {seconds:.2} s{more}");
        }
    }
}

async fn health(State(app): State<Arc<App>>) -> Response {
    match app.jobs.is_closed() {
        false => Json(json!({"status": "ok"})).into_response(),
        true => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "model_ended", "the model has ended").into_response(),
    }
}

async fn models(State(app): State<Arc<App>>) -> Json<serde_json::Value> {
    Json(json!({"object": "list", "data": [app.card.object()]}))
}

async fn model(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<serde_json::Value>, ApiError> {
    let Path(id) = id.map_err(|error| ApiError::invalid("model", error.body_text()))?;
    app.check_model(&id).map(|()| Json(app.card.object()))
}

impl App {
    /// # Errors
    /// Another model than the one that is here.
    pub fn check_model(&self, id: &str) -> Result<(), ApiError> {
        if id == self.card.id {
            return Ok(());
        }
        let id: String = id.chars().take(100).collect();
        let message = format!("the model `{id}` is not here; this server has `{}`", self.card.id);
        let mut error = ApiError::new(StatusCode::NOT_FOUND, "model_not_found", message);
        error.param = Some("model".into());
        Err(error)
    }
}
