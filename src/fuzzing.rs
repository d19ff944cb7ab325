//! Parsers of outside input that are no part of the library's interface, for `tests/fuzz` and `tests/hostile.rs`.
use crate::prompt::Message;
use crate::serve::guard::Guard;
use crate::serve::pictures::{self, Pictures};
use crate::serve::request::ChatRequest;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use std::net::Ipv4Addr;
use std::path::Path;

/// The hub's answer about a repository, up to the paths that files would get.
///
/// # Errors
/// In words: what is refused.
pub fn hub_answer(json: &[u8]) -> Result<(), String> {
    crate::hub::check_answer(json)
}

/// The body of a chat request to a model that sees pictures, its pictures decoded; requests may name the files of `folder`.
///
/// # Errors
/// In words: what is refused.
pub fn chat_request(body: &[u8], folder: &Path) -> Result<Vec<Message>, String> {
    let allowed = Pictures { files: Some(folder.into()), vision: true };
    let request = ChatRequest::parse(body, &allowed).map_err(|e| e.message)?;
    pictures::decode(request.pictures).map_err(|e| e.message)?;
    Ok(request.messages)
}

/// The headers of a request, a line each, against the rules of a server of this machine with a key.
///
/// # Errors
/// In words: what is refused.
pub fn headers(lines: &[u8]) -> Result<(), String> {
    let guard = Guard { address: Ipv4Addr::LOCALHOST.into(), names: vec!["box.lan".into()], key: Some("key".into()) };
    let mut headers = HeaderMap::new();
    for line in lines.split(|b| *b == b'\n') {
        let at = line.iter().position(|b| *b == b':').unwrap_or(line.len());
        let (name, value) = (&line[..at], line.get(at + 1..).unwrap_or_default());
        let name = HeaderName::from_bytes(name).map_err(|e| e.to_string())?;
        headers.append(name, HeaderValue::from_bytes(value).map_err(|e| e.to_string())?);
    }
    guard.check(&Method::POST, "/v1/chat/completions", None, &headers).map_err(|e| e.message)
}
