//! What the program and its runtime need of the system, on Linux.
use super::BundleError;
use crate::digest::file_name;
use crate::runtime::engine::Runtime;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Libraries beside the C library that a machine may lack; they are small, and may be passed on.
const CARRIED: [&str; 3] = ["libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1"];
/// Every Linux with glibc has these, and they must be its own.
const OF_GLIBC: [&str; 11] = [
    "ld-linux",
    "libc.",
    "libm.",
    "libmvec.",
    "libdl.",
    "libpthread.",
    "librt.",
    "libresolv.",
    "libutil.",
    "libnss_",
    "libanl.",
];

pub struct SystemLibraries {
    /// To be carried.
    pub files: Vec<PathBuf>,
    /// Names of others, which must be where the bundle runs.
    pub missing: Vec<String>,
}

/// Libraries of the system that are loaded when the runtime in `dir` is.
///
/// # Errors
/// The runtime does not load.
pub fn of_system(dir: &Path) -> Result<SystemLibraries, BundleError> {
    let runtime = Runtime::open(dir)?;
    let own = runtime.dir().canonicalize().unwrap_or_else(|_| runtime.dir().into());
    // Other systems have what is needed, or name it themselves.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let paths: BTreeSet<PathBuf> = maps.lines().filter_map(mapped).filter(|path| !path.starts_with(&own)).collect();
    let (mut files, mut others) = (Vec::new(), Vec::new());
    for path in paths {
        let name = file_name(&path);
        match CARRIED.iter().find(|carried| name.starts_with(*carried)) {
            // The name that is asked for, not that of the version behind it.
            Some(carried) => files.push(path.with_file_name(carried)),
            None if OF_GLIBC.iter().any(|ours| name.starts_with(ours)) => (),
            None => others.push(name),
        }
    }
    files.dedup();
    Ok(SystemLibraries { files, missing: asked_for(&own, others) })
}

/// Those of the system's libraries `names` that the runtime in `dir` cannot do without. Vulkan's drivers are none: they come
/// with a system's Vulkan, and without one its backend is not loaded.
fn asked_for(dir: &Path, mut names: Vec<String>) -> Vec<String> {
    let mut asked = Vec::new();
    let files = std::fs::read_dir(dir).into_iter().flatten().filter_map(|file| Some(file.ok()?.path()));
    for path in files.filter(|path| !file_name(path).contains("ggml-vulkan")) {
        if names.is_empty() {
            break;
        }
        let bytes = std::fs::read(&path).unwrap_or_default();
        asked.extend(names.extract_if(.., |name| {
            let stem = name.find(".so").map_or(name.as_str(), |end| &name[..end + 3]);
            bytes.windows(stem.len()).any(|at| at == stem.as_bytes())
        }));
    }
    asked.sort();
    asked
}

/// The shared library of a line of /proc/self/maps.
fn mapped(line: &str) -> Option<PathBuf> {
    let path = &line[line.find('/')?..];
    let name = path.rsplit('/').next()?;
    (name.ends_with(".so") || name.contains(".so.")).then(|| path.into())
}

/// The newest version of glibc that one of `files` asks for: N of 2.N.
///
/// # Errors
/// A file that cannot be read.
pub fn newest_glibc<'p>(files: impl Iterator<Item = &'p Path>) -> Result<Option<u32>, BundleError> {
    let mut newest = None;
    for path in files {
        let bytes = std::fs::read(path).map_err(BundleError::io(path, "cannot read"))?;
        newest = newest.max(glibc_in(&bytes));
    }
    Ok(newest)
}

/// Versions stand in a file's table of strings as `GLIBC_2.34`.
fn glibc_in(bytes: &[u8]) -> Option<u32> {
    const MARK: &[u8] = b"GLIBC_2.";
    let places = bytes.windows(MARK.len()).enumerate().filter(|(_, window)| *window == MARK);
    let minor = |at: usize| {
        let digits: Vec<u8> = bytes[at + MARK.len()..].iter().copied().take_while(u8::is_ascii_digit).take(3).collect();
        String::from_utf8(digits).ok()?.parse().ok()
    };
    places.filter_map(|(at, _)| minor(at)).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_versions_are_found() {
        let line = "7f13a2200000-7f13a2299000 r--p 00000000 fe:00 1234   /usr/lib/x86_64-linux-gnu/libstdc++.so.6.0.30";
        assert_eq!(mapped(line), Some("/usr/lib/x86_64-linux-gnu/libstdc++.so.6.0.30".into()));
        assert_eq!(mapped("7ffc0000-7ffc1000 r-xp 00000000 00:00 0   [vdso]"), None);
        assert_eq!(mapped("7f13 r--p 0 fe:00 12   /models/sofa.gguf"), None);
        assert_eq!(glibc_in(b"\0GLIBC_2.4\0GLIBC_2.34\0GLIBC_PRIVATE\0GLIBC_2.17\0GLIBC_2."), Some(34));
        assert_eq!(glibc_in(b"no GLIBC"), None);
    }

    #[test]
    fn what_vulkan_brings_is_not_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("libggml-cuda.so"), b"\0libcublas.so.13\0libc.so.6\0").unwrap();
        std::fs::write(dir.path().join("libggml-vulkan.so"), b"\0libvulkan.so.1\0").unwrap();
        let names = ["libvulkan.so.1.4.309", "libcublas.so.13.1", "libLLVM.so.19.1"].map(String::from).to_vec();
        assert_eq!(asked_for(dir.path(), names), ["libcublas.so.13.1"]);
    }
}
