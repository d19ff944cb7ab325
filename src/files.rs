//! Small files of a model's folder, read whole.
use std::fs::File;
use std::io::{Error, Read, Result};
use std::path::Path;

/// Longer configurations, tokenizers and cards are refused: parsed, JSON takes many times its length. The longest known,
/// Gemma 3's `tokenizer.json`, has 33 MB.
pub(crate) const MOST_BYTES: u64 = 128 << 20;

/// Opens a plain file: a pipe or a device that lies in a folder, or to which a link there leads, would be read for ever.
///
/// # Errors
/// It cannot be opened, or is no plain file.
pub(crate) fn open_plain(path: &Path) -> Result<File> {
    // Asked before it is opened: opening a pipe waits for somebody who writes.
    match std::fs::metadata(path)?.is_file() {
        true => File::open(path),
        false => Err(Error::other("is no plain file")),
    }
}

/// The bytes of a plain file.
///
/// # Errors
/// As [`open_plain`]'s, or it has more than [`MOST_BYTES`].
pub(crate) fn read_plain(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_plain(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > MOST_BYTES {
        true => Err(Error::other(format!("has more than {MOST_BYTES} bytes, which no such file needs"))),
        false => Ok(bytes),
    }
}

/// The text of a plain file.
///
/// # Errors
/// As [`read_plain`]'s, or it is no UTF-8.
pub(crate) fn read_plain_text(path: &Path) -> Result<String> {
    String::from_utf8(read_plain(path)?).map_err(|e| Error::other(format!("is no UTF-8: {}", e.utf8_error())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_files_of_bounded_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        std::fs::write(&path, "{}").unwrap();
        assert_eq!(read_plain_text(&path).unwrap(), "{}");
        File::options().write(true).open(&path).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(read_plain(&path).unwrap_err().to_string().contains("more than"));
        assert!(read_plain(dir.path()).unwrap_err().to_string().contains("no plain file"));
        #[cfg(unix)]
        {
            let link = dir.path().join("link");
            std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
            assert!(read_plain(&link).unwrap_err().to_string().contains("no plain file"));
        }
    }
}
