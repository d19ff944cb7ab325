//! Language model and mmproj carry an id of the pair: one for all quantisations of a model, another once it is rotated.
mod common;
mod tiny;

use common::{root, runtime_dir};
use mbq_convert::gguf::{GgufFile, Header, ROTATION_KEY, pair_of};
use std::path::{Path, PathBuf};
use std::process::Output;
use tiny::{Naming, checkpoint, checkpoint_with, program, tensors, text};

/// Converts into `parent/NAME` and returns both files.
fn convert(model: &Path, parent: &Path, name: &str, args: &[&str]) -> [PathBuf; 2] {
    let dir = parent.join(name);
    std::fs::create_dir(&dir).unwrap();
    let done = tiny::convert(model, &dir.join("out.gguf"), args);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let mmproj = tiny::listing(&dir).into_iter().find(|f| f.starts_with("mmproj-")).unwrap();
    [dir.join("out.gguf"), dir.join(mmproj)]
}

fn id(files: &[PathBuf; 2]) -> String {
    let [model, mmproj] = files.each_ref().map(|f| pair_of(f).unwrap());
    assert_eq!(model, mmproj);
    assert_eq!(model.len(), 32);
    model
}

#[test]
fn one_id_for_all_files_of_a_model() {
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        dir.path().join(name)
    };
    let model = checkpoint(&folder("a"), Naming::Published, 1);
    let plain = convert(&model, dir.path(), "f16", &["--type", "f16"]);
    let want = id(&plain);
    let quantised = convert(&model, dir.path(), "mbq3", &["--mmproj-type", "q8_0"]);
    assert_eq!(id(&quantised), want);
    // Other names and files of the same weights; another decoder behind the same tower and projector.
    let nested = checkpoint(&folder("b"), Naming::Nested, 3);
    assert_eq!(id(&convert(&nested, dir.path(), "nested", &[])), want);
    let tuned = |folder: &Path, name: &str| {
        let mut tensors = tensors();
        *tensors.get_mut(name).unwrap().1.last_mut().unwrap() += 0.5;
        checkpoint_with(folder, Naming::Published, 1, tensors)
    };
    let decoder = tuned(&folder("c"), "language_model.model.layers.0.mlp.up_proj.weight");
    assert_eq!(id(&convert(&decoder, dir.path(), "decoder", &[])), want);
    for (i, name) in ["multi_modal_projector.linear_2.weight", "image_newline"].into_iter().enumerate() {
        let projector = tuned(&folder(&format!("d{i}")), name);
        assert_ne!(id(&convert(&projector, dir.path(), &format!("projector{i}"), &[])), want, "{name}");
    }
    // All files of a rotated model share another one.
    let rotated = convert(&model, dir.path(), "rotated", &["--rotate", "on"]);
    assert_ne!(id(&rotated), want);
    assert_eq!(id(&convert(&model, dir.path(), "rotated-f16", &["--rotate", "on", "--type", "f16"])), id(&rotated));

    let shown = program().arg("inspect").arg(&plain[1]).output().unwrap();
    assert!(text(&shown.stdout).contains(&format!("mbq.pair = \"{want}\"")), "{}", text(&shown.stdout));
    let record = std::fs::read(dir.path().join("f16/out.mbq.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    assert_eq!(record["summary"]["pair"], want);
}

/// What `chat` says. The runtime is an empty folder: it gets no further than the files.
fn chat(parent: &Path, model: &Path, more: &[&str]) -> String {
    let empty = parent.join("empty");
    std::fs::create_dir_all(&empty).unwrap();
    let mut command = program();
    command.arg("chat").arg(model).args(["-p", "?", "--runtime"]).arg(empty).args(more);
    // The checkpoints here have no template of their own.
    let done = command.args(["--", "--chat-template", "chatml"]).output().unwrap();
    assert!(!done.status.success());
    text(&done.stderr)
}

#[test]
fn chat_refuses_a_template_without_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), Naming::Published, 1);
    let endless = "{% macro m(x, n) %}{% if n %}{{ m(x ~ x, n - 1) }}{% endif %}{% endmacro %}{{ m('a', 60) }}";
    std::fs::write(model.join("chat_template.jinja"), endless).unwrap();
    let [path, _] = convert(&model, dir.path(), "endless", &[]);
    assert!(chat(dir.path(), &path, &[]).contains("is not in it"), "--chat-template names another");
    let done = program().arg("chat").arg(&path).args(["-p", "?", "--runtime"]).arg(dir.path()).output().unwrap();
    let said = text(&done.stderr);
    assert!(said.contains(path.to_str().unwrap()) && said.contains("256 MiB of memory"), "{said}");
}

#[test]
fn chat_refuses_a_wrong_pair_of_ours() {
    let dir = tempfile::tempdir().unwrap();
    let model = checkpoint(dir.path(), Naming::Published, 1);
    let [plain, plain_mmproj] = convert(&model, dir.path(), "plain", &[]);
    let [turned, turned_mmproj] = convert(&model, dir.path(), "turned", &["--rotate", "on"]);
    let [plain_path, turned_path] = [&plain_mmproj, &turned_mmproj].map(|p| p.to_str().unwrap());
    let reached = "is not in it";
    assert!(chat(dir.path(), &plain, &[]).contains(reached));
    assert!(chat(dir.path(), &turned, &["--mmproj", turned_path]).contains(reached));
    let refused = chat(dir.path(), &turned, &["--mmproj", plain_path]);
    let both = refused.contains(plain_path) && refused.contains(turned.to_str().unwrap());
    assert!(both && refused.contains("does not belong to"), "{refused}");
    // Of two files in one folder the model's own is found.
    std::fs::copy(&turned_mmproj, dir.path().join("plain/mmproj-rotated-f16.gguf")).unwrap();
    std::fs::copy(&plain, dir.path().join("plain/another.gguf")).unwrap();
    assert!(chat(dir.path(), &dir.path().join("plain/another.gguf"), &[]).contains(reached));
    // A vision file of another program has no id.
    let theirs = dir.path().join("theirs.gguf");
    let mut header = mbq_convert::gguf::Header::default();
    header.metadata.set("general.architecture", "clip");
    std::fs::write(&theirs, header.encode()).unwrap();
    assert!(chat(dir.path(), &plain, &["--mmproj", theirs.to_str().unwrap()]).contains(reached));
    // But it is not rotated.
    assert!(chat(dir.path(), &turned, &["--mmproj", theirs.to_str().unwrap()]).contains("does not belong to"));
}

fn eval(model: &Path, candidate: &Path, mmproj: &[&Path], more: &[&str]) -> Output {
    let mut command = program();
    command.arg("eval").arg(candidate).arg("--reference").arg(model);
    command.arg("--data").arg(root().join("demo/eval/questions.jsonl")).args([
        "--limit",
        "4",
        "--threads",
        "1",
        "--quiet",
    ]);
    for path in mmproj {
        command.arg("--mmproj").arg(path);
    }
    command.args(more).output().unwrap()
}

/// The rotated demo answers as the demo does, each with its own mmproj; with the plain one it is refused.
#[test]
fn eval_gives_a_rotated_model_its_own_pictures() {
    let Some(_) = runtime_dir() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = root().join("demo/model");
    let [plain, plain_mmproj] = convert(&model, dir.path(), "plain", &["--type", "f16"]);
    let [turned, turned_mmproj] = convert(&model, dir.path(), "turned", &["--type", "f16", "--rotate", "on"]);
    let cache = dir.path().join("cache");
    let more = ["--json", "-", "--cache", cache.to_str().unwrap()];
    let run = |mmproj: &[&Path]| {
        let done = eval(&plain, &turned, mmproj, &more);
        assert!(done.status.success(), "{}", text(&done.stderr));
        serde_json::from_slice::<serde_json::Value>(&done.stdout).unwrap()
    };
    // Found beside the candidate.
    let report = run(&[&plain_mmproj]);
    let divergence = report["candidates"][0]["picture"]["greedy"]["kl_mean"]["value"].as_f64().unwrap();
    // Weights rounded to f16 in another basis: 1e-9 was seen, and 4.9 with the plain mmproj.
    assert!(divergence < 1e-3, "{divergence}");
    assert!(report["candidates"][0]["mmproj"]["name"] == "mmproj-out-f16.gguf", "{report}");
    assert_eq!(run(&[&plain_mmproj, &turned_mmproj])["candidates"][0]["picture"], report["candidates"][0]["picture"]);
    std::fs::rename(&turned_mmproj, dir.path().join("elsewhere.gguf")).unwrap();
    let refused = eval(&plain, &turned, &[&plain_mmproj], &more);
    let message = text(&refused.stderr);
    let both = message.contains(plain_mmproj.to_str().unwrap()) && message.contains(turned.to_str().unwrap());
    assert!(!refused.status.success() && both, "{message}");
}

/// Where the head is a tensor of its own the default rotates, and says so in both files; elsewhere, and where the model is
/// rotated already, it does not.
#[test]
fn models_with_a_head_are_rotated() {
    let Some(_) = runtime_dir() else { return };
    let dir = tempfile::tempdir().unwrap();
    let [tied, mmproj] = convert(&root().join("demo/model"), dir.path(), "f16", &["--type", "f16"]);
    let file = GgufFile::open(&tied).unwrap();
    let mut header = Header::new(file.metadata.clone());
    let embedding = file.tensor("token_embd.weight").unwrap();
    let list = || file.tensors.iter().map(|t| (t.name.as_str(), t)).chain([("output.weight", embedding)]);
    list().for_each(|(name, t)| header.add_tensor(name, t.ty().unwrap(), &t.shape).unwrap());
    let mut bytes = header.encode();
    for (_, t) in list() {
        bytes.extend(file.data(t));
        bytes.resize(bytes.len().next_multiple_of(header.alignment() as usize), 0);
    }
    let untied = dir.path().join("untied.gguf");
    std::fs::write(&untied, bytes).unwrap();
    let list = dir.path().join("pairs.jsonl");
    let line = "{\"question\": \"What is it?\", \"answer\": \"A red star.\"}\n";
    std::fs::write(&list, line.repeat(3)).unwrap();
    let rotation = |name: &str, model: &Path, more: &[&str]| {
        let out = dir.path().join(name).join("out.gguf");
        std::fs::create_dir(out.parent().unwrap()).unwrap();
        let mut command = program();
        command.arg(model).arg("-o").arg(&out).arg("--mmproj").arg(&mmproj).arg("--calib").arg(&list).args(more);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{name}: {}", text(&done.stderr));
        let files = [out.clone(), out.with_file_name("mmproj-out-f16.gguf")];
        let [model, mmproj] = files.each_ref().map(|f| GgufFile::open(f).unwrap().metadata.get(ROTATION_KEY).cloned());
        assert_eq!(model, mmproj, "{name}");
        (model.is_some(), text(&done.stderr))
    };
    assert!(rotation("auto", &untied, &[]).0);
    assert!(!rotation("off", &untied, &["--rotate", "off"]).0);
    assert!(!rotation("gptq", &untied, &["--method", "gptq"]).0, "a method to compare with is left as it is");
    assert!(!rotation("tied", &tied, &[]).0);
    assert!(rotation("bare", &tied, &["--rotate", "--quiet"]).0);
}
