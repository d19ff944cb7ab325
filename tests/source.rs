//! The part of the build script that finds and patches llama.cpp, on a small tree of its own.

#[allow(dead_code)]
#[path = "../build/source.rs"]
mod source;

use std::fs;
use std::path::Path;
use std::time::SystemTime;

/// As in build.rs, whose module this test includes.
type Result<T> = std::result::Result<T, String>;

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

const PATCH: &str = "\
diff --git a/src/a.c b/src/a.c
--- a/src/a.c
+++ b/src/a.c
@@ -1,3 +1,4 @@
 one
 two
+and a half
 three
";

const SECOND: &str = "\
diff --git a/src/a.c b/src/a.c
--- a/src/a.c
+++ b/src/a.c
@@ -2,3 +2,3 @@
 two
-and a half
+and a quarter
 three
";

#[test]
fn patches_apply_in_order_once_and_only_what_changed_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (origin, patches, tree) = (dir.path().join("origin"), dir.path().join("patches"), dir.path().join("tree"));
    write(&origin.join("src/a.c"), "one\ntwo\nthree\n");
    write(&origin.join("src/b.c"), "untouched\n");
    write(&origin.join("scripts/ui-assets.cmake"), "llama-server reads it\n");
    write(&origin.join("ggml/src/ggml-sycl/big.cpp"), "left out\n");
    write(&origin.join(".git/config"), "left out\n");
    write(&origin.join("models/huge.bin"), "left out\n");
    write(&patches.join("0002-second.patch"), SECOND);
    write(&patches.join("0001-first.patch"), PATCH);
    write(&patches.join("files/src/own/kernel.c"), "own\n");
    write(&patches.join("README.md"), "no patch");

    source::patch(&origin, &patches, &tree).unwrap();
    let read = |name: &str| fs::read_to_string(tree.join(name)).unwrap();
    assert_eq!(read("src/a.c"), "one\ntwo\nand a quarter\nthree\n");
    assert_eq!(read("src/own/kernel.c"), "own\n");
    assert_eq!(read("scripts/ui-assets.cmake"), "llama-server reads it\n");
    assert!(!tree.join("ggml").exists() && !tree.join(".git").exists() && !tree.join("models").exists());

    // Again: nothing is patched twice, no time stamp moves, so no compiler starts.
    let files = ["src/a.c", "src/b.c", "src/own/kernel.c"];
    let before = files.map(|name| modified(&tree.join(name)));
    source::patch(&origin, &patches, &tree).unwrap();
    assert_eq!(files.map(|name| modified(&tree.join(name))), before);
    assert_eq!(read("src/a.c"), "one\ntwo\nand a quarter\nthree\n");

    // Without patches it is the origin again, and what the patches added is gone.
    source::patch(&origin, &dir.path().join("none"), &tree).unwrap();
    assert_eq!(read("src/a.c"), "one\ntwo\nthree\n");
    assert!(!tree.join("src/own/kernel.c").exists());
    assert_eq!(modified(&tree.join("src/b.c")), before[1]);
}

/// `runtime patch DIR`, then `MBQ_LLAMA_CPP_DIR=DIR`.
#[test]
fn a_checkout_that_has_the_changes_builds_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (origin, patches, tree) = (dir.path().join("origin"), dir.path().join("patches"), dir.path().join("tree"));
    write(&origin.join("src/a.c"), "one\ntwo\nand a quarter\nthree\n");
    write(&patches.join("0001-first.patch"), PATCH);
    write(&patches.join("0002-second.patch"), SECOND);
    source::patch(&origin, &patches, &tree).unwrap();
    assert_eq!(fs::read_to_string(tree.join("src/a.c")).unwrap(), "one\ntwo\nand a quarter\nthree\n");
    // Half of them is neither.
    write(&origin.join("src/a.c"), "one\ntwo\nand a half\nthree\n");
    let error = source::patch(&origin, &patches, &tree).unwrap_err();
    assert!(error.contains("src/a.c: 0001-first.patch, hunk 1 of 1 (line 1) does not fit"), "{error}");
}

#[test]
fn patches_that_do_more_than_change_texts_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let new = "diff --git a/b.c b/b.c\nnew file mode 100644\n--- /dev/null\n+++ b/b.c\n@@ -0,0 +1 @@\n+new\n";
    write(&dir.path().join("patches/0001.patch"), new);
    let error = source::patch(dir.path(), &dir.path().join("patches"), &dir.path().join("tree")).unwrap_err();
    assert!(error.contains("0001.patch: it does more than change files"), "{error}");
}

#[test]
fn a_patch_that_does_not_fit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (origin, patches) = (dir.path().join("origin"), dir.path().join("patches"));
    write(&origin.join("src/a.c"), "something else\n");
    write(&patches.join("0001-first.patch"), PATCH);
    let error = source::patch(&origin, &patches, &dir.path().join("tree")).unwrap_err();
    assert!(error.contains("0001-first.patch") && error.contains("src/a.c"), "{error}");
    fs::remove_file(origin.join("src/a.c")).unwrap();
    let error = source::patch(&origin, &patches, &dir.path().join("tree")).unwrap_err();
    assert!(error.contains("0001-first.patch") && error.contains("src/a.c"), "{error}");
}

#[test]
fn a_missing_source_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let chosen = Some(dir.path().as_os_str().to_owned());
    let error = source::find(dir.path(), chosen).unwrap_err();
    assert!(error.contains("MBQ_LLAMA_CPP_DIR") && error.contains("ggml/include/ggml.h"), "{error}");

    // A package whose lock file lacks the source.
    write(&dir.path().join("Cargo.toml"), "[package]\nname = \"empty\"\nversion = \"0.1.0\"\n[workspace]\n");
    write(&dir.path().join("Cargo.lock"), "version = 4\n\n[[package]]\nname = \"empty\"\nversion = \"0.1.0\"\n");
    write(&dir.path().join("src/lib.rs"), "");
    let error = source::find(dir.path(), None).unwrap_err();
    assert!(error.contains("cargo fetch --locked") && error.contains("MBQ_LLAMA_CPP_DIR"), "{error}");
}

#[test]
fn the_locked_package_is_found() {
    let found = source::find(Path::new(env!("CARGO_MANIFEST_DIR")), None).unwrap();
    assert!(found.join("ggml/include/ggml.h").is_file(), "{}", found.display());
}
