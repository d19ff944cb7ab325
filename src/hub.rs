//! Downloads from the Hugging Face hub into its shared cache.
//!
//! hf-hub 0.5, not 1.0: its blocking client needs 67 crates where 1.0 brings tokio, reqwest and 297, and it knows the
//! same cache layout. Files are downloaded here.
mod download;

use crate::events::Observer;
use download::Download;
use hf_hub::api::RepoInfo;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// `org/name[@revision]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    pub name: String,
    pub revision: String,
}

impl FromStr for HubId {
    type Err = HubError;

    fn from_str(id: &str) -> Result<Self, HubError> {
        let (name, revision) = id.split_once('@').unwrap_or((id, "main"));
        let part_ok = |p: &str| {
            !p.is_empty()
                && !p.starts_with('.')
                && p.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        let parts: Vec<&str> = name.split('/').collect();
        let revision_ok = revision.split('/').all(part_ok);
        if parts.len() != 2 || !parts.into_iter().all(part_ok) || !revision_ok {
            return Err(HubError::Id { id: id.into() });
        }
        Ok(HubId { name: name.into(), revision: revision.into() })
    }
}

impl HubId {
    fn repo(&self) -> Repo {
        Repo::with_revision(self.name.clone(), RepoType::Model, self.revision.clone())
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.name),
            revision => write!(f, "{}@{revision}", self.name),
        }
    }
}

/// Where the hub is and where its files are kept.
#[derive(Debug, Clone)]
pub struct Hub {
    /// `https://huggingface.co`, or a mirror.
    pub endpoint: String,
    /// The cache directory itself (`…/huggingface/hub`).
    pub cache: PathBuf,
    pub token: Option<String>,
    /// Never ask the network.
    pub offline: bool,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    #[error("{id}: neither a directory nor a hub id (org/name or org/name@revision)")]
    Id { id: String },
    #[error("{id}: not in the cache {cache}, and --offline forbids a download")]
    Offline { id: String, cache: PathBuf },
    #[error(
        "{id}: {endpoint} has no such model or revision, or it is private (set HF_TOKEN to a token that may read it){said}"
    )]
    NotFound { id: String, endpoint: String, said: String },
    #[error("{id}: the model has no such revision{said}")]
    Revision { id: String, said: String },
    #[error("{id}: {endpoint} has no file {file} of the model{said}")]
    File { id: String, endpoint: String, file: String, said: String },
    #[error("{id}: accept the licence at {endpoint}/{name}, then {then}{said}")]
    Gated { id: String, endpoint: String, name: String, then: &'static str, said: String },
    #[error(
        "{id}: {endpoint} does not know the access token: HF_TOKEN, or what `hf auth login` stored, is mistyped, expired \
         or revoked; make one at {endpoint}/settings/tokens{said}"
    )]
    Token { id: String, endpoint: String, said: String },
    #[error("{id}: {endpoint} refuses access (HTTP {status}); check what the token may read{said}")]
    Forbidden { id: String, endpoint: String, status: u16, said: String },
    #[error("{id}: asking {endpoint}: {source}")]
    Request { id: String, endpoint: String, source: ApiError },
    #[error("{id}: no weights (safetensors or pytorch_model*.bin) in the repository")]
    NoWeights { id: String },
    #[error("{id}: downloading {file}: {source}; run again to go on where it stopped")]
    Download { id: String, file: String, source: ApiError },
    #[error("{id}: the hub's answer is not understood: {what} is {found:?}; check HF_ENDPOINT")]
    Answer { id: String, what: &'static str, found: String },
    #[error("{id}: the repository was changed while {file} came; run again")]
    Changed { id: String, file: String },
    #[error("{file}: {found} of {expected} bytes came; run again to go on where it stopped")]
    Short { file: PathBuf, found: u64, expected: u64 },
}

impl Hub {
    /// Takes HF_ENDPOINT, HF_TOKEN (else the token that `hf auth login` stored), HF_HUB_CACHE, HF_HOME and
    /// HF_HUB_OFFLINE from the environment, as the Python library does.
    pub fn from_env(offline: bool) -> Self {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.trim().is_empty());
        let cache = Cache::from_env();
        let path = var("HF_HUB_CACHE").map_or_else(|| cache.path().clone(), PathBuf::from);
        Hub {
            endpoint: var("HF_ENDPOINT")
                .map_or_else(|| "https://huggingface.co".into(), |e| e.trim_end_matches('/').into()),
            // hf-hub's links need an absolute path.
            cache: std::path::absolute(&path).unwrap_or(path),
            token: var("HF_TOKEN").map(|t| t.trim().to_string()).or_else(|| cache.token()),
            offline: offline
                || var("HF_HUB_OFFLINE").is_some_and(|v| matches!(v.as_str(), "1" | "true" | "TRUE" | "ON")),
        }
    }

    /// The snapshot directory of a model, after downloading what is not cached yet. Interrupted downloads go on
    /// where they stopped. `accept` sees the directory when everything but the weights is there: a model that it refuses
    /// costs no gigabytes.
    ///
    /// # Errors
    /// The model is unknown, private or without weights; the network fails; `offline` and it is not cached; what `accept`
    /// says.
    pub fn fetch<E: From<HubError>>(
        &self,
        id: &HubId,
        observer: &dyn Observer,
        accept: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        if self.offline {
            let cached = Cache::new(self.cache.clone()).repo(id.repo()).get("config.json");
            let dir = cached.and_then(|config| config.parent().map(PathBuf::from));
            let dir = dir.ok_or_else(|| HubError::Offline { id: id.to_string(), cache: self.cache.clone() })?;
            return accept(&dir).map(|()| dir);
        }
        let repository = self.ask(id)?;
        let (weights, small) = repository.files.iter().partition::<Vec<_>, _>(|file| is_weights(file));
        for file in small {
            self.download(&repository, file, observer)?;
        }
        accept(&repository.snapshot)?;
        for file in weights {
            self.download(&repository, file, observer)?;
        }
        Ok(repository.snapshot)
    }

    /// Which files the hub has of a model.
    fn ask(&self, id: &HubId) -> Result<Repository, HubError> {
        let request = |source| HubError::Request { id: id.to_string(), endpoint: self.endpoint.clone(), source };
        let api = ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(false)
            .with_user_agent("mbq-convert", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(request)?
            .repo(id.repo());
        // A refusal's reason is in its headers, which hf-hub's own errors have lost.
        let info = api.info_request().config().http_status_as_error(false).build().call();
        let mut info = info.map_err(|e| request(Box::new(e).into()))?;
        if info.status() != 200 {
            let status = info.status().as_u16();
            return Err(match self.refusal(id, None, status, info.headers()) {
                Some(error) => error,
                None => request(Box::new(ureq::Error::StatusCode(status)).into()),
            });
        }
        let info: RepoInfo = info.body_mut().read_json().map_err(|e| request(Box::new(e).into()))?;
        let (commit, files) = listing(id, info)?;
        let snapshot = Cache::new(self.cache.clone()).repo(id.repo()).pointer_path(&commit);
        Ok(Repository { id: id.clone(), api, commit, snapshot, files })
    }

    /// Downloads a file that is not there yet.
    fn download(&self, repository: &Repository, file: &str, observer: &dyn Observer) -> Result<(), HubError> {
        let path = repository.snapshot.join(file);
        if path.exists() {
            return Ok(());
        }
        let cache = Cache::new(self.cache.clone()).repo(repository.id.repo());
        Download { hub: self, repository, cache, file, observer }.run(&path)
    }
}

/// The commit and the files to read of a hub's answer.
///
/// # Errors
/// There are no weights, or the commit is no name: folders are named after it.
fn listing(id: &HubId, info: RepoInfo) -> Result<(String, Vec<String>), HubError> {
    if !is_plain(&info.sha) {
        return Err(HubError::Answer { id: id.to_string(), what: "the commit", found: shortened(&info.sha) });
    }
    let there: Vec<String> = info.siblings.into_iter().map(|s| s.rfilename).collect();
    let safetensors = there.iter().any(|f| wanted(f) && f.ends_with(".safetensors"));
    // PyTorch's files only where there are no others: most repositories that have them have both.
    let torch =
        |f: &str| !safetensors && !f.contains(['/', '\\']) && f.starts_with("pytorch_model") && f.ends_with(".bin");
    let files: Vec<String> = there.into_iter().filter(|f| wanted(f) || torch(f)).collect();
    if !files.iter().any(|f| is_weights(f)) {
        return Err(HubError::NoWeights { id: id.to_string() });
    }
    Ok((info.sha, files))
}

/// Whether what a server calls a commit or a file's content can be part of a path: a name that leads nowhere else.
fn is_plain(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= 128 && !name.starts_with('.') && name.chars().all(good)
}

/// The beginning of what a server sent, for messages.
fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

/// For [`crate::fuzzing`].
pub(crate) fn check_answer(json: &[u8]) -> Result<(), String> {
    let info: RepoInfo = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    let id = HubId { name: "org/name".into(), revision: "main".into() };
    let (commit, files) = listing(&id, info).map_err(|e| e.to_string())?;
    let snapshot = Cache::new("cache".into()).repo(id.repo()).pointer_path(&commit);
    let folder = Path::new("cache/models--org--name/snapshots");
    assert_eq!(snapshot.parent(), Some(folder), "{commit}");
    files.iter().for_each(|file| assert_eq!(snapshot.join(file).parent(), Some(snapshot.as_path()), "{file}"));
    Ok(())
}

/// A model on the hub.
struct Repository {
    id: HubId,
    api: ApiRepo,
    commit: String,
    /// Where its files lie, or will.
    snapshot: PathBuf,
    /// Those that a conversion reads.
    files: Vec<String>,
}

impl Hub {
    /// What a refusal means, by the headers with which the Python library tells them apart. None: something else.
    fn refusal(
        &self,
        id: &HubId,
        file: Option<&str>,
        status: u16,
        headers: &ureq::http::HeaderMap,
    ) -> Option<HubError> {
        let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let (code, message) = (header("X-Error-Code"), header("X-Error-Message"));
        let said = if message.is_empty() { String::new() } else { format!(" (it says: {message})") };
        let (name, id, endpoint) = (id.name.clone(), id.to_string(), self.endpoint.clone());
        Some(match (status, code) {
            (_, "GatedRepo") => {
                let then = match self.token {
                    None => "set HF_TOKEN to your access token",
                    Some(_) => "try again; HF_TOKEN must be of the account that accepted it, and may read gated models",
                };
                HubError::Gated { id, endpoint, name, then, said }
            }
            (401, _) if self.token.is_some() && (message.starts_with("Invalid") || code.is_empty()) => {
                HubError::Token { id, endpoint, said }
            }
            (_, "RevisionNotFound") => HubError::Revision { id, said },
            (_, "EntryNotFound") => HubError::File { id, endpoint, file: file.unwrap_or_default().into(), said },
            (_, "RepoNotFound") => HubError::NotFound { id, endpoint, said },
            // Without a code: servers that only speak the hub's protocol. Who has no token is told 401 for what does
            // not exist, too.
            (401 | 404, _) => match file {
                Some(file) => HubError::File { id, endpoint, file: file.into(), said },
                None => HubError::NotFound { id, endpoint, said },
            },
            (403 | 451, _) => HubError::Forbidden { id, endpoint, status, said },
            _ => return None,
        })
    }
}

/// The repository that a snapshot directory of the hub's cache holds (`models--ORG--NAME/snapshots/COMMIT`).
pub fn repository_of(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    let snapshots = dir.parent().filter(|p| p.file_name().is_some_and(|name| name == "snapshots"))?;
    let name = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
    Some(name.replacen("--", "/", 1))
}

/// Files that a conversion reads: those of the top directory; weights as safetensors.
fn wanted(file: &str) -> bool {
    let known = [".json", ".jinja", ".safetensors"].iter().any(|end| file.ends_with(end))
        || matches!(file, "README.md" | "merges.txt" | "tokenizer.model");
    known && !file.contains('/') && !file.contains('\\') && !file.starts_with('.')
}

fn is_weights(file: &str) -> bool {
    file.ends_with(".safetensors") || file.ends_with(".bin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        let id: HubId = "org/name-0.5b_hf@v1.0".parse().unwrap();
        assert_eq!((id.name.as_str(), id.revision.as_str()), ("org/name-0.5b_hf", "v1.0"));
        assert_eq!("org/name".parse::<HubId>().unwrap().revision, "main");
        for bad in ["name", "a/b/c", "org/", "../x", "org/na me", "org/name@", "./dir", "org/name@../x"] {
            assert!(bad.parse::<HubId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_files_that_are_read() {
        for file in
            ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "README.md", "tokenizer.model"]
        {
            assert!(wanted(file), "{file}");
        }
        for file in ["pytorch_model.bin", "onnx/model.json", ".gitattributes", "a.gguf", "../config.json"] {
            assert!(!wanted(file), "{file}");
        }
    }
}
