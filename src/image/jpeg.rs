//! JPEG as libjpeg-turbo and Pillow read it, by zune-jpeg in its strict mode.
use super::Rgb;
use super::load::{Fault, check_memory, check_size, orientation, upright};
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::{bytestream::ZCursor, colorspace::ColorSpace, options::DecoderOptions};

/// Decodes a whole JPEG file, upright.
pub(super) fn decode(bytes: &[u8]) -> Result<Rgb, Fault> {
    let damaged = |e: &dyn std::fmt::Display| Fault::Damaged(e.to_string().trim().into());
    // Its own limit of 16384 a side is less than what JPEG allows; the number of pixels is checked below.
    let options = DecoderOptions::default().set_strict_mode(true).set_max_width(65_535).set_max_height(65_535);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|e| damaged(&e))?;
    let (width, height) = decoder.dimensions().ok_or(damaged(&"no frame"))?;
    check_size(width, height)?;
    let Some(several) = scans(bytes) else { return Err(damaged(&"the end marker is missing")) };
    // Of several scans the coefficients are kept; pixels as stored and as RGB, or as RGB before and behind a turn.
    let stored_inks = decoder.input_colorspace().map_or(4, |space| space.num_components() as u64);
    let coefficients = if several { 2 * stored_inks } else { 0 };
    check_memory(width, height, coefficients + stored_inks.max(3) + 3)?;
    let turn = orientation(decoder.exif().map(Vec::as_slice), decoder.xmp().map(Vec::as_slice));
    // Four inks stay as stored: their way to RGB is Pillow's, not the decoder's.
    let stored = decoder.input_colorspace();
    let space = stored.filter(|s| matches!(s, ColorSpace::CMYK | ColorSpace::YCCK)).unwrap_or(ColorSpace::RGB);
    decoder.set_options(options.jpeg_set_out_colorspace(space));
    let pixels = decoder.decode().map_err(|e| damaged(&e))?;
    let pixels = match space {
        ColorSpace::CMYK => pixels.chunks_exact(4).flat_map(|p| printed([p[0], p[1], p[2], p[3]])).collect(),
        ColorSpace::YCCK => pixels.chunks_exact(4).flat_map(|p| printed(inks([p[0], p[1], p[2], p[3]]))).collect(),
        _ => pixels,
    };
    upright(width as u32, height as u32, pixels, turn)
}

/// Where the end marker follows a scan, whether the file may have several (it is progressive, or has them). Without that
/// marker Pillow calls a file truncated, whatever was decoded.
fn scans(bytes: &[u8]) -> Option<bool> {
    let (mut at, mut scans, mut progressive) = (2, 0, false); // behind the start marker
    while let Some(&[first, marker]) = bytes.get(at..at + 2) {
        match (first, marker) {
            (0xFF, 0xD9) => return (scans > 0).then_some(progressive || scans > 1),
            // Fill bytes, stuffed zeros, restart markers.
            (0xFF, 0xFF) => at += 1,
            (0xFF, 0x00 | 0x01 | 0xD0..=0xD8) => at += 2,
            (0xFF, _) => {
                let &[high, low] = bytes.get(at + 2..at + 4)? else { return None };
                at += 2 + usize::from(u16::from_be_bytes([high, low]));
                scans += usize::from(marker == 0xDA);
                progressive |= marker == 0xC2;
            }
            _ => at += 1,
        }
    }
    None
}

/// The RGB of stored cyan, magenta, yellow and black, which Pillow always takes for inverted, as Adobe writes them.
fn printed([c, m, y, k]: [u8; 4]) -> [u8; 3] {
    // Convert.c's cmyk2rgb: k - k * ink / 255, rounded, for an ink of 255 - stored.
    [c, m, y].map(|stored| {
        let product = u32::from(255 - stored) * u32::from(k) + 128;
        k.saturating_sub((((product >> 8) + product) >> 8) as u8)
    })
}

/// libjpeg's YCCK to CMYK (jdcolor.c): the inks are 255 minus what YCbCr gives for red, green and blue.
fn inks([y, cb, cr, k]: [u8; 4]) -> [u8; 4] {
    const HALF: i64 = 1 << 15;
    let fixed = |x: f64| (x * 65536.0 + 0.5) as i64;
    let (y, cb, cr) = (i64::from(y), i64::from(cb) - 128, i64::from(cr) - 128);
    let red = y + ((fixed(1.402) * cr + HALF) >> 16);
    let green = y + ((-fixed(0.344_14) * cb - fixed(0.714_14) * cr + HALF) >> 16);
    let blue = y + ((fixed(1.772) * cb + HALF) >> 16);
    let ink = |v: i64| (255 - v).clamp(0, 255) as u8;
    [ink(red), ink(green), ink(blue), k]
}
