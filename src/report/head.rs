//! The first screen: what the model is, in words for someone who has not read the paper.
use super::subject::{Evaluated, Subject};
use crate::calibrate::Method;
use crate::digest::file_name;
use crate::eval::html::{main_fidelity, main_split};
use crate::eval::report::kl;
use crate::gguf::ROTATION_KEY;
use crate::page::text;
use std::fmt::{Result, Write};

pub fn write(s: &Subject, out: &mut String) -> Result {
    let written = &s.record.summary.model;
    writeln!(
        out,
        "<header>\n<p class=\"eyebrow\">mbq-convert report · {}</p>\n<h1>{}</h1>",
        text(&file_name(&s.file.path)),
        text(&s.name)
    )?;
    writeln!(out, "<p class=\"lead\">{}</p>", lead(s))?;
    if let Some(eval) = &s.eval {
        writeln!(out, "<p class=\"verdict\">{}</p>", verdict(eval))?;
    }
    out.push_str("<dl class=\"facts\">\n");
    let mut fact = |name: &str, value: String| writeln!(out, "<div><dt>{name}</dt><dd>{}</dd></div>", text(&value));
    fact("Type", written.file_type.clone())?;
    fact(
        "Bits per weight",
        format!(
            "{:.2} in the rounded matrices, {:.2} overall",
            s.record.summary.decoder_bits_per_weight, written.bits_per_weight
        ),
    )?;
    fact("Size", sizes(s))?;
    fact("Method", method(s).1.into())?;
    if let Some(noted) = &s.noted {
        let (n, of) = (noted.settings.samples, noted.settings.source.as_deref().unwrap_or("pairs"));
        let of = if of == "built-in" { "built-in pictures".into() } else { format!("entries of {}", last_part(of)) };
        fact("Calibrated on", format!("{n} {of}"))?;
    }
    fact("Took", super::repeat::duration(s.record.summary.seconds))?;
    out.push_str("</dl>\n");
    if s.undigested {
        out.push_str(
            "<p class=\"note\">The record beside this file was written by an older version, without digests: that it is this \
             file’s is told by sizes alone.</p>\n",
        );
    }
    out.push_str("</header>\n");
    Ok(())
}

/// Name and plain words of what was done.
fn method(s: &Subject) -> (&'static str, &'static str) {
    let all = [Method::Mbq, Method::MbqScales, Method::Awq, Method::SmoothQuant, Method::Gptq, Method::Rtn];
    let method = all.into_iter().find(|m| m.name() == s.record.method);
    match method {
        Some(Method::Mbq) => ("mbq", "mbq: rounding errors are made up for"),
        Some(Method::MbqScales) => ("mbq-scales", "mbq-scales: the MBQ paper’s"),
        Some(Method::Awq) => ("awq", "awq: channels scaled first"),
        Some(Method::SmoothQuant) => ("smoothquant", "smoothquant: channels scaled first"),
        Some(Method::Gptq) => ("gptq", "gptq: rounding errors are made up for"),
        Some(Method::Rtn) => ("rtn", "rtn: rounded to nearest"),
        None => ("", "not known to this version"),
    }
}

/// HTML: what was done to what, in one or two sentences.
fn lead(s: &Subject) -> String {
    let how = match method(s).0 {
        "mbq" | "gptq" => {
            "Each weight was rounded, and the weights not yet rounded were changed so that they make up for the error, as \
             example pictures and texts showed it."
        }
        "mbq-scales" | "awq" | "smoothquant" => {
            "Before rounding, the channels that matter most for example pictures and texts were scaled up, so that they \
             lose least."
        }
        "rtn" => "Each weight was rounded to the nearest value that the type has.",
        _ => "",
    };
    let rotated = if s.file.metadata.str(ROTATION_KEY).is_some() {
        " Its inner basis was rotated before, which spreads outliers and makes rounding milder."
    } else {
        ""
    };
    format!(
        "This is <b>{}</b>, made smaller: the matrices of its language model take about {} bits per weight; 16 are usual. \
         {how}{rotated}",
        text(&s.record.source),
        short(s.record.summary.decoder_bits_per_weight)
    )
}

/// Two decimals at most.
fn short(v: f64) -> String {
    let text = format!("{v:.2}");
    text.trim_end_matches('0').trim_end_matches('.').into()
}

fn sizes(s: &Subject) -> String {
    let mb = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
    let vision = s.record.summary.mmproj.as_ref().map_or(0, |m| m.bytes);
    let weights = s.record.origin.iter().flat_map(|o| &o.files);
    let before: u64 = weights.filter(|f| !f.name.ends_with(".json")).map(|f| f.bytes).sum();
    let after = s.bytes() + vision;
    let parts = if vision > 0 { format!(" ({} of it the vision file)", mb(vision)) } else { String::new() };
    match before {
        0 => format!("{}{parts}", mb(after)),
        _ => format!("{} → {}{parts}", mb(before), mb(after)),
    }
}

/// HTML: what an evaluation says about it.
fn verdict(eval: &Evaluated) -> String {
    let Some(candidate) = eval.report.candidates.get(eval.index) else { return String::new() };
    let mut words = String::new();
    if let (Some(own), Some(reference)) = (&candidate.accuracy, &eval.report.reference_accuracy) {
        let right = |v: f64| format!("{:.1} %", 100.0 * v);
        words = format!(
            "Of {} questions it answers <b>{}</b> right, the model it was made from {}. ",
            own.questions,
            right(own.all.value),
            right(reference.all.value)
        );
    }
    if let Some(f) = main_split(candidate).and_then(main_fidelity) {
        let _ = write!(
            words,
            "Both put the same word first at <b>{:.1} %</b> of places; their predictions differ by {} nats per token (0 would \
             be none).",
            100.0 * f.agreement.value,
            kl(f.kl_mean.value)
        );
    }
    words
}

/// A path's last part, for short.
fn last_part(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or(path)
}
