//! What a model was calibrated on: how much, what was skipped and why, the pictures with their texts, and what the model
//! itself answered about them.
use super::noted::Noted;
use super::subject::Subject;
use crate::calibrate::answers::Turns;
use crate::calibrate::builtin;
use crate::calibrate::pairs::{Conversation, List, Picture};
use crate::image::{Rgb, inside};
use crate::page::{TABLE_END, fact_row, open_table, section, text, thumbnail};
use crate::prompt::{Message, Part};
use std::fmt::{Result, Write};
use std::path::Path;

/// Pictures on a page, at most, and the longest side of each.
const PICTURES: usize = 24;
const SIDE: u32 = 160;
/// Characters of a text, at most.
const LONGEST: usize = 280;

pub fn write(s: &Subject, shown: bool, out: &mut String) -> Result {
    let Some(noted) = &s.noted else { return Ok(()) };
    section(out, "calib", "Calibrated on")?;
    out.push_str("<p>The examples that rounding was fitted to: the model keeps best what they ask of it.</p>\n");
    open_table(out, "plain", "Calibration data", "", &[])?;
    let settings = &noted.settings;
    fact_row(out, "Source", settings.source.as_deref().unwrap_or("not recorded"))?;
    fact_row(out, "Entries used", &settings.samples.to_string())?;
    if let Some(tokens) = noted.tokens {
        fact_row(out, "Tokens", &tokens.to_string())?;
    }
    if let Some(own) = &noted.own_answers {
        let n: usize = own.values().map(Vec::len).sum();
        fact_row(out, "The model’s own answers", &format!("{n}, about {} pictures", own.len()))?;
    }
    for skipped in &noted.skipped {
        fact_row(out, "Skipped", skipped)?;
    }
    out.push_str(TABLE_END);
    if shown {
        cards(noted, out)?;
    }
    out.push_str("</section>\n");
    Ok(())
}

/// A calibration entry as it can be shown.
struct Shown {
    name: String,
    messages: Vec<Message>,
    pictures: Vec<std::result::Result<Rgb, String>>,
}

fn cards(noted: &Noted, out: &mut String) -> Result {
    let (entries, more) = match entries(noted) {
        Ok(found) => found,
        Err(problem) => {
            let hint = "Paths are looked for from where this page was made.";
            writeln!(out, "<p class=\"note\">The pictures are not shown: {}. {hint}</p>", text(&problem))?;
            (Vec::new(), 0)
        }
    };
    let own = noted.own_answers.as_ref();
    if entries.is_empty() {
        return own
            .into_iter()
            .flatten()
            .try_for_each(|(name, turns)| own_answers(out, &format!("Asked about {name}"), turns));
    }
    out.push_str("<div class=\"cards small\">\n");
    let mut lost = Vec::new();
    for entry in entries {
        out.push_str("<article class=\"card\">\n");
        for (i, picture) in entry.pictures.into_iter().enumerate() {
            match picture.and_then(|p| thumbnail(p, SIDE).ok_or_else(|| "has no pixels".into())) {
                Ok(url) => writeln!(out, "<img src=\"{url}\" alt=\"Picture {} of {}\">", i + 1, text(&entry.name))?,
                Err(problem) => lost.push(format!("{}: {problem}", entry.name)),
            }
        }
        writeln!(out, "<div><h3>{}</h3>", text(short_name(&entry.name)))?;
        for message in &entry.messages {
            let said: Vec<&str> = message
                .parts
                .iter()
                .filter_map(|p| if let Part::Text(t) = p { Some(t.as_str()) } else { None })
                .collect();
            writeln!(
                out,
                "<p><span class=\"who\">{}</span> {}</p>",
                text(&message.role),
                text(&clip(&said.join(" ")))
            )?;
        }
        if let Some(turns) = own.and_then(|own| own.get(&entry.name)) {
            own_answers(out, "Its own answers", turns)?;
        }
        out.push_str("</div>\n</article>\n");
    }
    out.push_str("</div>\n");
    notes(noted, more, &lost, out)
}

/// What the cards do not show.
fn notes(noted: &Noted, more: usize, lost: &[String], out: &mut String) -> Result {
    if more > 0 {
        writeln!(out, "<p class=\"note\">And {more} more entries.</p>")?;
    }
    for problem in lost {
        writeln!(out, "<p class=\"note\">Not shown: {}</p>", text(problem))?;
    }
    if noted.settings.source.as_deref() != Some("built-in") {
        out.push_str("<p class=\"note\">Pictures and texts are those that the source has now.</p>\n");
    }
    Ok(())
}

fn own_answers(out: &mut String, title: &str, turns: &Turns) -> Result {
    if turns.is_empty() {
        return Ok(());
    }
    writeln!(out, "<details><summary>{}</summary>\n<dl class=\"turns\">", text(title))?;
    for (question, answer) in turns {
        writeln!(out, "<dt>{}</dt><dd>{}</dd>", text(&clip(question)), text(&clip(answer)))?;
    }
    out.push_str("</dl></details>\n");
    Ok(())
}

/// The first entries that were used, and how many more there are.
fn entries(noted: &Noted) -> std::result::Result<(Vec<Shown>, usize), String> {
    let settings = &noted.settings;
    let source = settings.source.as_deref().ok_or("the record does not name the source")?;
    let used = settings.samples;
    let shown: Vec<Shown> = if source == "built-in" {
        let pairs = builtin::pairs().map_err(|e| e.to_string())?;
        let one = |p: builtin::BuiltIn| Shown {
            name: p.name.into(),
            messages: Conversation::single(p.question, p.answer, true),
            pictures: vec![Ok(p.image)],
        };
        pairs.into_iter().take(used.min(PICTURES)).map(one).collect()
    } else {
        listed(noted, Path::new(source))?
    };
    let more = used.saturating_sub(shown.len());
    Ok((shown, more))
}

/// Draws the entries of a list as calibration did.
fn listed(noted: &Noted, path: &Path) -> std::result::Result<Vec<Shown>, String> {
    if !path.is_file() && !path.is_dir() {
        return Err(format!("{} does not exist", path.display()));
    }
    let list = List::read(path, noted.image_root.as_deref()).map_err(|e| e.to_string())?;
    let root = if path.is_dir() { path } else { list.root() };
    let seed = noted.settings.switches.get("seed").and_then(serde_json::Value::as_u64).unwrap_or(0);
    let (mut shown, mut left) = (Vec::new(), PICTURES);
    for index in list.draw(noted.settings.drawn(noted.skipped.len()), seed) {
        let name = list.name(index);
        if noted.skipped.iter().any(|s| s.strip_prefix(&name).is_some_and(|rest| rest.starts_with(':'))) {
            continue;
        }
        if left == 0 {
            break;
        }
        let entry = list.conversation(index);
        let (messages, pictures) = match entry {
            Ok(c) => (c.messages, c.pictures.iter().take(left).map(|p| load(root, p)).collect()),
            Err(problem) => (Vec::new(), vec![Err(problem)]),
        };
        // Entries of text take a place, too.
        left -= pictures.len().clamp(1, left);
        shown.push(Shown { name, messages, pictures });
    }
    Ok(shown)
}

/// A page may be shown to others: a list, which may be a stranger's, shows no picture from outside its folder.
fn load(root: &Path, picture: &Picture) -> std::result::Result<Rgb, String> {
    if let Picture::File(path) = picture {
        let real = path.canonicalize().map_err(|e| format!("{}: {e}", path.display()))?;
        inside(root, &real).map_err(|_| {
            format!(
                "{} lies outside {}, the folder of the pictures; a page shows none from there",
                path.display(),
                root.display()
            )
        })?;
    }
    picture.load()
}

fn clip(said: &str) -> String {
    match said.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{}…", &said[..at]),
        None => said.into(),
    }
}

/// Without folders.
fn short_name(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}
