//! The text model, a block at a time.
use crate::Error;
use crate::front::Source;
use crate::text::head::Head;
use crate::text::{Block, Rope, TextConfig};
use candle_core::Device;

/// A text model whose blocks are loaded when needed.
pub struct TextModel<'a> {
    pub source: &'a Source<'a>,
    pub text: TextConfig,
    pub device: Device,
    /// Of blocks that see everything, and of those with a window.
    ropes: [Rope; 2],
}

impl<'a> TextModel<'a> {
    /// `positions`: one more than the largest that a token has.
    ///
    /// # Errors
    /// What the metadata says of the text model is not understood; the rotary tables do not fit the device.
    pub fn new(source: &'a Source<'a>, positions: usize, device: Device) -> Result<Self, Error> {
        let text = source.text_config()?;
        let ropes = Rope::of_model(source, &text, positions, &device)?;
        Ok(TextModel { source, text, device, ropes })
    }

    /// Loads one block.
    ///
    /// # Errors
    /// As [`Block::load`].
    pub fn block(&self, layer: usize) -> Result<Block, Error> {
        let rope = &self.ropes[usize::from(self.text.windows[layer].is_some())];
        Block::load(self.source, &self.text, layer, rope, &self.device)
    }

    /// Loads the final norm and the output head.
    ///
    /// # Errors
    /// As [`Head::load`].
    pub fn head(&self) -> Result<Head, Error> {
        Head::load(self.source, &self.text, &self.device)
    }
}
