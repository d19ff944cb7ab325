//! `mbq-convert bundle`: what is in it, that its script starts what is in it, and what is refused.
mod common;
mod tiny;

use common::runtime_dir;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tiny::{Naming, checkpoint, convert, listing, program, text};

/// The made-up model, converted below `parent` as `name`.
fn model(parent: &Path, name: &str, args: &[&str]) -> PathBuf {
    let checkpoint = checkpoint(parent, Naming::Published, 1);
    let out = parent.join("out").join(name);
    std::fs::create_dir_all(out.parent().unwrap()).unwrap();
    let done = convert(&checkpoint, &out, args);
    assert!(done.status.success(), "{}", text(&done.stderr));
    out
}

fn bundle(model: &Path, output: &Path, args: &[&str]) -> Option<Output> {
    let runtime = runtime_dir()?;
    let mut command = program();
    command.arg("bundle").arg(model).arg("-o").arg(output).arg("--runtime").arg(runtime).args(args);
    Some(command.output().unwrap())
}

/// Names of the files below `dir`, with `/`, in order.
fn below(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        match path.is_dir() {
            true => names.extend(below(&path).iter().map(|inner| format!("{name}/{inner}"))),
            false => names.push(name),
        }
    }
    names.sort();
    names
}

#[cfg(unix)]
fn mode(path: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().unwrap().permissions().mode() & 0o777
}

/// A name that scripts have to quote.
const NAME: &str = "it's a $MODEL (1)";

#[cfg(unix)]
#[test]
fn a_folder_and_a_zip_file_hold_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), &format!("{NAME}.gguf"), &[]);
    let folder = dir.path().join("folder");
    let Some(done) = bundle(&model, &folder, &[]) else { return };
    assert!(done.status.success(), "{}", text(&done.stderr));
    let names = below(&folder);
    let wanted = [
        "LICENSE.txt".to_string(),
        "README.txt".into(),
        "mbq-convert".into(),
        "start.sh".into(),
        format!("{NAME}.desktop"),
        format!("model/{NAME}.gguf"),
        format!("model/mmproj-{NAME}-f16.gguf"),
        format!("model/{NAME}.mbq.json"),
        "runtime/llama-mtmd-cli".into(),
        format!("runtime/{}", mbq_convert::runtime::library_file("mtmd")),
    ];
    for name in &wanted {
        assert!(names.contains(name), "{name}: {names:?}");
    }
    for name in ["mbq-convert", "start.sh", "runtime/llama-mtmd-cli"] {
        assert_eq!(mode(&folder.join(name)), 0o755, "{name}");
    }
    assert_eq!((mode(&folder), mode(&folder.join("README.txt"))), (0o755, 0o644));
    assert_eq!(std::fs::read(folder.join(&wanted[5])).unwrap(), std::fs::read(&model).unwrap());

    let zip = dir.path().join("carry.zip");
    let done = bundle(&model, &zip, &[]).unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert_eq!(mode(&zip), 0o644);
    let mut archive = zip::ZipArchive::new(std::fs::File::open(&zip).unwrap()).unwrap();
    let mut inside = Vec::new();
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i).unwrap();
        let name = entry.name().unwrap().strip_prefix("carry/").expect("one folder").to_owned();
        let stored = entry.compression() == zip::CompressionMethod::Stored;
        assert_eq!(stored, name.ends_with(".gguf"), "{name}");
        assert_eq!(entry.unix_mode().unwrap() & 0o777, mode(&folder.join(&name)), "{name}");
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        assert!(bytes == std::fs::read(folder.join(&name)).unwrap(), "{name}");
        inside.push(name);
    }
    inside.sort();
    assert_eq!(inside, names);
    // The same files make the same bytes, and nothing half-written is left.
    let again = dir.path().join("again");
    std::fs::create_dir(&again).unwrap();
    bundle(&model, &again.join("carry.zip"), &[]).unwrap();
    assert!(std::fs::read(&zip).unwrap() == std::fs::read(again.join("carry.zip")).unwrap());
    assert_eq!((listing(&again).len(), listing(dir.path()).len()), (1, 5));
}

/// What start.sh runs, by a program that prints its arguments in the place of the real one.
#[cfg(target_os = "linux")]
#[test]
fn the_script_starts_the_program_with_the_pair() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), &format!("{NAME}.gguf"), &[]);
    let folder = dir.path().join("first place");
    let Some(done) = bundle(&model, &folder, &[]) else { return };
    assert!(done.status.success(), "{}", text(&done.stderr));
    // It may be moved.
    let moved = dir.path().join("other 'place'");
    std::fs::rename(&folder, &moved).unwrap();
    let stub = |name: &str, needs: &str| {
        let text = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && {{ {needs}; exit; }}\nprintf '%s\\n' \"$@\" \"lib=$LD_LIBRARY_PATH\"\n"
        );
        std::fs::write(moved.join(name), text).unwrap();
    };
    let (tool, carried) = ("runtime/llama-mtmd-cli", "[ -n \"$LD_LIBRARY_PATH\" ]");
    stub(tool, "true");
    let run = |command: &mut Command| {
        let done = command.env_remove("LD_LIBRARY_PATH").current_dir("/").output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
        text(&done.stdout).lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let inside = |name: &str| moved.join(name).to_str().unwrap().to_owned();
    let arguments = |libraries: &str| {
        let (model, mmproj) = (inside(&format!("model/{NAME}.gguf")), inside(&format!("model/mmproj-{NAME}-f16.gguf")));
        let mut all = ["serve", &model, "--mmproj", &mmproj, "--runtime", &inside("runtime"), "--port", "9 9"]
            .map(String::from)
            .to_vec();
        all.push(format!("lib={libraries}"));
        all
    };
    stub("mbq-convert", "true");
    let mut start = Command::new(moved.join("start.sh"));
    start.args(["--port", "9 9"]);
    assert_eq!(run(&mut start), arguments(""));
    // Where the system's C++ library is too old for llama.cpp, or there is none, the one in the bundle is used.
    for (program, runtime) in [("true", carried), (carried, "true")] {
        stub("mbq-convert", program);
        stub(tool, runtime);
        assert_eq!(run(&mut start), arguments(&inside("lib")));
    }
    assert!(moved.join("lib/libstdc++.so.6").is_file());
    // By links from elsewhere, one to the other.
    let links = dir.path().join("links");
    std::fs::create_dir(&links).unwrap();
    std::os::unix::fs::symlink(moved.join("start.sh"), links.join("first")).unwrap();
    std::os::unix::fs::symlink("links/first", dir.path().join("-second")).unwrap();
    assert_eq!(run(Command::new(dir.path().join("-second")).args(["--port", "9 9"])), arguments(&inside("lib")));
    // Permissions that copying lost come back.
    std::fs::set_permissions(moved.join("mbq-convert"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut sh = Command::new("sh");
    sh.arg(moved.join("start.sh")).args(["--port", "9 9"]);
    assert_eq!(run(&mut sh), arguments(&inside("lib")));
}

/// A file that may not grow as far as it must, as on a full disk: one message, and nothing is left.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "out.gguf", &[]);
    let Some(runtime) = runtime_dir() else { return };
    let before = listing(dir.path());
    for (name, blocks) in [("carry.zip", 4096), ("carry.zip", 8192), ("folder", 4096)] {
        let limited = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &limited, "sh"]).arg(program().get_program()).arg("bundle").arg(&model);
        let done = command.arg("-o").arg(dir.path().join(name)).arg("--runtime").arg(&runtime).output().unwrap();
        let said = text(&done.stderr);
        assert_eq!((done.status.code(), said.lines().count()), (Some(1), 1), "{said}");
        assert!(said.starts_with("error: ") && said.contains("cannot write") && said.contains(name), "{said}");
        assert_eq!(listing(dir.path()), before);
    }
}

#[test]
fn what_is_told_is_true() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "out.gguf", &[]);
    let folder = dir.path().join("folder");
    let Some(done) = bundle(&model, &folder, &[]) else { return };
    let readme = std::fs::read_to_string(folder.join("README.txt")).unwrap();
    let portable = below(&folder).iter().any(|name| name.contains("ggml-cpu-"));
    assert_eq!(readme.contains("is not portable"), !portable, "{readme}");
    assert_eq!(text(&done.stderr).contains("MBQ_PORTABLE=1"), !portable);
    assert!(readme.contains("names no licence") && text(&done.stderr).contains("names no licence"), "{readme}");
    assert!(readme.lines().all(|line| line.chars().count() <= 90), "{readme}");
    for name in below(&folder) {
        assert!(
            name == "README.txt" || name == "LICENSE.txt" || readme.contains(&format!("MB  {name}")),
            "{name}: {readme}"
        );
    }
    // A licence that the model names is told.
    std::fs::write(dir.path().join("tiny-model/README.md"), "---\nlicense: apache-2.0\n---\n").unwrap();
    let licensed = dir.path().join("out/licensed.gguf");
    assert!(convert(&dir.path().join("tiny-model"), &licensed, &[]).status.success());
    let done = bundle(&licensed, &dir.path().join("licensed"), &["-q"]).unwrap();
    assert_eq!(text(&done.stderr), "");
    assert!(std::fs::read_to_string(dir.path().join("licensed/README.txt")).unwrap().contains("apache-2.0."));
}

#[test]
fn shards_are_carried_and_missed() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "out.gguf", &["--split-max-size", "200K"]);
    let shards: Vec<String> =
        listing(model.parent().unwrap()).into_iter().filter(|name| name.contains("-of-")).collect();
    let first = model.with_file_name(&shards[0]);
    let folder = dir.path().join("folder");
    let Some(done) = bundle(&first, &folder, &[]) else { return };
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(shards.len() > 2);
    for name in &shards {
        assert!(folder.join("model").join(name).is_file(), "{name}");
    }
    std::fs::remove_file(model.with_file_name(&shards[1])).unwrap();
    refused(&first, &dir.path().join("other"), &[], &[&shards[1], "is missing"]);
}

/// The bundle is refused with these words, and nothing is left of it.
fn refused(model: &Path, output: &Path, args: &[&str], words: &[&str]) {
    let before = listing(output.parent().unwrap());
    let done = bundle(model, output, args).unwrap();
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    words.iter().for_each(|word| assert!(said.contains(word), "{word}: {said}"));
    assert_eq!(listing(output.parent().unwrap()), before);
}

#[test]
fn what_does_not_belong_together_is_refused() {
    if runtime_dir().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "out.gguf", &[]);
    let mmproj = model.with_file_name("mmproj-out-f16.gguf");
    let (output, zip) = (dir.path().join("folder"), dir.path().join("carry.zip"));
    // Another checkpoint's vision file.
    let other = dir.path().join("elsewhere");
    std::fs::create_dir(&other).unwrap();
    let checkpoint = checkpoint(&other, Naming::Published, 1);
    let done = convert(&checkpoint, &other.join("other.gguf"), &["--rotate", "on"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let stranger = other.join("mmproj-other-f16.gguf");
    for output in [&output, &zip] {
        refused(&model, output, &["--mmproj", stranger.to_str().unwrap()], &["does not belong to"]);
    }
    refused(&mmproj, &output, &["--mmproj", mmproj.to_str().unwrap()], &["is a vision file"]);
    refused(&model, &output, &["--mmproj", model.to_str().unwrap()], &["is no vision file"]);
    refused(&model.with_file_name("none.gguf"), &output, &[], &["none.gguf"]);
    // What is there stays there.
    std::fs::create_dir(&output).unwrap();
    std::fs::write(&zip, "mine").unwrap();
    for output in [&output, &zip] {
        refused(&model, output, &[], &["exists"]);
    }
    assert_eq!(std::fs::read(&zip).unwrap(), b"mine");
}
