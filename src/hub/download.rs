//! A file of the hub into the cache that the Python library shares: its content in `blobs`, under the name that the server
//! gives that, and a link to it in the snapshot.
//!
//! Not hf-hub's own download: that makes paths of whatever the server says, and takes its answers for well-formed.
use super::{Hub, HubError, Repository, is_plain, shortened};
use crate::events::{Event, Observer};
use hf_hub::CacheRepo;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use ureq::Body;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, Uri};

/// Redirects, at most.
const HOPS: u32 = 10;

/// A file to come.
pub(super) struct Download<'a> {
    pub hub: &'a Hub,
    pub repository: &'a Repository,
    pub cache: CacheRepo,
    pub file: &'a str,
    pub observer: &'a dyn Observer,
}

impl Download<'_> {
    /// Brings the file to `path`, its place in the snapshot; a download that was interrupted goes on.
    ///
    /// # Errors
    /// The server refuses it, sends less than it promised, or says what makes no names; the disk fails.
    pub fn run(&self, path: &Path) -> Result<(), HubError> {
        let url = self.repository.api.url(self.file);
        let name = self.name(&url)?;
        let blob = self.cache.blob_path(&name);
        self.folder_of(&blob)?;
        let beside = |end: &str| blob.with_file_name(format!("{name}.{end}"));
        // Another process that downloads the same is waited for.
        let lock = File::create(beside("lock")).map_err(|e| self.io(e))?;
        lock.lock().map_err(|e| self.io(e))?;
        if !blob.exists() {
            let part = beside("part");
            self.content(&url, &part)?;
            std::fs::rename(&part, &blob).map_err(|e| self.io(e))?;
        }
        self.folder_of(path)?;
        link(&name, &blob, path).map_err(|e| self.io(e))?;
        self.cache.create_ref(&self.repository.commit).map_err(|e| self.io(e))
    }

    fn io(&self, source: std::io::Error) -> HubError {
        self.failed(source.into())
    }

    fn failed(&self, source: hf_hub::api::sync::ApiError) -> HubError {
        HubError::Download { id: self.repository.id.to_string(), file: self.file.into(), source }
    }

    fn answer(&self, what: &'static str, found: &str) -> HubError {
        HubError::Answer { id: self.repository.id.to_string(), what, found: shortened(found) }
    }

    fn folder_of(&self, path: &Path) -> Result<(), HubError> {
        path.parent().map_or(Ok(()), std::fs::create_dir_all).map_err(|e| self.io(e))
    }

    /// Asks for a part of the file; a refusal is an error.
    fn get(&self, url: &str, range: &str, hops: u32) -> Result<Response<Body>, HubError> {
        let mut request = ureq::get(url)
            .config()
            .http_status_as_error(false)
            .max_redirects(hops)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .build()
            .header("Range", range)
            .header("User-Agent", concat!("mbq-convert/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = &self.hub.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let response = request.call().map_err(|e| self.failed(Box::new(e).into()))?;
        let status = response.status();
        // There is nothing in the range: of an empty file, or behind all that is there.
        if status.is_success() || status.is_redirection() || status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(response);
        }
        let refusal = self.hub.refusal(&self.repository.id, Some(self.file), status.as_u16(), response.headers());
        Err(refusal.unwrap_or_else(|| self.failed(Box::new(ureq::Error::StatusCode(status.as_u16())).into())))
    }

    /// What the hub itself calls the content, before it leads to where that is.
    fn name(&self, url: &str) -> Result<String, HubError> {
        let mut url = url.to_string();
        for _ in 0..HOPS {
            let response = self.get(&url, "bytes=0-0", 0)?;
            let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
            // A repository that was renamed.
            if let Some(path) =
                header("Location").filter(|to| response.status().is_redirection() && to.starts_with('/'))
            {
                url = on_same_host(&url, path).ok_or_else(|| self.answer("a redirect", path))?;
                continue;
            }
            let etag = header("X-Linked-Etag").or(header("ETag")).unwrap_or_default();
            let blob = etag.trim_start_matches("W/").replace('"', "");
            if header("X-Repo-Commit") != Some(&self.repository.commit) {
                return Err(HubError::Changed { id: self.repository.id.to_string(), file: self.file.into() });
            }
            return if is_plain(&blob) { Ok(blob) } else { Err(self.answer("the ETag of a file", etag)) };
        }
        Err(self.answer("a redirect", &url))
    }

    /// Appends to `part` what it lacks of the content.
    fn content(&self, url: &str, part: &Path) -> Result<(), HubError> {
        let mut file = OpenOptions::new().append(true).create(true).open(part).map_err(|e| self.io(e))?;
        let mut there = file.metadata().map_err(|e| self.io(e))?.len();
        let response = self.get(url, &format!("bytes={there}-"), HOPS)?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {}
            StatusCode::RANGE_NOT_SATISFIABLE if there == 0 => return Ok(()),
            StatusCode::RANGE_NOT_SATISFIABLE => {
                file.set_len(0).map_err(|e| self.io(e))?;
                return self.content(url, part);
            }
            _ => {
                file.set_len(0).map_err(|e| self.io(e))?;
                there = 0;
            }
        }
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
        let range = header("Content-Range").and_then(|range| range.rsplit('/').next());
        let length = range.or(header("Content-Length")).unwrap_or_default();
        let expected: u64 = length.parse().map_err(|_| self.answer("the length of a file", length))?;
        let start = Event::PhaseStart { name: self.file.into(), total: expected, unit: "B" };
        self.observer.event(start);
        let advance = |n: u64| self.observer.event(Event::Advance { n, detail: String::new() });
        advance(there);
        // One byte more shows a server that does not stop.
        let mut body = response.into_body().into_reader().take((expected + 1).saturating_sub(there));
        let mut buffer = vec![0; 1 << 16];
        loop {
            let n = body.read(&mut buffer).map_err(|e| self.io(e))?;
            if n == 0 {
                break;
            }
            file.write_all(&buffer[..n]).map_err(|e| self.io(e))?;
            there += n as u64;
            advance(n as u64);
        }
        self.observer.event(Event::PhaseEnd);
        if there == expected {
            return Ok(());
        }
        if there > expected {
            // It would not become right by going on.
            let _ = std::fs::remove_file(part);
        }
        Err(HubError::Short { file: part.into(), found: there, expected })
    }
}

/// `url` with another path.
fn on_same_host(url: &str, path: &str) -> Option<String> {
    let uri: Uri = url.parse().ok()?;
    Some(format!("{}://{}{path}", uri.scheme_str()?, uri.authority()?))
}

/// Links `path`, in `snapshots/COMMIT`, to `blob`; moves it there where links are not to be had.
fn link(name: &str, blob: &Path, path: &Path) -> std::io::Result<()> {
    let to: PathBuf = ["..", "..", "blobs", name].iter().collect();
    if path.exists() {
        return Ok(());
    }
    // A link whose end is gone.
    let _ = std::fs::remove_file(path);
    #[cfg(unix)]
    return std::os::unix::fs::symlink(to, path).map_err(|e| std::io::Error::other(format!("{}: {e}", blob.display())));
    #[cfg(not(unix))]
    {
        #[cfg(windows)]
        if std::os::windows::fs::symlink_file(&to, path).is_ok() {
            return Ok(());
        }
        let _ = to;
        std::fs::rename(blob, path)
    }
}
