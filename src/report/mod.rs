//! One page about a converted model: what it is, what rounding did to it block by block, where its bytes go, what an
//! evaluation found, what it was calibrated on, and how to repeat it. Every section is there only if its data is.
mod bytes;
mod errors;
mod head;
mod measured;
mod noted;
mod pictures;
mod repeat;
mod subject;

pub use subject::ReportError;

use crate::page;
use std::path::{Path, PathBuf};
use subject::Subject;

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct ReportOptions {
    /// What `eval --json` wrote, with this model among its candidates.
    pub eval: Option<PathBuf>,
    /// Leave the calibration's pictures and texts out: they are somebody's.
    pub no_pictures: bool,
}

/// The page about the model at `model`, the first of its files, whose record lies beside it.
///
/// # Errors
/// The model cannot be read; its record is missing, not understood or another model's; the evaluation cannot be read or is
/// not of this model.
pub fn page(model: &Path, options: &ReportOptions) -> Result<String, ReportError> {
    let subject = Subject::read(model, options.eval.as_deref())?;
    let mut out = String::new();
    // invariant: writing to a String cannot fail.
    let _ = write(&subject, options, &mut out);
    Ok(out)
}

fn write(s: &Subject, options: &ReportOptions, out: &mut String) -> std::fmt::Result {
    page::open(out, &format!("{}: how it was quantised", s.name))?;
    head::write(s, out)?;
    out.push_str("<main>\n");
    measured::write(s, out)?;
    errors::write(s, out)?;
    bytes::write(s, out)?;
    pictures::write(s, !options.no_pictures, out)?;
    repeat::write(s, out)?;
    out.push_str(page::END);
    Ok(())
}
