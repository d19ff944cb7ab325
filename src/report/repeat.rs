//! How long it took, and how to do it again.
use super::noted::Noted;
use super::subject::Subject;
use crate::calibrate::compensate::VisionWeight;
use crate::digest::file_name;
use crate::ggml::GgmlType;
use crate::gguf::ROTATION_KEY;
use crate::page::{TABLE_END, fact_row, open_table, section, text};
use serde_json::Value;
use std::fmt::{Result, Write};

pub fn write(s: &Subject, out: &mut String) -> Result {
    times(s, out)?;
    section(out, "again", "How to repeat it")?;
    out.push_str("<p>This command, with the same program and checkpoint, makes the same file.</p>\n");
    writeln!(
        out,
        "<pre class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Command\"><code>{}</code></pre>",
        text(&command(s))
    )?;
    open_table(out, "plain", "Where it comes from", "", &[])?;
    fact_row(out, "Converter", &s.record.converter)?;
    fact_row(out, "Checkpoint", &s.record.source)?;
    if let Some(origin) = &s.record.origin {
        if let Some(revision) = &origin.revision {
            fact_row(out, "Its revision", revision)?;
        }
        for f in &origin.files {
            let sum = f.sha256.as_ref().map_or(String::new(), |sum| format!(" · sha256 {sum}"));
            fact_row(out, "Read", &format!("{} · {} bytes{sum}", f.name, f.bytes))?;
        }
    }
    for f in s.record.files() {
        fact_row(out, "Written", &format!("{} · {} bytes · sha256 {}", f.name, f.bytes, f.sha256))?;
    }
    if let Some(pair) = &s.record.summary.pair {
        fact_row(out, "Pair id", pair)?;
    }
    writeln!(out, "{TABLE_END}</section>")
}

/// In words.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.1} s"),
        s if s < 6000.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn times(s: &Subject, out: &mut String) -> Result {
    let Some(noted) = &s.noted else { return Ok(()) };
    let mut rows: Vec<(String, f64)> = Vec::new();
    let own = if noted.own_answers.is_some() { ", the model’s own answers" } else { "" };
    rows.extend(noted.seconds.embedding.map(|t| (format!("Pictures and texts embedded{own}"), t)));
    for (name, value) in &noted.seconds.phases {
        // Pictures and answers, for which the model is written, are parts of the embedding.
        let within = name == "vision" || name.ends_with(".gguf");
        if let (Some(seconds), false) = (value.as_f64(), within) {
            rows.push((phase(name, &noted.seconds.phases), seconds));
        }
    }
    if rows.is_empty() {
        return Ok(());
    }
    let all = s.record.summary.seconds.max(noted.seconds.all.unwrap_or(0.0));
    let rest = all - rows.iter().map(|r| r.1).sum::<f64>();
    if rest > 0.0 {
        rows.push(("Reading, writing and the rest".into(), rest));
    }
    section(out, "time", "How long it took")?;
    writeln!(out, "<p>{} altogether.</p>", duration(all))?;
    let columns = ["Phase", "<span class=\"sr\">Bar</span>", "#time"].map(String::from);
    open_table(out, "bars", "Seconds by phase", "", &columns)?;
    for (name, seconds) in &rows {
        writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td class=\"bar\"><span class=\"track\" aria-hidden=\"true\"><span class=\"fill\" \
             style=\"width:{:.2}%\"></span></span></td><td class=\"n\">{}</td></tr>",
            text(name),
            100.0 * seconds / all.max(f64::MIN_POSITIVE),
            duration(*seconds)
        )?;
    }
    writeln!(out, "{TABLE_END}</section>")
}

/// A phase's name, with the times of single blocks where they are known.
fn phase(name: &str, phases: &serde_json::Map<String, Value>) -> String {
    let each = phases.get("each block").and_then(Value::as_array).filter(|_| name == "blocks");
    let each: Vec<f64> = each.into_iter().flatten().filter_map(Value::as_f64).collect();
    match (each.iter().copied().reduce(f64::min), each.iter().copied().reduce(f64::max)) {
        (Some(low), Some(high)) => format!("Blocks ({}, {} to {} each)", each.len(), duration(low), duration(high)),
        _ => match name {
            "outputs" => "Gradients at the outputs".into(),
            "sensitivity" => "Gradients of all tokens".into(),
            _ => name.to_owned(),
        },
    }
}

/// The command line that the settings amount to.
fn command(s: &Subject) -> String {
    let record = &s.record;
    let mut words = vec!["mbq-convert".to_owned()];
    let revision = record.origin.as_ref().and_then(|o| o.revision.as_ref());
    // A folder in the hub's cache has a commit, and no other.
    let on_hub = !record.source.starts_with(['/', '.', '~']) && record.source.matches('/').count() == 1;
    words.push(match revision.filter(|_| on_hub && !record.source.contains('@')) {
        Some(revision) => format!("{}@{revision}", record.source),
        None => record.source.clone(),
    });
    let mut option = |name: &str, value: String| words.extend([name.to_owned(), value]);
    option("-o", file_name(&s.file.path));
    option("--type", record.summary.model.file_type.to_lowercase());
    option("--method", record.method.clone());
    option("--rotate", if s.file.metadata.str(ROTATION_KEY).is_some() { "on" } else { "off" }.into());
    for (tensor, name) in [("token_embd.weight", "--embedding-type"), ("output.weight", "--output-type")] {
        if let Some(ty) = s.file.tensor(tensor).and_then(|t| t.ty()) {
            option(name, ty.to_string());
        }
    }
    if let Some(vision) = record.summary.mmproj.as_ref().filter(|v| v.file_type != GgmlType::F16.name()) {
        option("--mmproj-type", vision.file_type.clone());
    }
    if let Some(noted) = &s.noted {
        calibration(noted, &mut option);
    }
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

fn calibration(noted: &Noted, option: &mut dyn FnMut(&str, String)) {
    let settings = &noted.settings;
    if let Some(list) = settings.source.as_ref().filter(|source| *source != "built-in") {
        option("--calib", list.clone());
    }
    if let Some(root) = &noted.image_root {
        option("--image-root", root.display().to_string());
    }
    option("--samples", settings.drawn(noted.skipped.len()).to_string());
    match settings.compensation.map(|c| c.vision) {
        Some(VisionWeight::Ratio) => option("--vision-weight", "ratio".into()),
        Some(VisionWeight::Fixed(weight)) if weight != 1.0 => option("--vision-weight", weight.to_string()),
        _ => (),
    }
    if let Some(bits) = noted.bpw {
        option("--bpw", bits.to_string());
    }
    let file = || noted.imatrix_file.as_ref().map(|path| path.display().to_string());
    if let Some(imatrix) = settings.imatrix.as_ref().map(|weighting| weighting.to_lowercase()).or_else(file) {
        option("--imatrix", imatrix);
    }
    for (key, value) in &settings.switches {
        let value = match value {
            Value::Null => continue,
            Value::Bool(on) => if *on { "on" } else { "off" }.into(),
            Value::String(word) => word.clone(),
            value => value.to_string(),
        };
        option("--set", format!("{key}={value}"));
    }
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./=@:+,".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.into(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stay_words_in_a_shell() {
        assert_eq!(quoted("org/name@0123"), "org/name@0123");
        assert_eq!(quoted("a; rm -rf $HOME"), "'a; rm -rf $HOME'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn durations_in_words() {
        assert_eq!([3.0, 240.0, 7200.0].map(duration), ["3.0 s", "4.0 min", "2.0 h"]);
    }
}
