//! The built-in calibration set: charts, documents, diagrams and scenes drawn by `assets/calibration/draw.py`, each
//! with a caption made from the very numbers it was drawn from. Released with this crate, under its licence.
use super::CalibrateError;
use crate::Error;
use crate::image::{Rgb, decode_rgb};
use std::io::Read;
use std::path::Path;

const ARCHIVE: &[u8] = include_bytes!("../../assets/calibration/set.zip");

/// A picture with its question and answer.
pub struct BuiltIn {
    pub name: &'static str,
    pub image: Rgb,
    pub question: &'static str,
    pub answer: &'static str,
}

/// All pairs, in the order of the list.
///
/// # Errors
/// The embedded archive is damaged.
pub fn pairs() -> Result<Vec<BuiltIn>, Error> {
    let fail = |problem: String| Error::from(CalibrateError::File { path: "built-in set".into(), problem });
    let mut zip = zip::ZipArchive::new(std::io::Cursor::new(ARCHIVE)).map_err(|e| fail(e.to_string()))?;
    let mut list = include_str!("../../assets/calibration/pairs.tsv").lines();
    let mut out = Vec::new();
    for line in &mut list {
        let mut fields = line.split('\t');
        let (Some(name), Some(question), Some(answer)) = (fields.next(), fields.next(), fields.next()) else {
            return Err(fail(format!("line {line:?}")));
        };
        let mut bytes = Vec::new();
        zip.by_name(name)
            .map_err(|e| fail(format!("{name}: {e}")))?
            .read_to_end(&mut bytes)
            .map_err(|e| fail(format!("{name}: {e}")))?;
        let image = decode_rgb(Path::new(name), &bytes)?;
        out.push(BuiltIn { name, image, question, answer });
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    /// Every line has its picture, every picture its line, and the whole stays small.
    #[test]
    fn set_is_whole() {
        let pairs = super::pairs().unwrap();
        assert_eq!(pairs.len(), 128);
        assert_eq!(zip::ZipArchive::new(std::io::Cursor::new(super::ARCHIVE)).unwrap().len(), pairs.len());
        assert!(pairs.iter().all(|p| p.answer.len() > 40 && p.image.width >= 64) && super::ARCHIVE.len() < 2 << 20);
    }
}
