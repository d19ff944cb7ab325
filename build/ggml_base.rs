//! Compiles ggml-base (types, quantisers, GGUF) of the patched tree as a static library.

use crate::Result;
use crate::source::write_if_changed;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};

/// Compiles (only when something changed) and prints the link flags.
pub fn build(tree: &Path, out_dir: &Path) -> Result<()> {
    let ggml = tree.join("ggml");
    let sources = sources(&ggml)?;
    for name in ENVIRONMENT {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rustc-link-search=native={}", out_dir.display());
    // The C++ half calls the C half and the reverse: one archive for both.
    println!("cargo::rustc-link-lib=static=ggml-base");
    let target = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let msvc = std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "msvc");
    match target.as_str() {
        "macos" | "ios" | "freebsd" | "openbsd" => println!("cargo::rustc-link-lib=c++"),
        _ if msvc => {}
        _ => println!("cargo::rustc-link-lib=stdc++"),
    }

    let stamp = out_dir.join("ggml-base.stamp");
    let digest = digest(&ggml)?;
    let library = if msvc { "ggml-base.lib" } else { "libggml-base.a" };
    if fs::read_to_string(&stamp).is_ok_and(|old| old == digest) && out_dir.join(library).is_file() {
        return Ok(());
    }
    compile(&ggml, sources, out_dir)?;
    write_if_changed(&stamp, digest.as_bytes())
}

/// What changes how the C and C++ compilers work.
const ENVIRONMENT: [&str; 7] = ["CC", "CXX", "AR", "CFLAGS", "CXXFLAGS", "TARGET", "CXXSTDLIB"];

/// A digest of all that the library is made of.
fn digest(ggml: &Path) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    for name in ENVIRONMENT {
        std::env::var_os(name).hash(&mut hasher);
    }
    for folder in ["include", "src"] {
        let folder = ggml.join(folder);
        let mut files: Vec<PathBuf> = fs::read_dir(&folder)
            .map_err(|e| format!("{}: {e}", folder.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.is_file())
            .collect();
        files.sort();
        for path in files {
            path.hash(&mut hasher);
            fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?.hash(&mut hasher);
        }
    }
    Ok(format!("{:016x}", hasher.finish()))
}

fn compile(ggml: &Path, sources: Vec<PathBuf>, out_dir: &Path) -> Result<()> {
    let include = out_dir.join("ggml-base-include");
    write_if_changed(
        &include.join("ggml-version.h"),
        b"#pragma once\n#define GGML_VERSION \"static\"\n#define GGML_COMMIT \"unknown\"\n",
    )?;

    let (c, cpp): (Vec<_>, Vec<_>) = sources.into_iter().partition(|path| path.extension().is_some_and(|e| e == "c"));
    let mut objects = Vec::new();
    for (files, is_cpp) in [(cpp, true), (c, false)] {
        let mut build = cc::Build::new();
        build
            .cpp(is_cpp)
            .std(if is_cpp { "c++17" } else { "c11" })
            .include(&include)
            .include(ggml.join("include"))
            .include(ggml.join("src"))
            .files(files)
            // The same code that a release build of the runtime runs, whatever cargo's profile is.
            .opt_level(3)
            .define("NDEBUG", None)
            .warnings(false);
        if cfg!(target_os = "linux") {
            build.define("_GNU_SOURCE", None);
        }
        if cfg!(target_os = "macos") {
            build.define("_DARWIN_C_SOURCE", None);
        }
        objects.extend(build.cargo_metadata(false).try_compile_intermediates().map_err(|e| {
            format!(
                "ggml-base does not compile: {e}\n\
                 A C and a C++17 compiler are needed (Debian, Ubuntu: apt-get install build-essential)"
            )
        })?);
    }
    cc::Build::new()
        .cargo_metadata(false)
        .objects(objects)
        .try_compile("ggml-base")
        .map_err(|e| format!("ggml-base cannot be archived in {}: {e}", out_dir.display()))
}

/// The C and C++ files of target ggml-base, as its CMakeLists.txt names them.
fn sources(ggml: &Path) -> Result<Vec<PathBuf>> {
    let path = ggml.join("src/CMakeLists.txt");
    let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let files: Vec<PathBuf> = text
        .split_once("add_library(ggml-base\n")
        .and_then(|(_, rest)| rest.split_once(')'))
        .map(|(list, _)| list.split_whitespace())
        .into_iter()
        .flatten()
        .filter(|name| name.ends_with(".c") || name.ends_with(".cpp"))
        .map(|name| ggml.join("src").join(name))
        .collect();
    if files.is_empty() {
        return Err(format!("{}: no add_library(ggml-base …) with sources in it", path.display()));
    }
    Ok(files)
}
