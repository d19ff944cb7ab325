//! A GIF's first frame, as Pillow shows it.
use super::Rgb;
use super::load::{Fault, check_memory, check_size};
use gif::{ColorOutput, DecodeOptions, MemoryLimit};

/// Decodes the first frame. Transparent pixels have their palette's colour; what the frame leaves of the screen has
/// the transparent colour too, or else the first one.
pub(super) fn decode(bytes: &[u8]) -> Result<Rgb, Fault> {
    let damaged = |e: gif::DecodingError| Fault::Damaged(e.to_string());
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.set_memory_limit(MemoryLimit::Unlimited); // sizes are checked before anything is read
    let mut decoder = options.read_info(bytes).map_err(damaged)?;
    let frame = decoder.next_frame_info().map_err(damaged)?.ok_or(Fault::Damaged("no frame".into()))?;
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (columns, rows) = (usize::from(frame.width), usize::from(frame.height));
    let (clear, own_palette) = (frame.transparent, frame.palette.clone());
    // A frame that reaches over the screen widens it.
    let width = usize::from(decoder.width()).max(left + columns);
    let height = usize::from(decoder.height()).max(top + rows);
    check_size(width, height)?;
    check_size(columns, rows)?;
    // Indices, their colours, the screen's.
    check_memory(width, height, 1 + 3 + 3)?;
    let mut indices = vec![0; decoder.buffer_size()];
    decoder.read_into_buffer(&mut indices).map_err(damaged)?;

    let palette = own_palette.as_deref().or(decoder.global_palette());
    let color = |index: u8| match palette {
        Some(palette) => {
            let at = usize::from(index) * 3;
            palette.get(at..at + 3).map_or([0; 3], |c| [c[0], c[1], c[2]])
        }
        None => [index; 3],
    };
    let mut out = Rgb { width, height, data: color(clear.unwrap_or(0)).repeat(width * height) };
    let data = indices.iter().flat_map(|&i| color(i)).collect();
    Rgb { width: columns, height: rows, data }.paste_onto(&mut out, left, top);
    Ok(out)
}
