//! Why a request is refused, as OpenAI's clients read it.
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// A refusal: a status and OpenAI's error object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    pub message: String,
    /// The field that is wrong, `messages[0].content`.
    pub param: Option<String>,
    pub code: Option<&'static str>,
    /// Seconds after which another try may succeed.
    pub retry_after: Option<u32>,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        ApiError { status, message: message.into(), param: None, code: Some(code), retry_after: None }
    }

    /// A field with a value that cannot be.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        error.param = Some(param.into());
        error
    }

    /// A field that would change the answer, and which this server does not know.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        ApiError { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// The runtime failed.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// All places are taken.
    pub fn busy(waiting: usize) -> Self {
        let message = format!("all slots are busy and {waiting} requests wait already; try again later");
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_busy", message);
        error.retry_after = Some(2);
        error
    }

    /// The server ends.
    pub fn stopping() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_stopping",
            "the server is being stopped; the answer is cut off",
        )
    }

    /// The time for a request is over.
    pub fn timeout(seconds: u64) -> Self {
        let message = format!("the answer was not complete within {seconds} seconds (--timeout)");
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
    }

    /// The object `{"error": …}`.
    pub fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
