//! Pictures of requests: where they come from, how many, how large.
use super::error::ApiError;
use crate::digest::hex;
use crate::image::{LocateError, Rgb, decode_rgb, inside, load};
use axum::http::StatusCode;
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use sha2::{Digest, Sha256};
use std::ffi::CString;
use std::path::{Path, PathBuf};

/// What pictures a server takes.
#[derive(Debug, Clone)]
pub struct Pictures {
    /// The folder whose files requests may name; none: no files.
    pub files: Option<PathBuf>,
    /// The model sees pictures at all.
    pub vision: bool,
}

/// Pictures of a request, at most.
pub const MOST_PICTURES: usize = 32;
/// Pixels of a request's pictures together, at most: 3 bytes each are kept while it waits for its turn.
pub const MOST_PIXELS: usize = 100_000_000;

/// A picture before it is decoded.
#[derive(Debug, PartialEq, Eq)]
pub enum PictureSource {
    Bytes(Vec<u8>),
    File(PathBuf),
}

/// A decoded picture.
pub struct Picture {
    /// SHA-256 of its file, in hexadecimal digits.
    pub id: CString,
    pub pixels: Rgb,
}

/// Padding may be left out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl Pictures {
    /// The picture that `url`, a data URL or the name of an allowed file, stands for. `at` is its place in the request,
    /// `before` the number of pictures before it.
    ///
    /// # Errors
    /// Another kind of URL, a file that may not be read, too many pictures, or a model that sees none.
    pub fn source(&self, url: String, at: &str, before: usize) -> Result<PictureSource, ApiError> {
        let wrong = |message: String| ApiError::invalid(at, message);
        if !self.vision {
            return Err(wrong("this model runs without its vision file (mmproj): it sees no pictures".into()));
        }
        if before >= MOST_PICTURES {
            return Err(wrong(format!("a request may have {MOST_PICTURES} pictures at most")));
        }
        if let Some(rest) = after_scheme(&url, "data:") {
            let (kind, data) = rest.split_once(',').ok_or_else(|| wrong("the data URL has no comma".into()))?;
            if !kind.to_ascii_lowercase().ends_with(";base64") {
                return Err(wrong("a data URL must be in base64: data:image/png;base64,…".into()));
            }
            let bytes = BASE64.decode(data.trim()).map_err(|e| wrong(format!("the data URL is not base64: {e}")))?;
            return Ok(PictureSource::Bytes(bytes));
        }
        if ["http:", "https:"].iter().any(|scheme| after_scheme(&url, scheme).is_some()) {
            let message = "this server fetches nothing from the network: send the picture as a data: URL";
            return Err(wrong(message.into()));
        }
        let Some(folder) = &self.files else {
            let message = "only data: URLs are taken (files of a folder, too, if it was started with --allow-files)";
            return Err(wrong(message.into()));
        };
        file(folder, &url).map(PictureSource::File).map_err(wrong)
    }
}

/// The allowed file that `url`, `file://…` or a path, names.
fn file(folder: &Path, url: &str) -> Result<PathBuf, String> {
    let named = match after_scheme(url, "file:") {
        Some(rest) => PathBuf::from(percent_decoded(path_of_url(rest)?).ok_or("the file URL is damaged")?),
        None => PathBuf::from(url),
    };
    inside(folder, &named).map_err(|error| match error {
        LocateError::Outside { .. } => "the file is not in the folder that --allow-files names".to_string(),
        LocateError::Missing { .. } => "there is no such file in the folder that --allow-files names".into(),
        error => error.to_string(),
    })
}

/// What follows a URL's scheme (`file:`), however that is capitalised; none where it has another.
fn after_scheme<'a>(url: &'a str, scheme: &str) -> Option<&'a str> {
    let (given, rest) = url.split_at_checked(scheme.len())?;
    given.eq_ignore_ascii_case(scheme).then_some(rest)
}

/// The path of a file URL: `/a` of `///a`, `//localhost/a` or `/a`.
fn path_of_url(rest: &str) -> Result<&str, String> {
    let Some(rest) = rest.strip_prefix("//") else { return Ok(rest) };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    match host.is_empty() || host.eq_ignore_ascii_case("localhost") {
        true => Ok(path),
        false => Err("the file URL names another machine; file:///PATH names a file of this one".into()),
    }
}

/// A URL's path with its `%41`s as bytes; none where they are cut off or make no text.
fn percent_decoded(path: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut rest = path.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            out.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
        out.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &rest[2..];
    }
    String::from_utf8(out).ok()
}

/// Decodes a request's pictures.
///
/// # Errors
/// One that is no picture, or more pixels than a request may have.
pub fn decode(sources: Vec<PictureSource>) -> Result<Vec<Picture>, ApiError> {
    let mut pictures = Vec::new();
    let mut pixels = 0;
    for (i, source) in sources.into_iter().enumerate() {
        let name = PathBuf::from(format!("picture {}", i + 1));
        let wrong =
            |message: String| ApiError { code: Some("invalid_image"), ..ApiError::invalid("messages", message) };
        let bytes = match source {
            PictureSource::Bytes(bytes) => bytes,
            PictureSource::File(path) => load::read(&path).map_err(|e| wrong(e.to_string()))?,
        };
        let picture = decode_rgb(&name, &bytes).map_err(|e| wrong(e.to_string()))?;
        pixels += picture.width * picture.height;
        if pixels > MOST_PIXELS {
            let message = format!("the pictures of a request may have {MOST_PIXELS} pixels together at most");
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_many_pixels", message));
        }
        // invariant: hexadecimal digits hold no zero byte.
        let id = CString::new(hex(&Sha256::digest(&bytes))).unwrap_or_default();
        pictures.push(Picture { id, pixels: picture });
    }
    Ok(pictures)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(files: Option<&Path>) -> Pictures {
        Pictures { files: files.map(Into::into), vision: true }
    }

    fn refused(server: &Pictures, url: &str) -> String {
        server.source(url.into(), "here", 0).unwrap_err().message
    }

    #[test]
    fn data_urls_are_taken() {
        for url in ["data:image/png;base64,AAEC/w==", "data:;base64,AAEC/w", "DATA:image/jpeg;x=y;BASE64, AAEC/w== "] {
            assert_eq!(server(None).source(url.into(), "", 0).unwrap(), PictureSource::Bytes(vec![0, 1, 2, 255]));
        }
    }

    #[test]
    fn others_are_refused_with_reasons() {
        let server = server(None);
        for (url, want) in [
            ("https://example.com/cat.png", "fetches nothing"),
            ("HTTP://example.com/cat.png", "fetches nothing"),
            ("file:///etc/passwd", "--allow-files"),
            ("cat.png", "--allow-files"),
            ("", "--allow-files"),
            ("data:image/png;base64", "no comma"),
            ("data:image/png,abc", "must be in base64"),
            ("data:image/png;base64,!!", "is not base64"),
        ] {
            assert!(refused(&server, url).contains(want), "{url}: {}", refused(&server, url));
        }
        assert!(
            server.source("data:;base64,AA".into(), "", MOST_PICTURES).unwrap_err().message.contains("32 pictures")
        );
        let blind = Pictures { files: None, vision: false };
        assert!(refused(&blind, "data:;base64,AA").contains("mmproj"));
    }

    #[test]
    fn files_are_those_of_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("allowed");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("a b.png"), "x").unwrap();
        std::fs::write(dir.path().join("secret.png"), "x").unwrap();
        let server = server(Some(&folder));
        let taken = |url: &str| matches!(server.source(url.into(), "", 0), Ok(PictureSource::File(_)));
        assert!(taken("a b.png"));
        for prefix in ["file://", "FILE://", "file://localhost", "File://LocalHost", "file:"] {
            assert!(taken(&format!("{prefix}{}/a%20b.png", folder.display())), "{prefix}");
        }
        let elsewhere = refused(&server, &format!("file://other{}/a%20b.png", folder.display()));
        assert!(elsewhere.contains("another machine"), "{elsewhere}");
        assert!(refused(&server, "file://localhost").contains("no such file"), "the folder itself");
        for url in ["../secret.png", "file:///etc/passwd", "%2e%2e/secret.png", "file://%2e%2e/secret.png", "none.png"]
        {
            assert!(!taken(url), "{url}");
        }
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(dir.path().join("secret.png"), folder.join("link.png")).unwrap();
            assert!(!taken("link.png"));
        }
        assert!(!refused(&server, "../secret.png").contains("no such file"), "what exists outside is not told");
        assert_eq!(refused(&server, "../secret.png"), refused(&server, "../absent.png"));
    }

    #[test]
    fn what_is_no_picture_is_named_by_its_place() {
        let source = || PictureSource::Bytes(b"%PDF-1.7".to_vec());
        let error = decode(vec![source()]).err().unwrap();
        assert!(error.message.contains("picture 1") && error.message.contains("PDF"), "{}", error.message);
        assert_eq!((error.status.as_u16(), error.code), (400, Some("invalid_image")));
    }
}
