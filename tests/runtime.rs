//! The embedded runtime and source tree, through the program.
#![cfg_attr(not(feature = "runtime"), allow(dead_code))]

use std::path::Path;
use std::process::{Command, Output};

fn program(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mbq-convert")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs with nothing in the environment that could lead to libraries.
fn bare(path: &Path) -> Command {
    let mut command = Command::new(path);
    command.env_clear().env("PATH", "/usr/bin:/bin");
    command
}

#[cfg(feature = "runtime")]
#[test]
fn an_installed_runtime_may_be_moved() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("elsewhere/second"));
    let output = program(&["runtime", "install", first.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    std::fs::create_dir(dir.path().join("elsewhere")).unwrap();
    std::fs::rename(&first, &second).unwrap();
    for tool in [
        "llama-mtmd-cli",
        "llama-bench",
        "llama-perplexity",
        "llama-quantize",
        "llama-imatrix",
        "llama-completion",
        "llama-gguf-split",
    ] {
        let path = second.join(mbq_convert::runtime::tool_file(tool));
        let output = bare(&path).arg("--help").current_dir("/").output().unwrap();
        // llama-quantize and llama-gguf-split exit with 1 after their usage; a library that is not
        // found exits with 127 and prints none.
        let shown = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.code().is_some_and(|code| code < 2), "{tool}: {shown}");
        assert!(shown.to_lowercase().contains("usage") && shown.contains("--"), "{tool}: {shown}");
    }
    // The tools know the new type: that this is the patched tree.
    let output = bare(&second.join("llama-quantize")).arg("--help").output().unwrap();
    assert!((text(&output.stdout) + &text(&output.stderr)).contains("MBQ3"));
    // Whole libraries only.
    assert!(second.join(mbq_convert::runtime::library_file("mtmd")).is_file());
    assert_eq!(mbq_convert::runtime::directory(Some(&second)).unwrap(), second);
}

#[cfg(feature = "runtime")]
#[test]
fn the_source_tree_builds_with_plain_cmake() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    let output = program(&["runtime", "source", tree.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(tree.join("LICENSE").is_file());
    assert!(tree.join("ggml/src/ggml-mbq3.c").is_file());
    // The switches that BUILD.md names.
    let switches = std::fs::read_to_string(tree.join("BUILD.md")).unwrap();
    let switches: Vec<&str> = switches
        .split_once("cmake -B build")
        .unwrap()
        .1
        .split_once("cmake --build")
        .unwrap()
        .0
        .split_whitespace()
        .filter(|word| word.starts_with("-D"))
        .collect();
    assert!(switches.len() >= 5, "{switches:?}");
    let mut cmake = Command::new("cmake");
    cmake.args(["-S", "."]).args(["-B", "build"]).args(&switches).current_dir(&tree);
    let output = cmake.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let mut cmake = Command::new("cmake");
    cmake.args(["--build", "build", "--target", "ggml-base"]).current_dir(&tree);
    let output = cmake.output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(tree.join("build/bin").join(mbq_convert::runtime::library_file("ggml-base")).exists());
}

#[cfg(not(feature = "runtime"))]
#[test]
fn a_build_without_runtime_says_so() {
    let dir = tempfile::tempdir().unwrap();
    for what in ["install", "source"] {
        let target = dir.path().join(what);
        let output = program(&["runtime", what, target.to_str().unwrap()]);
        assert!(!output.status.success());
        assert!(text(&output.stderr).contains("without the runtime"), "{}", text(&output.stderr));
        assert!(!target.exists());
    }
}

#[test]
fn chat_needs_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    let missing = program(&["chat", model.to_str().unwrap(), "-p", "hello"]);
    assert!(!missing.status.success());
    assert!(text(&missing.stderr).contains("model.gguf: no such file"), "{}", text(&missing.stderr));
    std::fs::write(&model, "").unwrap();
    let no_mmproj = program(&["chat", model.to_str().unwrap(), "-p", "hello"]);
    assert!(!no_mmproj.status.success());
    assert!(text(&no_mmproj.stderr).contains("no mmproj*.gguf beside it"), "{}", text(&no_mmproj.stderr));
}

/// The files below `dir` and their contents.
#[cfg(feature = "runtime")]
fn contents(dir: &Path) -> std::collections::BTreeMap<std::path::PathBuf, Vec<u8>> {
    let mut all = std::collections::BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(contents(&path)),
            false => drop(all.insert(path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    all
}

/// `runtime patch` on the patched tree, on the tree without our changes, and on one that has moved on.
#[cfg(feature = "runtime")]
#[test]
fn a_checkout_is_patched_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    let at = tree.to_str().unwrap();
    assert!(program(&["runtime", "source", at]).status.success());
    let patched = contents(&tree);
    let patch = || program(&["runtime", "patch", at]);
    let done = patch();
    assert!(done.status.success() && text(&done.stderr).contains("already applied"), "{}", text(&done.stderr));
    assert!(contents(&tree) == patched);

    // Our changes taken back, by git, which the patches are written for.
    let patches = Path::new(env!("CARGO_MANIFEST_DIR")).join("patches");
    let mut names: Vec<_> = std::fs::read_dir(&patches).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|e| e == "patch"));
    names.sort();
    for name in names.iter().rev() {
        let git = Command::new("git")
            .args(["apply", "-R", "--unsafe-paths", "--directory", at])
            .arg(name)
            .current_dir("/")
            .output();
        let Ok(git) = git else { return eprintln!("skipped: git is not here") };
        assert!(git.status.success(), "{}: {}", name.display(), text(&git.stderr));
    }
    let added = contents(&patches.join("files"));
    for path in added.keys() {
        std::fs::remove_file(tree.join(path.strip_prefix(patches.join("files")).unwrap())).unwrap();
    }
    let plain = contents(&tree);
    assert!(plain.len() + added.len() == patched.len() && plain != patched);
    #[cfg(unix)]
    let mode = {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(tree.join("ggml/src/ggml.c"), std::fs::Permissions::from_mode(0o750)).unwrap();
        |tree: &Path| tree.join("ggml/src/ggml.c").metadata().unwrap().permissions().mode() & 0o777
    };
    let done = patch();
    assert!(done.status.success() && text(&done.stderr).contains("files changed or added"), "{}", text(&done.stderr));
    assert!(contents(&tree) == patched);
    #[cfg(unix)]
    assert_eq!(mode(&tree), 0o750, "a changed file keeps its permissions");

    // One of many files has moved on, and one of ours is another: both are named, and nothing is written.
    let (moved, ours) = (tree.join("ggml/src/ggml.c"), tree.join("ggml/src/ggml-mbq3.c"));
    for (path, content) in &plain {
        std::fs::write(path, content).unwrap();
    }
    std::fs::write(&moved, text(&plain[&moved]).replace("GGML_TYPE_", "GGML_KIND_")).unwrap();
    std::fs::write(&ours, "other").unwrap();
    let before = contents(&tree);
    let done = patch();
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    for words in [
        "ggml/src/ggml.c: 0002-mbq3.patch, hunk ",
        "does not fit",
        "ggml-mbq3.c: another version",
        "nothing was written",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(contents(&tree) == before);
    let done = program(&["runtime", "patch", dir.path().to_str().unwrap()]);
    assert!(text(&done.stderr).contains("llama.cpp checkout"), "{}", text(&done.stderr));
}

/// The tag that a wheel gets for the versions of glibc and libstdc++ that its files ask for (PEP 600's policies).
#[cfg(all(feature = "runtime", target_os = "linux"))]
#[test]
fn a_wheel_promises_no_older_system_than_its_libraries_need() {
    use std::io::Write;
    let tag = |symbols: &str| {
        let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("build/wheel/tag.sh"));
        let pipe = std::process::Stdio::piped;
        let mut child = script.stdin(pipe()).stdout(pipe()).stderr(pipe()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(symbols.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (text(&output.stdout).trim().to_owned(), text(&output.stderr))
    };
    for (symbols, wanted) in [
        ("GLIBC_2.2.5\nGLIBC_2.34 GLIBC_2.4\n", "manylinux_2_34"),
        ("GLIBC_2.34 GLIBCXX_3.4.9 GLIBCXX_3.4.30", "manylinux_2_35"),
        ("GLIBC_2.38 GLIBCXX_3.4.30", "manylinux_2_38"),
        ("GLIBC_2.17 GLIBCXX_3.4.32", "manylinux_2_39"),
    ] {
        assert_eq!(tag(symbols).0, wanted, "{symbols}");
    }
    assert!(tag("GLIBC_2.50 GLIBCXX_3.4.99").1.contains("GLIBCXX_3.4.99"));
    assert!(tag("GOMP_4.5").1.contains("no glibc"));
}
