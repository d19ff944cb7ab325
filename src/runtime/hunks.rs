//! Patches by the file that they change, and whether their hunks fit it. The build script reads this file, too.
use diffy::patch_set::{FileOperation, ParseOptions, PatchSet};
use diffy::{Hunk, Line, Patch};
use std::collections::BTreeMap;

/// The patches of each file, in their order: a patch's name, and its part for the file.
pub type Edits<'a> = BTreeMap<String, Vec<(&'a str, Patch<'a, str>)>>;

/// Sorts patches (name, text in git's format) by the file that they change.
///
/// # Errors
/// A patch that is none, or does more than change texts.
pub fn edits<'a>(patches: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Edits<'a>, String> {
    let mut edits = Edits::new();
    for (name, text) in patches {
        for file in PatchSet::parse(text, ParseOptions::gitdiff()) {
            let file = file.map_err(|e| format!("{name}: {e}"))?;
            let path = match file.operation().strip_prefix(1) {
                FileOperation::Modify { modified, .. } => modified.to_string(),
                _ => return Err(format!("{name}: it does more than change files")),
            };
            let patch = file.patch().as_text().ok_or_else(|| format!("{name}: {path} is not text"))?.clone();
            edits.entry(path).or_default().push((name, patch));
        }
    }
    Ok(edits)
}

/// The file's text with all edits, its own if it has them already, or a line for each hunk that does not fit.
///
/// # Errors
/// Those lines, each naming the file. `before`: none where there is no file.
pub fn edited(path: &str, before: Option<&str>, edits: &[(&str, Patch<str>)]) -> Result<String, Vec<String>> {
    let Some(before) = before else {
        let names = edits.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        return Err(vec![format!("{path}: is not there; {names} changes it")]);
    };
    if is_applied(before, edits) {
        return Ok(before.into());
    }
    apply(before, edits).map_err(|failures| failures.into_iter().map(|what| format!("{path}: {what}")).collect())
}

/// Whether a file is what the edits make: they can all be taken back, and lead here again.
fn is_applied(text: &str, edits: &[(&str, Patch<str>)]) -> bool {
    let back = edits.iter().rev().try_fold(text.to_owned(), |text, (_, patch)| diffy::apply(&text, &patch.reverse()));
    let again = back.ok().and_then(|text| apply(&text, edits).ok());
    again.is_some_and(|again| again == text)
}

/// The text with all edits, or what does not fit.
fn apply(text: &str, edits: &[(&str, Patch<str>)]) -> Result<String, Vec<String>> {
    let (mut text, mut failures) = (text.to_owned(), Vec::new());
    for (name, patch) in edits {
        match diffy::apply(&text, patch) {
            Ok(after) => text = after,
            Err(error) => {
                let hunks = patch.hunks();
                let before = failures.len();
                for (i, hunk) in hunks.iter().enumerate() {
                    let [old, new] = sides(hunk);
                    if text.contains(&old) {
                        // What comes after is judged with the changes that fit.
                        text = text.replacen(&old, &new, 1);
                    } else {
                        let at = hunk.old_range().start();
                        let place = hunk.function_context().map_or(String::new(), |c| format!(", {}", c.trim()));
                        failures.push(format!(
                            "{name}, hunk {} of {} (line {at}{place}) does not fit",
                            i + 1,
                            hunks.len()
                        ));
                    }
                }
                if failures.len() == before {
                    failures.push(format!("{name}: {error}"));
                }
            }
        }
    }
    if failures.is_empty() {
        return Ok(text);
    }
    if text.contains("\r\n") {
        failures = vec!["it has lines that end in CR LF; clone with `git -c core.autocrlf=false clone …`".into()];
    }
    Err(failures)
}

/// The lines of a hunk before and after.
fn sides(hunk: &Hunk<str>) -> [String; 2] {
    let mut sides = [String::new(), String::new()];
    for line in hunk.lines() {
        let (text, of) = match line {
            Line::Context(text) => (text, [true, true]),
            Line::Delete(text) => (text, [true, false]),
            Line::Insert(text) => (text, [false, true]),
        };
        sides.iter_mut().zip(of).filter(|(_, of)| *of).for_each(|(side, _)| side.push_str(text));
    }
    sides
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hunks_that_do_not_fit_are_named_one_by_one() {
        let text = "--- a/f\n+++ b/f\n@@ -1,2 +1,3 @@\n a\n+new\n b\n@@ -5,2 +6,2 @@ fn place()\n e\n-f\n+F\n";
        let edits = [("0001.patch", Patch::from_str(text).unwrap())];
        let old = "a\nb\nc\nd\ne\nf\n";
        let new = apply(old, &edits).unwrap();
        assert_eq!(new, "a\nnew\nb\nc\nd\ne\nF\n");
        assert!(is_applied(&new, &edits) && !is_applied(old, &edits));
        let said = apply("a\nb\nc\nd\ne\nother\n", &edits).unwrap_err();
        assert_eq!(said, ["0001.patch, hunk 2 of 2 (line 5, fn place()) does not fit"]);
        assert_eq!(apply("x\ny\n", &edits).unwrap_err().len(), 2);
        assert!(apply(&old.replace('\n', "\r\n"), &edits).unwrap_err()[0].contains("CR LF"));
    }
}
