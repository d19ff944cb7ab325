//! Picture files to RGB as transformers sees them: `ImageOps.exif_transpose(Image.open(path)).convert("RGB")` of
//! Pillow 13. Chat, evaluation and calibration all load pictures here.
//!
//! PNG, GIF, BMP and WebP give Pillow's bytes (BMP of 16 bits within one level). JPEG differs from libjpeg-turbo by up
//! to 4 levels in single bytes (mean .01 of a level without chroma subsampling, .2 with 4:2:0): another inverse DCT and
//! chroma upsampling.
use super::{Rgb, gif, jpeg};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage};
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

/// Changes whenever a file may be read differently than before: part of the key of cached embeddings.
pub const VERSION: u8 = 2;

/// More pixels than this are refused: Pillow's own decompression-bomb limit, 2 x 89,478,485.
pub const MAX_PIXELS: u64 = 178_956_970;
/// Pictures that would take more bytes than this while they are decoded are refused. (Fuzzing has less patience.)
pub const MAX_MEMORY: u64 = if cfg!(fuzzing) { 1 << 26 } else { 1 << 30 };
/// What a PNG carries beside its pixels (a colour profile, EXIF, XMP) is read up to this many bytes, decompressed.
const MAX_BESIDE: u64 = 64 << 20;
/// Longer files are refused.
pub const MAX_BYTES: u64 = 1 << 29;

/// Why a picture is not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    #[error("{path}: cannot read the picture: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a readable picture: it is {what}; PNG, JPEG, WebP, BMP and GIF are supported")]
    NotAPicture { path: PathBuf, what: &'static str },
    #[error("{path}: not a readable picture: {format} data that is cut off or damaged ({problem})")]
    Damaged { path: PathBuf, format: &'static str, problem: String },
    #[error("{path}: {width} x {height} pixels; at least 1 x 1 and at most {MAX_PIXELS} pixels are accepted")]
    Size { path: PathBuf, width: usize, height: usize },
    #[error(
        "{path}: {width} x {height} pixels take {bytes} bytes while they are decoded, more than {MAX_MEMORY}; make the \
         picture smaller, or save it with 8 bits per colour and not as progressive JPEG"
    )]
    Memory { path: PathBuf, width: usize, height: usize, bytes: u64 },
    #[error("{path}: {bytes} bytes; at most {MAX_BYTES} are accepted")]
    Bytes { path: PathBuf, bytes: u64 },
}

/// Why bytes are not decoded; [`ImageError`] without the path.
pub(super) enum Fault {
    Damaged(String),
    Size(usize, usize),
    /// Width, height, bytes.
    Memory(usize, usize, u64),
}

impl From<image::ImageError> for Fault {
    fn from(error: image::ImageError) -> Self {
        Fault::Damaged(error.to_string())
    }
}

/// Reads the picture at `path`.
///
/// # Errors
/// The file is missing, too long, no picture of a supported format, cut off, or has more pixels than Pillow accepts.
pub fn load_rgb(path: &Path) -> Result<Rgb, ImageError> {
    decode_rgb(path, &read(path)?)
}

/// The bytes of the picture at `path`, for [`decode_rgb`].
///
/// # Errors
/// The file is missing, no plain file, or too long.
pub fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    let io = |source| ImageError::Io { path: path.into(), source };
    let kind = std::fs::metadata(path).map_err(io)?;
    if !kind.is_file() {
        return Err(ImageError::NotAPicture { path: path.into(), what: "no plain file" });
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path).and_then(|f| f.take(MAX_BYTES + 1).read_to_end(&mut bytes)).map_err(io)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ImageError::Bytes { path: path.into(), bytes: kind.len() });
    }
    Ok(bytes)
}

/// Decodes `bytes`, the contents of a picture file; `path` names it in messages. Upright by its EXIF or XMP
/// orientation; transparency dropped, not blended; the first frame of an animation.
///
/// # Errors
/// As [`load_rgb`].
pub fn decode_rgb(path: &Path, bytes: &[u8]) -> Result<Rgb, ImageError> {
    let (format, decoded) = match image::guess_format(bytes) {
        Ok(ImageFormat::Jpeg) => ("JPEG", jpeg::decode(bytes)),
        Ok(ImageFormat::Png) => ("PNG", decode(bytes, ImageFormat::Png)),
        Ok(ImageFormat::WebP) => ("WebP", whole_webp(bytes).and_then(|webp| decode(webp, ImageFormat::WebP))),
        Ok(ImageFormat::Gif) => ("GIF", gif::decode(bytes)),
        Ok(ImageFormat::Bmp) => ("BMP", decode(bytes, ImageFormat::Bmp)),
        _ => return Err(ImageError::NotAPicture { path: path.into(), what: what(bytes) }),
    };
    decoded.map_err(|fault| match fault {
        Fault::Damaged(problem) => ImageError::Damaged { path: path.into(), format, problem },
        Fault::Size(width, height) => ImageError::Size { path: path.into(), width, height },
        Fault::Memory(width, height, bytes) => ImageError::Memory { path: path.into(), width, height, bytes },
    })
}

/// Refuses sizes that are empty or too large, before anything of that size is allocated.
pub(super) fn check_size(width: usize, height: usize) -> Result<(), Fault> {
    let pixels = width as u64 * height as u64;
    if pixels == 0 || pixels > MAX_PIXELS { Err(Fault::Size(width, height)) } else { Ok(()) }
}

/// Refuses pictures of which decoding would take too much memory: `bytes` for a pixel.
pub(super) fn check_memory(width: usize, height: usize, bytes: u64) -> Result<(), Fault> {
    let bytes = width as u64 * height as u64 * bytes;
    if bytes > MAX_MEMORY { Err(Fault::Memory(width, height, bytes)) } else { Ok(()) }
}

/// `pixels`, `width * height * 3` bytes, turned upright.
pub(super) fn upright(width: u32, height: u32, pixels: Vec<u8>, orientation: Orientation) -> Result<Rgb, Fault> {
    let image = RgbImage::from_raw(width, height, pixels).ok_or(Fault::Damaged("too few pixels".into()))?;
    let mut image = DynamicImage::ImageRgb8(image);
    image.apply_orientation(orientation);
    let image = image.into_rgb8();
    Ok(Rgb { width: image.width() as usize, height: image.height() as usize, data: image.into_raw() })
}

/// The orientation that EXIF gives, else XMP, as `ImageOps.exif_transpose` looks for it.
pub(super) fn orientation(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Orientation {
    let plain = exif.map(|e| e.strip_prefix(b"Exif\0\0").unwrap_or(e));
    let of_xmp = || {
        let text = String::from_utf8_lossy(xmp?);
        let value = &text[text.find("tiff:Orientation")? + "tiff:Orientation".len()..];
        let digit = value.strip_prefix("=\"").or(value.strip_prefix('>'))?.bytes().next()?;
        Orientation::from_exif(digit.wrapping_sub(b'0'))
    };
    plain.and_then(Orientation::from_exif_chunk).or_else(of_xmp).unwrap_or(Orientation::NoTransforms)
}

fn decode(bytes: &[u8], format: ImageFormat) -> Result<Rgb, Fault> {
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(MAX_BESIDE);
    reader.limits(limits);
    let mut decoder = reader.into_decoder()?;
    let (width, height) = decoder.dimensions();
    check_size(width as usize, height as usize)?;
    let (exif, xmp) = (decoder.exif_metadata()?, decoder.xmp_metadata()?);
    let turn = orientation(exif.as_deref(), xmp.as_deref());
    // As stored and as RGB, which is as much as RGB twice, before and behind a turn.
    check_memory(width as usize, height as usize, u64::from(decoder.color_type().bytes_per_pixel()) + 3)?;
    let pixels = match DynamicImage::from_decoder(decoder)? {
        // Pillow keeps 16 bits of plain grey and clips them on the way to RGB; of all others it takes the high byte.
        DynamicImage::ImageLuma16(grey) => grey.into_raw().iter().flat_map(|&v| [v.min(255) as u8; 3]).collect(),
        DynamicImage::ImageLumaA16(grey) if is_plain_grey(bytes) => {
            grey.into_raw().chunks_exact(2).flat_map(|v| [v[0].min(255) as u8; 3]).collect()
        }
        DynamicImage::ImageLumaA16(grey) => {
            grey.into_raw().chunks_exact(2).flat_map(|v| [(v[0] >> 8) as u8; 3]).collect()
        }
        DynamicImage::ImageRgb16(rgb) => rgb.into_raw().iter().map(|&v| (v >> 8) as u8).collect(),
        DynamicImage::ImageRgba16(rgba) => {
            rgba.into_raw().chunks_exact(4).flat_map(|v| [0, 1, 2].map(|c| (v[c] >> 8) as u8)).collect()
        }
        other => other.into_rgb8().into_raw(),
    };
    upright(width, height, pixels, turn)
}

/// Whether a PNG's pixels are grey without alpha; a transparent grey (tRNS) reaches us as alpha all the same.
fn is_plain_grey(png: &[u8]) -> bool {
    png.get(25) == Some(&0) // the header's colour type
}

/// A WebP up to its container's end. That and the ends of its chunks must be there, as libwebp wants them: a cut-off last
/// frame would not be noticed, and the decoder takes as much memory as a chunk promises before it looks.
fn whole_webp(bytes: &[u8]) -> Result<&[u8], Fault> {
    let shorter = || Fault::Damaged("shorter than its header says".into());
    let whole = bytes.get(4..).and_then(|behind| bytes.get(..8 + length(behind)?)).ok_or_else(shorter)?;
    let chunks = whole.get(12..).ok_or_else(shorter)?;
    // An animation's frames begin with sixteen bytes, then chunks of their own.
    let mut frames = chunks_of(chunks)?.into_iter().filter(|(name, _)| *name == b"ANMF");
    frames.try_for_each(|(_, frame)| chunks_of(frame.get(16..).unwrap_or_default()).map(drop))?;
    Ok(whole)
}

/// A chunk of a RIFF container: its name and what it holds.
type Chunk<'a> = (&'a [u8], &'a [u8]);

/// The chunks of a RIFF container.
fn chunks_of(mut bytes: &[u8]) -> Result<Vec<Chunk<'_>>, Fault> {
    let mut chunks = Vec::new();
    while let (Some(name), Some(length)) = (bytes.get(..4), bytes.get(4..).and_then(length)) {
        let Some(chunk) = bytes.get(8..8 + length) else {
            let (name, left) = (name.escape_ascii(), bytes.len() - 8);
            return Err(Fault::Damaged(format!("its chunk {name} says {length} bytes, and {left} are left")));
        };
        chunks.push((name, chunk));
        bytes = bytes.get(8 + length + length % 2..).unwrap_or_default();
    }
    Ok(chunks)
}

/// A length at the beginning of these bytes.
fn length(bytes: &[u8]) -> Option<usize> {
    bytes.first_chunk().map(|b| u32::from_le_bytes(*b) as usize)
}

/// What a file that is no supported picture really is, by its first bytes.
fn what(bytes: &[u8]) -> &'static str {
    let head = &bytes[..bytes.len().min(512)];
    let starts = |magic: &[&[u8]]| magic.iter().any(|m| head.starts_with(m));
    let text = String::from_utf8_lossy(head).trim_start_matches('\u{feff}').trim_start().to_lowercase();
    let brand = if head.get(4..8) == Some(b"ftyp") { head.get(8..12) } else { None };
    match brand {
        Some(b"avif" | b"avis") => return "AVIF (convert it to PNG or JPEG)",
        Some(b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"hevx" | b"mif1" | b"msf1") => {
            return "HEIC, a phone's format (convert it to PNG or JPEG)";
        }
        Some(_) => return "a video or another MP4 file",
        None => {}
    }
    match () {
        () if bytes.is_empty() => "an empty file",
        () if text.starts_with("<!doctype html") || text.starts_with("<html") || text.starts_with("<head") => {
            "an HTML page, often what a failed download leaves"
        }
        () if text.starts_with("<svg") || (text.starts_with("<?xml") && text.contains("<svg")) => "an SVG drawing",
        () if text.starts_with("version https://git-lfs") => "a Git LFS pointer; `git lfs pull` brings the picture",
        () if starts(&[b"II*\0", b"MM\0*"]) => "TIFF (convert it to PNG)",
        () if starts(&[b"%PDF"]) => "a PDF document",
        () if starts(&[b"\xff\x0a", b"\0\0\0\x0cJXL "]) => "JPEG XL (convert it to PNG or JPEG)",
        () if starts(&[b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"]) => "JPEG 2000 (convert it to PNG or JPEG)",
        () if starts(&[b"8BPS"]) => "a Photoshop file",
        () if starts(&[b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf"]) => "a compressed archive",
        () if bytes.iter().all(|b| *b == 0) => "nothing but zero bytes",
        () if !bytes.contains(&0) && std::str::from_utf8(head).is_ok() => "text",
        () => "of no known format",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_picture_is_named() {
        for (bytes, want) in [
            (&b""[..], "an empty file"),
            (b"\n<!DOCTYPE html><html>", "HTML"),
            (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
            (b"\0\0\0\x1cftypavif", "AVIF"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
            (b"<?xml version=\"1.0\"?><svg>", "SVG"),
            (b"II*\0\x08\0\0\0", "TIFF"),
            (b"{\"error\": 404}", "text"),
            (b"\0\0\0\0\0", "zero bytes"),
            (b"\x01\x02\x03\0\xff", "no known format"),
        ] {
            let message = decode_rgb(Path::new("dir/x.png"), bytes).unwrap_err().to_string();
            assert!(message.contains(want) && message.starts_with("dir/x.png"), "{message}");
        }
    }

    #[test]
    fn a_header_that_promises_too_much_is_refused_unread() {
        // 60000 x 60000, a grey bit each: 450 MB that no one may allocate.
        let mut png =
            std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/pictures/load/gray.png")).unwrap();
        png[16..24].copy_from_slice(&[0, 0, 0xEA, 0x60, 0, 0, 0xEA, 0x60]);
        let crc = crc(&png[12..29]);
        png[29..33].copy_from_slice(&crc.to_be_bytes());
        let message = decode_rgb(Path::new("x.png"), &png).unwrap_err().to_string();
        assert!(message.contains("60000 x 60000 pixels"), "{message}");
    }

    /// Few enough pixels, but of eight bytes each, or with coefficients beside them: a megabyte of file, gigabytes decoded.
    #[test]
    fn a_header_that_promises_too_many_bytes_is_refused_unread() {
        let golden = |name: &str| {
            std::fs::read(format!("{}/tests/golden/pictures/load/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
        };
        let mut png = golden("rgba16.png");
        png[16..24].copy_from_slice(&[0, 0, 0x27, 0x10, 0, 0, 0x27, 0x10]);
        let crc = crc(&png[12..29]);
        png[29..33].copy_from_slice(&crc.to_be_bytes());
        let mut jpeg = golden("444-progressive.jpg");
        let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC2]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[0x27, 0x10, 0x27, 0x10]);
        for (bytes, picture) in [(1_100_000_000u64, png), (1_200_000_000, jpeg)] {
            let message = decode_rgb(Path::new("x"), &picture).unwrap_err().to_string();
            assert!(message.contains(&format!("10000 x 10000 pixels take {bytes} bytes")), "{message}");
        }
    }

    /// The limit on what lies beside the pixels is none on them: 72 MB as stored.
    #[test]
    fn pixels_may_be_more_than_what_lies_beside_them() {
        let wide = image::ImageBuffer::from_pixel(4000, 3000, image::Rgb([0x1234u16, 0, 0xFFFF]));
        let mut png = Cursor::new(Vec::new());
        wide.write_to(&mut png, ImageFormat::Png).unwrap();
        let picture = decode_rgb(Path::new("x"), png.get_ref()).unwrap();
        assert!(picture.data.chunks_exact(3).all(|p| p == [0x12, 0, 0xFF]));
    }

    fn crc(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, &b| {
            (0..8).fold(crc ^ u32::from(b), |c, _| (c >> 1) ^ if c & 1 == 1 { 0xEDB8_8320 } else { 0 })
        })
    }
}
