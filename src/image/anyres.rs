//! Any-resolution tiles of LLaVA-NeXT and LLaVA-OneVision, as transformers' slow image processors cut them
//! (`image_processing_llava_onevision.py`), and the geometry of the tokens that come out. The runtime's counterpart is
//! `patches/files/tools/mtmd/llava-anyres.h`; both are held to transformers 5 by `tests/anyres.rs`.
use super::{Rgb, resize::Filter, resize::resize};

/// A picture's size or a canvas, in pixels, in the order of `image_grid_pinpoints`: height first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub height: usize,
    pub width: usize,
}

/// The pinpoint that keeps most of the picture's pixels, and of those the one that wastes the fewest
/// (`select_best_resolution`). `None` when there are no pinpoints.
pub fn best_pinpoint(original: Size, pinpoints: &[Size]) -> Option<Size> {
    let (h, w) = (original.height as f64, original.width as f64);
    let mut best: Option<(Size, u64, u64)> = None;
    for &p in pinpoints {
        let scale = (p.width as f64 / w).min(p.height as f64 / h);
        let fitted = (w * scale) as u64 * (h * scale) as u64;
        let effective = fitted.min((original.width * original.height) as u64);
        let wasted = (p.width * p.height) as u64 - effective;
        let better = best.is_none_or(|(_, e, waste)| effective > e || (effective == e && wasted < waste));
        if better {
            best = Some((p, effective, wasted));
        }
    }
    best.map(|(p, ..)| p)
}

/// The picture scaled to fit `canvas`, aspect ratio kept, the free side rounded up (`_get_patch_output_size`).
fn fitted(original: Size, canvas: Size) -> Size {
    let scale_w = canvas.width as f64 / original.width as f64;
    let scale_h = canvas.height as f64 / original.height as f64;
    if scale_w < scale_h {
        let height = ((original.height as f64 * scale_w).ceil() as usize).min(canvas.height);
        Size { height, width: canvas.width }
    } else {
        let width = ((original.width as f64 * scale_h).ceil() as usize).min(canvas.width);
        Size { height: canvas.height, width }
    }
}

/// A picture's tiles: the overview (the whole picture squeezed to one tile) first, then the grid row by row.
#[derive(Debug, Clone)]
pub struct Tiles {
    pub tiles: Vec<Rgb>,
    /// Rows and columns of the grid, the overview not counted.
    pub rows: usize,
    pub cols: usize,
    pub original: Size,
}

/// Cuts `image` into square tiles of `side` pixels on its best pinpoint, centred on black.
/// Both margins are the whole half of the free space, so an odd one leaves the picture a pixel short; its last tiles are
/// then stretched to full size. transformers 4.45 does so, and so does the runtime (transformers 4.48 and later pad the
/// right or bottom by one pixel more instead). `None` when there are no pinpoints.
pub fn tiles(image: &Rgb, pinpoints: &[Size], side: usize, filter: Filter) -> Option<Tiles> {
    let original = Size { height: image.height, width: image.width };
    let canvas_size = best_pinpoint(original, pinpoints)?;
    let fit = fitted(original, canvas_size);
    let (x, y) = ((canvas_size.width - fit.width) / 2, (canvas_size.height - fit.height) / 2);
    let mut canvas = Rgb::black(fit.width + 2 * x, fit.height + 2 * y);
    resize(image, fit.width, fit.height, filter).paste_onto(&mut canvas, x, y);
    let (rows, cols) = (canvas_size.height / side, canvas_size.width / side);
    let mut tiles = vec![resize(image, side, side, filter)];
    for (top, left) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r * side, c * side))) {
        let (w, h) = (side.min(canvas.width - left), side.min(canvas.height - top));
        tiles.push(resize(&canvas.crop(left, top, w, h), side, side, filter));
    }
    Some(Tiles { tiles, rows, cols, original })
}

/// A picture as one of several: padded to a square with the mean colour, then resized to one tile of `side` pixels
/// (`pad_to_square`; an odd margin's pixel goes to the right or the bottom). `mean` is the normalisation's, 0 to 1.
pub fn whole(image: &Rgb, side: usize, mean: [f32; 3], filter: Filter) -> Rgb {
    let longest = image.width.max(image.height);
    let mut square = Rgb::black(longest, longest);
    let colour = mean.map(|m| (f64::from(m) * 255.0) as u8);
    square.data.chunks_exact_mut(3).for_each(|pixel| pixel.copy_from_slice(&colour));
    image.paste_onto(&mut square, (longest - image.width) / 2, (longest - image.height) / 2);
    resize(&square, side, side, filter)
}

/// The part of a re-assembled feature grid that holds picture, not padding: rows or columns cut at both ends
/// (`unpad_image`). Returns (first row, rows, first column, columns).
pub fn unpadded(original: Size, rows: usize, cols: usize) -> (usize, usize, usize, usize) {
    let Size { height, width } = original;
    // transformers (since 4.47) truncates height * (cols / width) after rounding it to 7 decimals. A quotient by less
    // than 10^6 pixels is whole or further than that from the next number: what comes out is the whole division's.
    if width * rows > cols * height {
        let pad = (rows - height * cols / width) / 2;
        (pad, rows - 2 * pad, 0, cols)
    } else {
        let pad = (cols - width * rows / height) / 2;
        (0, rows, pad, cols - 2 * pad)
    }
}

/// The size to which `anyres_max_N` shrinks an unpadded grid that has over 1.21 x N tiles' worth of tokens,
/// where a tile has `side` x `side` tokens; the same size when it needs no shrinking.
pub fn shrunk(rows: usize, cols: usize, side: usize, max_tiles: usize) -> (usize, usize) {
    let ratio = ((rows * cols) as f64 / (max_tiles * side * side) as f64).sqrt();
    if ratio > 1.1 {
        // Python's floor division: the remainder is taken off first, which leaves a whole number but for its rounding.
        let floor = |a: usize| ((a as f64 - a as f64 % ratio) / ratio).round() as usize;
        (floor(rows), floor(cols))
    } else {
        (rows, cols)
    }
}
