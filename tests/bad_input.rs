//! What goes wrong is said, by file and field, with a non-zero status, and leaves no output.
mod tiny;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tiny::{Naming, checkpoint, checkpoint_with, convert, listing, program, tensors, text};

/// A checkpoint that `damage` has been done to must be refused with a message that holds all of `words`.
fn refused(damage: impl Fn(&Path), words: &[&str]) {
    refused_in(1, damage, words);
}

fn refused_in(shards: usize, damage: impl Fn(&Path), words: &[&str]) {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, shards);
    damage(&model);
    let out = parent.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let done = convert(&model, &out.join("o.gguf"), &["--type", "q4_0"]);
    let message = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{words:?}: {message}");
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert_eq!(listing(&out), [""; 0], "{message}");
}

/// Changes one JSON file.
fn edit(file: &str, change: impl Fn(&mut Value)) -> impl Fn(&Path) {
    move |dir| {
        let path = dir.join(file);
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        std::fs::write(path, json.to_string()).unwrap();
    }
}

fn remove(file: &str) -> impl Fn(&Path) {
    move |dir| std::fs::remove_file(dir.join(file)).unwrap()
}

fn overwrite(file: &str, bytes: Vec<u8>) -> impl Fn(&Path) {
    move |dir| std::fs::write(dir.join(file), &bytes).unwrap()
}

#[test]
fn safetensors_files() {
    let file = "model.safetensors";
    refused(remove(file), &["no weights", file]);
    refused(overwrite(file, Vec::new()), &[file]);
    refused(overwrite(file, vec![1, 2, 3]), &[file, "truncated"]);
    // A header that claims to be longer than the file, and one beyond any limit.
    refused(overwrite(file, [1000u64.to_le_bytes().as_slice(), b"{}"].concat()), &[file]);
    refused(overwrite(file, [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat()), &[file]);
    refused(overwrite(file, [2u64.to_le_bytes().as_slice(), b"{{"].concat()), &[file]);
    // The data cut short.
    refused(
        |dir| {
            let bytes = std::fs::read(dir.join(file)).unwrap();
            std::fs::write(dir.join(file), &bytes[..bytes.len() - 1000]).unwrap();
        },
        &[file, "truncated"],
    );
}

#[test]
fn shards_and_index() {
    let (index, second) = ("model.safetensors.index.json", "model-00002-of-00003.safetensors");
    refused_in(3, remove(second), &[index, second, "not there"]);
    refused_in(3, overwrite(index, b"{".to_vec()), &[index, "JSON"]);
    refused_in(3, edit(index, |j| drop(j.as_object_mut().unwrap().remove("weight_map"))), &[index, "weight_map"]);
    let absent = |j: &mut Value| j["weight_map"]["no.such.tensor"] = "model-00001-of-00003.safetensors".into();
    refused_in(3, edit(index, absent), &["no.such.tensor", "model-00001-of-00003.safetensors"]);
    let outside = |j: &mut Value| j["weight_map"]["image_newline"] = "../../etc/passwd".into();
    refused_in(3, edit(index, outside), &[index, "image_newline"]);
}

#[test]
fn tensors_of_the_wrong_kind() {
    let file = "model.safetensors";
    let name = "language_model.model.layers.1.mlp.up_proj.weight";
    // The header is rewritten in place, padded to its old length.
    let header = |change: &dyn Fn(&mut Value)| {
        let parent = tempfile::tempdir().unwrap();
        let model = checkpoint(parent.path(), Naming::Published, 1);
        let bytes = std::fs::read(model.join(file)).unwrap();
        let size = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut json: Value = serde_json::from_slice(&bytes[8..8 + size]).unwrap();
        change(&mut json);
        let mut new = json.to_string().into_bytes();
        new.resize(new.len().next_multiple_of(8), b' ');
        [(new.len() as u64).to_le_bytes().as_slice(), &new, &bytes[8 + size..]].concat()
    };
    refused(overwrite(file, header(&|j| j[name]["dtype"] = "I16".into())), &[file, name, "I16"]);
    refused(overwrite(file, header(&|j| j[name]["shape"] = [256, 512].into())), &[file, name, "[256, 512]"]);
    refused(overwrite(file, header(&|j| drop(j.as_object_mut().unwrap().remove("image_newline")))), &[file]);
}

#[test]
fn missing_tensors_and_bad_values() {
    for name in
        ["image_newline", "language_model.lm_head.weight", "language_model.model.layers.2.self_attn.k_proj.bias"]
    {
        let parent = tempfile::tempdir().unwrap();
        let mut all = tensors();
        all.remove(name);
        let model = checkpoint_with(parent.path(), Naming::Published, 1, all);
        let done = convert(&model, &parent.path().join("o.gguf"), &["--type", "f16"]);
        assert_eq!(done.status.code(), Some(1));
        assert!(text(&done.stderr).contains(name), "{}", text(&done.stderr));
        assert_eq!(listing(parent.path()), ["tiny-model"]);
    }
    let parent = tempfile::tempdir().unwrap();
    for (value, ty, words) in
        [(f32::NAN, "q4_k", ["image_newline", "NaN"]), (f32::INFINITY, "f32", ["image_newline", "inf"])]
    {
        let mut all = tensors();
        all.get_mut("image_newline").unwrap().1[7] = value;
        let model = checkpoint_with(parent.path(), Naming::Published, 1, all);
        let done = convert(&model, &parent.path().join("o.gguf"), &["--type", ty]);
        assert_eq!(done.status.code(), Some(1));
        words.iter().for_each(|word| assert!(text(&done.stderr).contains(word), "{}", text(&done.stderr)));
        assert_eq!(listing(parent.path()), ["tiny-model"], "found in the second file: the first must not stay");
    }
    // 1e6 is beyond f16's largest number.
    let mut all = tensors();
    let name = "language_model.model.layers.0.mlp.up_proj.weight";
    all.get_mut(name).unwrap().1[0] = 1e6;
    let model = checkpoint_with(parent.path(), Naming::Published, 1, all);
    let done = convert(&model, &parent.path().join("o.gguf"), &["--type", "f16"]);
    assert!(text(&done.stderr).contains(name) && text(&done.stderr).contains("bf16"), "{}", text(&done.stderr));
}

#[test]
fn configuration() {
    let file = "config.json";
    refused(remove(file), &[file]);
    refused(overwrite(file, b"not json".to_vec()), &[file, "JSON"]);
    refused(
        edit(file, |j| drop(j["text_config"].as_object_mut().unwrap().remove("hidden_size"))),
        &[file, "text_config.hidden_size", "missing"],
    );
    refused(edit(file, |j| drop(j.as_object_mut().unwrap().remove("vision_config"))), &[file, "vision_config"]);
    refused(
        edit(file, |j| j["text_config"]["num_hidden_layers"] = "three".into()),
        &[file, "text_config.num_hidden_layers", "three"],
    );
    refused(edit(file, |j| j["model_type"] = "video_llama".into()), &[file, "video_llama", "llava_onevision"]);
    let original = edit(file, |j| j["mm_vision_tower"] = "openai/clip-vit-large-patch14-336".into());
    refused(original, &[file, "mm_vision_tower", "`architectures`", "LlavaQwenForCausalLM"]);
    refused(edit(file, |j| j["text_config"]["model_type"] = "mamba".into()), &[file, "mamba", "qwen2"]);
    refused(edit(file, |j| j["vision_config"]["model_type"] = "dinov2".into()), &[file, "dinov2", "siglip"]);
    refused(remove("preprocessor_config.json"), &["preprocessor_config.json"]);
    refused(
        edit("preprocessor_config.json", |j| drop(j.as_object_mut().unwrap().remove("image_mean"))),
        &["preprocessor_config.json", "image_mean"],
    );
}

/// Numbers that the model could be calculated with, to no use.
#[test]
fn numbers_out_of_range() {
    let (file, processor) = ("config.json", "preprocessor_config.json");
    for (key, value) in [("rms_norm_eps", -1e-5), ("rms_norm_eps", 0.0), ("rope_theta", 0.0), ("rope_theta", 1e39)] {
        let key_path = format!("text_config.{key}");
        refused(edit(file, |j| j["text_config"][key] = value.into()), &[file, &key_path, "positive"]);
    }
    for (key, value) in [("image_std", -0.5), ("image_std", 0.0), ("image_std", 1e308), ("image_mean", 9e18)] {
        refused(edit(processor, |j| j[key][2] = value.into()), &[processor, key]);
    }
    let third = |j: &mut Value| j["image_grid_pinpoints"][1] = serde_json::json!([28, 56, 28]);
    refused(edit(processor, third), &[processor, "image_grid_pinpoints"]);
}

/// Library errors hold their cause's text, and the program prints causes: once is enough.
#[test]
fn a_cause_is_named_once() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    overwrite("config.json", b"{".to_vec())(&model);
    let message = text(&convert(&model, &parent.path().join("o.gguf"), &[]).stderr);
    assert_eq!(message.matches("EOF while parsing").count(), 1, "{message}");
}

#[test]
fn tokenizer() {
    let file = "tokenizer.json";
    refused(remove(file), &[file]);
    refused(overwrite(file, b"{\"model\": ".to_vec()), &[file, "JSON"]);
    refused(edit(file, |j| j["model"]["type"] = "Unigram".into()), &[file, "model.type", "Unigram"]);
    refused(edit(file, |j| drop(j["model"].as_object_mut().unwrap().remove("vocab"))), &[file, "model.vocab"]);
    refused(edit(file, |j| j["model"]["merges"][2] = "one".into()), &[file, "model.merges[2]"]);
    refused(edit(file, |j| j["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"})), &[file, "pre_tokenizer"]);
    refused(edit(file, |j| j["normalizer"] = serde_json::json!({"type": "Lowercase"})), &[file, "normalizer"]);
    refused(overwrite(file, b"\"x\"".to_vec()), &[file, "no JSON object"]);
    refused(edit(file, |j| j["added_tokens"] = "x".into()), &[file, "added_tokens"]);
    refused(edit(file, |j| j["added_tokens"][1]["rstrip"] = true.into()), &[file, "added_tokens[1].rstrip"]);
    refused(edit(file, |j| j["model"]["vocab"]["unmergeable297"] = 298.into()), &[file, "<|im_start|>", "id 298"]);
    let frame = serde_json::json!({"type": "TemplateProcessing", "special_tokens": {}, "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "<S>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
    refused(edit(file, |j| j["post_processor"] = frame.clone()), &[file, "post_processor", "<S>"]);
    let config = "tokenizer_config.json";
    refused(edit(config, |j| j["eos_token"] = true.into()), &[config, "eos_token"]);
    refused(edit(config, |j| j["pad_token"] = serde_json::json!({"type": "x"})), &[config, "pad_token"]);
    let decoder = |entry: Value| edit(config, move |j| j["added_tokens_decoder"] = serde_json::json!({"300": entry}));
    refused(decoder(true.into()), &[config, "added_tokens_decoder.300"]);
    refused(decoder(serde_json::json!({"content": null})), &[config, "added_tokens_decoder.300"]);
    refused(decoder(serde_json::json!({"content": ""})), &[config, "added_tokens_decoder.300"]);
    refused(decoder(serde_json::json!({"content": "<a>", "lstrip": 2})), &[config, "added_tokens_decoder.300.lstrip"]);
    refused(
        decoder(serde_json::json!({"content": "<a>", "special": null})),
        &[config, "added_tokens_decoder.300.special"],
    );
    // More tokens than the embedding has rows.
    refused(edit(file, |j| j["added_tokens"][0]["id"] = 320.into()), &[file, "added_tokens", "320 rows"]);
}

#[test]
fn arguments() {
    let done = program().args(["/no/such/dir", "-o", "o.gguf"]).output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("/no/such/dir"));
    let done = program().args(["x", "--type", "q9"]).output().unwrap();
    assert_eq!(done.status.code(), Some(2));
    assert!(text(&done.stderr).contains("iq3_xxs"), "the types are listed: {}", text(&done.stderr));
    let done = program().args(["x", "--mmproj-type", "q4_k"]).output().unwrap();
    assert_eq!(done.status.code(), Some(2));
}

#[test]
fn outputs_that_cannot_be_written() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    // The directory is a file: nobody can write there, root included.
    let file = parent.path().join("file");
    std::fs::write(&file, "").unwrap();
    for out in [file.join("o.gguf"), parent.path().join("no/such/o.gguf"), parent.path().to_path_buf()] {
        let done = convert(&model, &out, &["--type", "q4_0"]);
        assert_eq!(done.status.code(), Some(1));
        assert!(text(&done.stderr).contains(&out.display().to_string()), "{}", text(&done.stderr));
        // With calibration it is found before that begins (this model has no chat template, of which calibration
        // would complain first).
        let calibrated = program().arg(&model).arg("-o").arg(&out).output().unwrap();
        assert_eq!(calibrated.status.code(), Some(1));
        assert!(text(&calibrated.stderr).contains(&out.display().to_string()), "{}", text(&calibrated.stderr));
    }
    // The second file's place is taken by a directory: the first must not appear.
    std::fs::create_dir(parent.path().join("mmproj-o-f16.gguf")).unwrap();
    let done = convert(&model, &parent.path().join("o.gguf"), &["--type", "q4_0"]);
    assert_eq!(done.status.code(), Some(1));
    assert_eq!(listing(parent.path()), ["file", "mmproj-o-f16.gguf", "tiny-model"]);
}

/// A file system of 1 MB, unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path) -> Option<Self> {
        let mut mount = std::process::Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(at).stderr(Stdio::null());
        mount.status().is_ok_and(|s| s.success()).then(|| Small(at.into()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn full_disk() {
    let parent = tempfile::tempdir().unwrap();
    let model = checkpoint(parent.path(), Naming::Published, 1);
    let small = parent.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let Some(_mounted) = Small::mount(&small) else {
        return eprintln!("skipped: mounting a tmpfs needs root");
    };
    let done = convert(&model, &small.join("o.gguf"), &["--type", "f32"]);
    assert_eq!(done.status.code(), Some(1));
    let message = text(&done.stderr);
    assert!(message.contains("o.gguf") && message.contains("space"), "{message}");
    assert_eq!(listing(&small), [""; 0]);
}

/// A checkpoint of zeros, sparse on disk, of `blocks` decoder blocks whose gate, up and down are `width` x 2048.
/// Returns its directory and the values of its largest tensor.
fn large(parent: &Path, blocks: usize, width: usize) -> (PathBuf, usize) {
    let hidden = 2048;
    let mut config = tiny::config();
    config["tie_word_embeddings"] = true.into();
    let text = &mut config["text_config"];
    text["hidden_size"] = hidden.into();
    text["intermediate_size"] = width.into();
    text["num_hidden_layers"] = blocks.into();
    let mut header = serde_json::Map::new();
    let mut at = 0;
    let mut add = |name: String, shape: &[usize]| {
        let size = 2 * shape.iter().product::<usize>();
        header.insert(name, serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}));
        at += size;
    };
    for (name, (shape, _)) in tensors() {
        let width_of = |d: &usize| if *d == tiny::HIDDEN { hidden } else { *d };
        if !name.contains(".layers.") || name.starts_with("vision") {
            // 64 is the tower's width and stays; 256 is the text model's.
            add(name, &shape.iter().map(width_of).collect::<Vec<_>>());
        }
    }
    for i in 0..blocks {
        let layer = |part: &str| format!("language_model.model.layers.{i}.{part}");
        add(layer("input_layernorm.weight"), &[hidden]);
        add(layer("post_attention_layernorm.weight"), &[hidden]);
        for (part, rows) in [("q", hidden), ("k", hidden / 2), ("v", hidden / 2)] {
            add(layer(&format!("self_attn.{part}_proj.weight")), &[rows, hidden]);
            add(layer(&format!("self_attn.{part}_proj.bias")), &[rows]);
        }
        add(layer("self_attn.o_proj.weight"), &[hidden, hidden]);
        add(layer("mlp.gate_proj.weight"), &[width, hidden]);
        add(layer("mlp.up_proj.weight"), &[width, hidden]);
        add(layer("mlp.down_proj.weight"), &[hidden, width]);
    }
    let dir = parent.join("large");
    std::fs::create_dir(&dir).unwrap();
    tiny::write_configuration(&dir);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut bytes = Value::Object(header).to_string().into_bytes();
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    let path = dir.join("model.safetensors");
    std::fs::write(&path, [(bytes.len() as u64).to_le_bytes().to_vec(), bytes.clone()].concat()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((8 + bytes.len() + at) as u64).unwrap();
    (dir, width * hidden)
}

#[test]
#[cfg(target_os = "linux")]
fn an_interrupted_run_leaves_nothing() {
    for signal in ["-INT", "-TERM", "-KILL"] {
        let parent = tempfile::tempdir().unwrap();
        let (model, _) = large(parent.path(), 4, 8192);
        let out = parent.path().join("out");
        std::fs::create_dir(&out).unwrap();
        // A script that runs the tests in the background ignores SIGINT, and so would all that it starts.
        let mut child = std::process::Command::new("env")
            .args(["--default-signal=INT", env!("CARGO_BIN_EXE_mbq-convert")])
            .arg(&model)
            .arg("-o")
            .arg(out.join("o.gguf"))
            .args(["--type", "q8_0", "--method", "rtn", "--quiet"])
            .env("RAYON_NUM_THREADS", "1")
            .spawn()
            .unwrap();
        // Until it writes: it then has files open in the output directory.
        let fds = format!("/proc/{}/fd", child.id());
        let writing = || {
            let open = std::fs::read_dir(&fds).into_iter().flatten().flatten();
            open.filter_map(|fd| std::fs::read_link(fd.path()).ok()).any(|f| f.starts_with(&out))
        };
        let start = Instant::now();
        while !writing() && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(child.try_wait().unwrap().is_none(), "it was to be interrupted while it runs");
        let kill = std::process::Command::new("kill").arg(signal).arg(child.id().to_string()).status().unwrap();
        assert!(kill.success());
        assert!(!child.wait().unwrap().success());
        assert_eq!(listing(&out), [""; 0], "after {signal}");
    }
}

/// Twice the largest tensor in f32 and 200 MB are allowed; the whole model would be three times that.
#[test]
#[cfg(target_os = "linux")]
fn memory_does_not_grow_with_the_model() {
    let parent = tempfile::tempdir().unwrap();
    let (model, largest) = large(parent.path(), 8, 4096);
    let file = std::fs::metadata(model.join("model.safetensors")).unwrap().len();
    let allowed = 2 * 4 * largest as u64 + 200_000_000;
    assert!(file > 2 * allowed, "the model ({file}) is to be much larger than what is allowed ({allowed})");
    let mut child = program()
        .arg(&model)
        .arg("-o")
        .arg(parent.path().join("o.gguf"))
        .args(["--type", "q4_0", "--method", "rtn", "--quiet"])
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0 kB");
        peak = peak.max(line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(child.wait().unwrap().success());
    eprintln!("peak {} MB, allowed {} MB, model {} MB", peak / 1_000_000, allowed / 1_000_000, file / 1_000_000);
    assert!(peak > 0 && peak < allowed, "{peak} of {allowed} bytes");
}
