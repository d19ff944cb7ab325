//! Who may ask: no page of another site, and nobody without the key where there is one.
use super::error::ApiError;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, StatusCode, header};
use std::net::IpAddr;
use subtle::ConstantTimeEq;

/// What a request must show.
#[derive(Debug, Clone)]
pub struct Guard {
    /// The address that the server listens on.
    pub address: IpAddr,
    /// Names that it may be called by, beside its address and this machine's own.
    pub names: Vec<String>,
    pub key: Option<String>,
}

impl Guard {
    /// Checks a request's headers. `authority` is the request line's, where it has one.
    ///
    /// # Errors
    /// 403 or 401.
    pub fn check(
        &self,
        method: &Method,
        path: &str,
        authority: Option<&Authority>,
        headers: &HeaderMap,
    ) -> Result<(), ApiError> {
        let forbidden = |code, message: &str| Err(ApiError::new(StatusCode::FORBIDDEN, code, message));
        // A site whose name was made to lead here (DNS rebinding) is known by its name.
        let host = match authority {
            Some(authority) => Some(authority.clone()),
            None => one(headers, header::HOST).and_then(|host| host.parse().ok()),
        };
        if !host.is_some_and(|host| self.is_own(host.host())) {
            return forbidden(
                "wrong_host",
                "this server does not go by the name in the Host header (--allow-host NAME)",
            );
        }
        // Other sites' pages may send, though not read, unless they are refused. Browsers say on whose page they are.
        let is_safe = method == Method::GET || method == Method::HEAD;
        if !is_safe && headers.contains_key(header::ORIGIN) && !self.is_own_origin(headers) {
            return forbidden("wrong_origin", "pages of other sites may not use this server");
        }
        let needs_key = path.starts_with("/v1/");
        match &self.key {
            Some(key) if needs_key && !has_key(headers, key) => {
                let message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`";
                Err(ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message))
            }
            _ => Ok(()),
        }
    }

    /// Whether a name in a URL is this server's. Every address in figures is where a request may come from any address:
    /// rebinding needs a name.
    fn is_own(&self, host: &str) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        match address {
            Ok(address) => address.is_loopback() || address == self.address || self.address.is_unspecified(),
            Err(_) => host == "localhost" || self.names.iter().any(|name| name.eq_ignore_ascii_case(&host)),
        }
    }

    fn is_own_origin(&self, headers: &HeaderMap) -> bool {
        let Some(origin) = one(headers, header::ORIGIN) else { return false };
        let Some(rest) = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://")) else {
            return false;
        };
        let same = |a: &Authority, b: &Authority| a.as_str().eq_ignore_ascii_case(b.as_str());
        let host = one(headers, header::HOST).and_then(|host| host.parse::<Authority>().ok());
        // Another program of this machine has a page of its own on another port.
        rest.parse::<Authority>().is_ok_and(|origin| host.is_some_and(|host| same(&origin, &host)))
    }
}

/// The value of a header that comes once.
fn one(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    let mut all = headers.get_all(name).iter();
    match (all.next(), all.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// Takes as long for a key that is nearly right as for one that is wrong.
fn has_key(headers: &HeaderMap, key: &str) -> bool {
    let Some(given) = one(headers, header::AUTHORIZATION) else { return false };
    let Some((scheme, given)) = given.split_once(' ') else { return false };
    scheme.eq_ignore_ascii_case("bearer") && bool::from(given.trim().as_bytes().ct_eq(key.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(guard: &Guard, method: Method, path: &str, headers: &[(header::HeaderName, &str)]) -> u16 {
        let headers = headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
        guard.check(&method, path, None, &headers).err().map_or(200, |e| e.status.as_u16())
    }

    fn local() -> Guard {
        Guard { address: "127.0.0.1".parse().unwrap(), names: vec!["box.lan".into()], key: None }
    }

    #[test]
    fn only_own_names_are_answered() {
        let get = |guard: &Guard, host: &str| status(guard, Method::GET, "/v1/models", &[(header::HOST, host)]);
        for host in
            ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "[::1]:8080", "127.0.0.1:9", "Box.lan", "localhost."]
        {
            assert_eq!(get(&local(), host), 200, "{host}");
        }
        for host in
            ["evil.example", "evil.example:8080", "192.168.1.2", "localhost.evil.example", "127.0.0.1.nip.io", "", "@"]
        {
            assert_eq!(get(&local(), host), 403, "{host}");
        }
        assert_eq!(status(&local(), Method::GET, "/", &[]), 403, "no Host at all");
        assert_eq!(
            status(&local(), Method::GET, "/", &[(header::HOST, "localhost"), (header::HOST, "localhost")]),
            403
        );
        let open = Guard { address: "0.0.0.0".parse().unwrap(), ..local() };
        assert_eq!((get(&open, "192.168.1.2:8080"), get(&open, "evil.example")), (200, 403));
    }

    #[test]
    fn other_sites_pages_may_not_send() {
        let post = |origin: &str| {
            let headers = [(header::HOST, "localhost:8080"), (header::ORIGIN, origin)];
            status(&local(), Method::POST, "/v1/chat/completions", &headers)
        };
        assert_eq!(post("http://localhost:8080"), 200);
        for origin in ["https://evil.example", "null", "http://localhost:3000", "http://localhost", "file://", ""] {
            assert_eq!(post(origin), 403, "{origin}");
        }
        assert_eq!(status(&local(), Method::POST, "/v1/x", &[(header::HOST, "localhost")]), 200, "no browser");
    }

    #[test]
    fn the_key_is_asked_for() {
        let guard = Guard { key: Some("secret".into()), ..local() };
        let with = |path: &str, key: &str| {
            status(&guard, Method::GET, path, &[(header::HOST, "localhost"), (header::AUTHORIZATION, key)])
        };
        assert_eq!((with("/v1/models", "Bearer secret"), with("/v1/models", "bearer secret")), (200, 200));
        for key in ["Bearer secre", "Bearer secrets", "Basic secret", "secret", "Bearer", "Bearer "] {
            assert_eq!(with("/v1/models", key), 401, "{key}");
        }
        assert_eq!((with("/", "x"), with("/health", "x")), (200, 200));
        assert_eq!(status(&guard, Method::GET, "/v1/models", &[(header::HOST, "localhost")]), 401);
    }
}
