//! Where a picture named in a data file lies. Such files come from strangers: what they name must not reach pictures
//! outside the folder that the user handed over, for a report or a model's answers would show them.
use std::path::{Component, Path, PathBuf};

/// Why a named picture is not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocateError {
    #[error("picture {path} does not exist; paths are relative to {root} (--image-root)")]
    Missing { path: PathBuf, root: PathBuf },
    #[error(
        "picture {path} lies outside {root} (an absolute path, `..` or a symbolic link), where a data file may not \
         reach; if that is meant, name a folder that holds all pictures with --image-root"
    )]
    Outside { path: PathBuf, root: PathBuf },
    #[error("{root}: the folder of pictures (--image-root) cannot be read: {source}")]
    Root { root: PathBuf, source: std::io::Error },
}

/// The file that `path`, as written in a data file, names below `root`: the folder of the data file, or the one that
/// the user gave as `--image-root`. Absolute paths, `..` and symbolic links are followed as long as they end inside.
///
/// # Errors
/// The file does not exist or lies outside; `root` is no readable folder.
pub fn inside(root: &Path, path: &Path) -> Result<PathBuf, LocateError> {
    let root = if root.as_os_str().is_empty() { Path::new(".") } else { root };
    let outside = || LocateError::Outside { path: path.into(), root: root.into() };
    let real_root = root.canonicalize().map_err(|source| LocateError::Root { root: root.into(), source })?;
    let named = root.join(path);
    let Ok(real) = named.canonicalize() else {
        // Whether a file exists outside is nobody's business either.
        return Err(if leaves(&real_root, path) {
            outside()
        } else {
            LocateError::Missing { path: path.into(), root: root.into() }
        });
    };
    if !real.starts_with(&real_root) && !hub_blobs(&real_root).is_some_and(|blobs| real.starts_with(blobs)) {
        return Err(outside());
    }
    if real.is_file() { Ok(named) } else { Err(LocateError::Missing { path: path.into(), root: root.into() }) }
}

/// Whether `path` leads out of `root` by its wording alone.
fn leaves(root: &Path, path: &Path) -> bool {
    let mut depth = 0i64;
    for part in path.strip_prefix(root).unwrap_or(path).components() {
        match part {
            Component::Normal(_) => depth += 1,
            Component::ParentDir => depth -= 1,
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return true,
        }
        if depth < 0 {
            return true;
        }
    }
    false
}

/// In the hub's cache the files of `snapshots/REVISION` are links into `blobs` of the same repository.
fn hub_blobs(root: &Path) -> Option<PathBuf> {
    let snapshots = root.ancestors().find(|p| p.file_name().is_some_and(|name| name == "snapshots"))?;
    let blobs = snapshots.parent()?.join("blobs");
    blobs.is_dir().then_some(blobs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `data/a.png`, `data/sub/b.png` and, outside, `private.png`.
    fn tree() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        std::fs::create_dir_all(data.join("sub")).unwrap();
        for name in ["data/a.png", "data/sub/b.png", "private.png"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        (dir, data)
    }

    #[test]
    fn pictures_inside_are_found() {
        let (dir, data) = tree();
        for path in ["a.png", "./sub/../a.png", "sub/b.png"] {
            assert_eq!(inside(&data, Path::new(path)).unwrap(), data.join(path));
        }
        assert!(inside(&data, &data.join("a.png")).is_ok(), "an absolute path that ends inside");
        assert!(inside(dir.path(), &dir.path().join("private.png")).is_ok(), "a wider root was given");
    }

    #[test]
    fn nothing_outside_is_reached() {
        let (dir, data) = tree();
        let absolute = dir.path().join("private.png");
        let absent = dir.path().join("absent.png");
        for path in [Path::new("../private.png"), &absolute, Path::new("sub/../../private.png")] {
            assert!(matches!(inside(&data, path), Err(LocateError::Outside { .. })), "{path:?}");
        }
        for path in [Path::new("../absent.png"), &absent] {
            assert!(matches!(inside(&data, path), Err(LocateError::Outside { .. })), "{path:?}: existence is not told");
        }
        for path in ["absent.png", "sub"] {
            assert!(matches!(inside(&data, Path::new(path)), Err(LocateError::Missing { .. })), "{path}");
        }
        assert!(matches!(inside(&dir.path().join("none"), Path::new("a")), Err(LocateError::Root { .. })));
    }

    #[cfg(unix)]
    #[test]
    fn links_count_by_where_they_lead() {
        use std::os::unix::fs::symlink;
        let (dir, data) = tree();
        symlink(dir.path().join("private.png"), data.join("link.png")).unwrap();
        symlink("a.png", data.join("own.png")).unwrap();
        assert!(matches!(inside(&data, Path::new("link.png")), Err(LocateError::Outside { .. })));
        assert!(inside(&data, Path::new("own.png")).is_ok());
        // The hub's cache.
        let snapshot = dir.path().join("hub/snapshots/rev");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(dir.path().join("hub/blobs")).unwrap();
        std::fs::write(dir.path().join("hub/blobs/0f"), "x").unwrap();
        symlink("../../blobs/0f", snapshot.join("c.png")).unwrap();
        assert!(inside(&snapshot, Path::new("c.png")).is_ok());
    }
}
