//! Pictures as the Hugging Face processors see them: decoding to RGB, Pillow-exact resampling, any-resolution tiles.
mod gif;
mod jpeg;
pub mod load;
pub mod locate;

pub use load::{ImageError, decode_rgb, load_rgb};
pub use locate::{LocateError, inside};

/// An 8-bit RGB picture, rows from top to bottom, 3 bytes a pixel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    pub width: usize,
    pub height: usize,
    /// `width * height * 3` bytes.
    pub data: Vec<u8>,
}

impl Rgb {
    /// A black picture.
    pub fn black(width: usize, height: usize) -> Self {
        Rgb { width, height, data: vec![0; width * height * 3] }
    }

    /// The rectangle of `width` x `height` pixels whose top left corner is at (`x`, `y`).
    /// The rectangle must lie inside the picture.
    pub fn crop(&self, x: usize, y: usize, width: usize, height: usize) -> Rgb {
        let mut data = Vec::with_capacity(width * height * 3);
        for row in y..y + height {
            let start = (row * self.width + x) * 3;
            data.extend_from_slice(&self.data[start..start + width * 3]);
        }
        Rgb { width, height, data }
    }

    /// Copies `self` onto `canvas` with its top left corner at (`x`, `y`); it must fit.
    pub fn paste_onto(&self, canvas: &mut Rgb, x: usize, y: usize) {
        for row in 0..self.height {
            let to = ((y + row) * canvas.width + x) * 3;
            let from = row * self.width * 3;
            canvas.data[to..to + self.width * 3].copy_from_slice(&self.data[from..from + self.width * 3]);
        }
    }
}
