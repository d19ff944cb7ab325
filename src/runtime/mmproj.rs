//! Which vision file belongs to a language model.

use super::RuntimeError;
use crate::gguf::{ShardName, pair_of};
use std::path::{Path, PathBuf};

/// The `mmproj*.gguf` beside `model`. Of several, the one that was made with the model ([`pair_of`]) is taken, of several
/// such the one that carries its name (`mmproj-NAME-….gguf` for `NAME.gguf`); if that does not decide it, the error lists
/// them.
pub fn find_mmproj(model: &Path) -> Result<PathBuf, RuntimeError> {
    let dir = match model.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let list = std::fs::read_dir(dir).map_err(|source| RuntimeError::Io {
        path: dir.to_path_buf(),
        action: "cannot list the folder",
        source,
    })?;
    let mut found: Vec<String> = list
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("mmproj") && name.ends_with(".gguf"))
        .collect();
    found.sort();
    if found.len() > 1
        && let Some(pair) = pair_of(model)
    {
        let made_with: Vec<String> =
            found.iter().filter(|name| pair_of(&dir.join(name)).as_ref() == Some(&pair)).cloned().collect();
        if !made_with.is_empty() {
            found = made_with;
        }
    }
    if found.len() > 1 {
        let stem = ShardName::stem_of(model);
        // What follows the model's name: a type, or the rest of the name of another model, as q4_k-matrix is of q4_k.
        let rest = |name: &String| {
            let rest = name.strip_prefix("mmproj-")?.strip_prefix(&stem)?.strip_suffix(".gguf")?;
            (rest.is_empty() || rest.starts_with('-')).then(|| rest.matches('-').count())
        };
        if let Some(fewest) = found.iter().filter_map(rest).min() {
            found.retain(|name| rest(name) == Some(fewest));
        }
    }
    match found.as_slice() {
        [one] => Ok(dir.join(one)),
        [] => Err(RuntimeError::NoMmproj { model: model.to_path_buf() }),
        several => Err(RuntimeError::AmbiguousMmproj { model: model.to_path_buf(), found: several.join(", ") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Header, PAIR_KEY};

    #[test]
    fn one_is_found_and_a_choice_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model.gguf");
        let touch = |name: &str| std::fs::write(dir.path().join(name), "").unwrap();
        touch("model.gguf");
        assert!(matches!(find_mmproj(&model), Err(RuntimeError::NoMmproj { .. })));
        touch("mmproj-other-f16.gguf");
        assert_eq!(find_mmproj(&model).unwrap(), dir.path().join("mmproj-other-f16.gguf"));
        touch("mmproj-third-f16.gguf");
        let error = find_mmproj(&model).unwrap_err().to_string();
        assert!(error.contains("mmproj-other-f16.gguf, mmproj-third-f16.gguf"), "{error}");
        touch("mmproj-model-f16.gguf");
        assert_eq!(find_mmproj(&model).unwrap(), dir.path().join("mmproj-model-f16.gguf"));
        // The first file of a split model is named after the same stem.
        let split = dir.path().join("model-00001-of-00002.gguf");
        assert_eq!(find_mmproj(&split).unwrap(), dir.path().join("mmproj-model-f16.gguf"));
        touch("mmproj-model-other-f16.gguf");
        assert_eq!(find_mmproj(&model).unwrap(), dir.path().join("mmproj-model-f16.gguf"));
        touch("mmproj-model-q8_0.gguf");
        assert!(matches!(find_mmproj(&model), Err(RuntimeError::AmbiguousMmproj { .. })));
        // The id decides before names do.
        let mark = |name: &str, pair: &str| {
            let mut header = Header::default();
            header.metadata.set(PAIR_KEY, pair);
            std::fs::write(dir.path().join(name), header.encode()).unwrap();
        };
        mark("model.gguf", "a");
        mark("mmproj-model-f16.gguf", "b");
        mark("mmproj-third-f16.gguf", "a");
        assert_eq!(find_mmproj(&model).unwrap(), dir.path().join("mmproj-third-f16.gguf"));
    }
}
