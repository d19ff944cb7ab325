//! What an evaluation found: the pages of `eval` and `report` show the same plot and the same bars.
use super::subject::Subject;
use crate::eval::html::{accuracies, plots, short_names};
use crate::page::text;
use std::fmt::{Result, Write};

pub fn write(s: &Subject, out: &mut String) -> Result {
    let Some(eval) = &s.eval else { return Ok(()) };
    let r = &eval.report;
    let mut names = short_names(r);
    if let Some(own) = names.get_mut(eval.index).filter(|_| r.candidates.len() > 1) {
        own.push_str(" (this model)");
    }
    plots(r, &names, out)?;
    accuracies(r, &names, out)?;
    let (d, n) = (&r.data, r.candidates.len());
    writeln!(
        out,
        "<p class=\"note\">{} measured with mbq-convert eval {} against {} on {} questions of {} (sha256 {}), answers of up to \
         {} tokens, {} bootstrap draws.</p>",
        if n == 1 { "One model".into() } else { format!("{n} models") },
        text(&r.version),
        text(&r.reference.name),
        d.questions,
        text(&d.path),
        text(&d.sha256),
        d.max_tokens,
        d.bootstrap_resamples
    )
}
