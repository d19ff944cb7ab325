//! The page that people talk to the model on: files in the program.
mod files;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use files::FILES;

/// The page may load and reach nothing but this server; pictures may come from the clipboard or a file, too.
const POLICY: &str = "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'";

/// The file at `path`, if it is one of the page's.
pub fn file(path: &str) -> Option<Response> {
    let (_, kind, bytes) = FILES.iter().find(|(address, ..)| *address == path)?;
    let headers = [
        (header::CONTENT_TYPE, *kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    Some((StatusCode::OK, headers, *bytes).into_response())
}

/// The addresses of its files.
pub fn addresses() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(address, ..)| *address)
}
