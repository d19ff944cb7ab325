//! Decoding picture files to RGB, with limits, as `PIL.Image.open(path).convert("RGB")` does for common formats.
use super::Rgb;
use std::path::{Path, PathBuf};

/// More pixels than this are refused: Pillow's own decompression-bomb limit, 2 x 89,478,485.
const MAX_PIXELS: u64 = 178_956_970;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    #[error("{path}: cannot read the picture: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a readable picture: {source}; PNG, JPEG, WebP, BMP and GIF are supported")]
    Decode { path: PathBuf, source: image::ImageError },
    #[error("{path}: {width} x {height} pixels; at least 1 x 1 and at most {MAX_PIXELS} pixels are accepted")]
    Size { path: PathBuf, width: u32, height: u32 },
}

/// Reads `path` as 8-bit RGB. Transparency is dropped, not blended, as Pillow's `convert("RGB")` does.
///
/// # Errors
/// The file is missing, is not a picture, or has more pixels than Pillow accepts.
pub fn load_rgb(path: &Path) -> Result<Rgb, ImageError> {
    let io = |source| ImageError::Io { path: path.into(), source };
    let decode = |source| ImageError::Decode { path: path.into(), source };
    let open = || image::ImageReader::open(path)?.with_guessed_format();
    let (width, height) = open().map_err(io)?.into_dimensions().map_err(decode)?;
    if width == 0 || height == 0 || u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(ImageError::Size { path: path.into(), width, height });
    }
    let mut reader = open().map_err(io)?;
    reader.no_limits(); // the pixel count is checked above
    let data = reader.decode().map_err(decode)?.into_rgb8().into_raw();
    Ok(Rgb { width: width as usize, height: height as usize, data })
}
