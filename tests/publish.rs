//! `mbq-convert card`: what a card says, and what `--check` finds in a folder.
mod tiny;

use mbq_convert::front::FrontMatter;
use mbq_convert::gguf::GgufFile;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tiny::card::carded;
use tiny::{Naming, checkpoint, convert, listing, program, text};

const CARD: &str = "---\nlicense: other\nlicense_name: tiny-research\nlicense_link: LICENSE\nlanguage: [en, \"no\"]\n\
                    tags: [transformers, charts]\nbase_model: org/Parent-7B\n---\n# Tiny\n";

/// The model of the made-up checkpoint with a card, converted with `args` below the name that the convention wants.
fn model(parent: &Path, args: &[&str]) -> PathBuf {
    let model = checkpoint(parent, Naming::Published, 1);
    std::fs::write(model.join("README.md"), CARD).unwrap();
    let dir = parent.join("out");
    std::fs::create_dir_all(&dir).unwrap();
    let kind = args.iter().position(|a| *a == "--type").map_or("mbq3", |i| args[i + 1]).to_uppercase();
    let out = dir.join(format!("tiny-model-2.0M-{kind}.gguf"));
    let done = convert(&model, &out, args);
    assert!(done.status.success(), "{}", text(&done.stderr));
    out
}

/// The card of `models`, and what is said beside it.
fn card(models: &[&Path], args: &[&str]) -> Result<(String, String), String> {
    let done = program().arg("card").args(models).args(["-o", "-"]).args(args).output().unwrap();
    if done.status.success() { Ok((text(&done.stdout), text(&done.stderr))) } else { Err(text(&done.stderr)) }
}

fn check(dir: &Path) -> (bool, String) {
    let done = program().args(["card", "--check"]).arg(dir).output().unwrap();
    (done.status.success(), text(&done.stdout))
}

/// The check of `dir` fails and says these words.
fn fails(dir: &Path, words: &[&str]) {
    let (passed, said) = check(dir);
    assert!(!passed, "{said}");
    words.iter().for_each(|word| assert!(said.contains(word), "{word}: {said}"));
}

#[test]
fn a_card_says_what_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &[]);
    let args = ["--base-model", "org/tiny-model", "--quantized-by", "me: myself"];
    let (card_text, notes) = card(&[&out], &args).unwrap();
    let front = FrontMatter::parse(&card_text).unwrap().unwrap();
    let want: [(&str, &[&str]); 10] = [
        ("base_model", &["org/tiny-model"]),
        ("base_model_relation", &["quantized"]),
        ("license", &["other"]),
        ("license_name", &["tiny-research"]),
        ("license_link", &["https://huggingface.co/org/tiny-model/blob/main/LICENSE"]),
        ("pipeline_tag", &["image-text-to-text"]),
        ("library_name", &["gguf"]),
        ("language", &["en", "no"]),
        ("tags", &["gguf", "llama.cpp", "mbq-convert", "mbq3", "charts"]),
        ("quantized_by", &["me: myself"]),
    ];
    assert_eq!(front.0.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(), want.map(|(key, _)| key));
    want.iter().for_each(|(key, values)| assert_eq!(front.get(key), *values, "{key}"));
    // YAML 1.1 takes a bare no for false.
    assert!(card_text.contains("- \"no\"\n"), "{card_text}");
    let record: Value = serde_json::from_slice(&std::fs::read(out.with_extension("mbq.json")).unwrap()).unwrap();
    let words = [
        "mbq-convert chat tiny-model-2.0M-MBQ3.gguf --image picture.jpg",
        "--mmproj mmproj-tiny-model-2.0M-MBQ3-f16.gguf",
        "rounded to nearest, without calibration",
        "has not been measured",
        record["summary"]["model"]["files"][0]["sha256"].as_str().unwrap(),
        record["summary"]["mmproj"]["files"][0]["sha256"].as_str().unwrap(),
        record["origin"]["files"][1]["sha256"].as_str().unwrap(),
    ];
    words.iter().for_each(|word| assert!(card_text.contains(word), "{word}: {card_text}"));
    assert!(!card_text.contains("With any llama.cpp") && !card_text.contains(dir.path().to_str().unwrap()));
    assert!(notes.contains("nothing is said of quality") && !notes.contains("licence"), "{notes}");
    // What is not known is not invented.
    let (unknown, notes) = card(&[&out], &[]).unwrap();
    assert!(!FrontMatter::parse(&unknown).unwrap().unwrap().0.iter().any(|(key, _)| key.starts_with("base_model")));
    assert!(notes.contains("--base-model org/name"), "{notes}");
    assert!(card(&[&out], &["--base-model", "tiny"]).unwrap_err().contains("org/name"));
}

#[test]
fn a_folder_of_several_types() {
    let dir = tempfile::tempdir().unwrap();
    let outs = ["mbq3", "q4_0"].map(|kind| model(dir.path(), &["--type", kind]));
    let folder = outs[0].parent().unwrap();
    // One vision file for both: they are the same, byte for byte.
    std::fs::remove_file(folder.join("mmproj-tiny-model-2.0M-Q4_0-f16.gguf")).unwrap();
    let done = program().arg("card").args(&outs).args(["--base-model", "org/tiny-model"]).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    let written = std::fs::read_to_string(folder.join("README.md")).unwrap();
    assert!(written.contains("| `tiny-model-2.0M-Q4_0.gguf` | Q4_0 |"), "{written}");
    assert!(
        written.contains("needs it") && !written.contains("### With any llama.cpp"),
        "the projector is ours: {written}"
    );
    let (passed, said) = check(folder);
    assert!(passed && said.contains("2 models, 1 mmproj file, 2 records\nnothing is wrong"), "{said}");
    // A model of another checkpoint is not put on the same card.
    let other = tempfile::tempdir().unwrap();
    let elsewhere = model(other.path(), &["--type", "f16"]);
    let file = GgufFile::open(&elsewhere).unwrap();
    let renamed = file.metadata.str("general.name").unwrap() == "tiny-model";
    assert!(renamed);
    let moved = other.path().join("tiny-model");
    std::fs::rename(&moved, other.path().join("huge-model")).unwrap();
    let done = convert(&other.path().join("huge-model"), &elsewhere, &["--type", "f16"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let said = card(&[&outs[0], &elsewhere], &[]).unwrap_err();
    assert!(said.contains("is of another checkpoint than tiny-model-2.0M-MBQ3.gguf"), "{said}");
}

#[test]
fn split_models_are_carded_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &["--type", "f16", "--split-max-size", "1M"]);
    let folder = out.parent().unwrap();
    let shards: Vec<String> = listing(folder).into_iter().filter(|n| n.contains("-of-")).collect();
    let first = folder.join(&shards[0]);
    let done = program().arg("card").arg(&first).args(["--base-model", "org/tiny-model"]).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    let written = std::fs::read_to_string(folder.join("README.md")).unwrap();
    assert!(written.contains(&format!("`{}` and {} more", shards[0], shards.len() - 1)), "{written}");
    shards.iter().for_each(|name| assert!(written.contains(&format!("| `{name}` |\n")), "{name}"));
    assert!(check(folder).0, "{}", check(folder).1);
    std::fs::remove_file(folder.join(&shards[1])).unwrap();
    fails(folder, &[&format!("split into {} files, of which", shards.len()), &shards[1], "is missing"]);
    // What is there is not told to be missing, nor the vision file to be nobody's.
    let said = check(folder).1;
    assert!(!said.contains(&format!("{}, which is not here", shards[0])) && !said.contains("goes with none"), "{said}");
    assert!(card(&[&first], &[]).unwrap_err().contains("is missing"));
}

/// eval's JSON, as far as a card reads it, of a file with this digest.
fn report(dir: &Path, sha256: &str) -> PathBuf {
    let interval = |value: f64| json!({"value": value, "low": value * 0.9, "high": value * 1.1});
    let json = json!({
        "version": "0.1.0",
        "data": {"path": "/home/me/questions.jsonl", "sha256": "0123456789abcdef", "questions": 400, "with_picture": 400,
                 "bootstrap_resamples": 2000},
        "reference": {"name": "tiny-f16.gguf"},
        "reference_accuracy": {"all": interval(0.8)},
        "candidates": [{
            "model": {"name": "other.gguf", "sha256": sha256},
            "picture": {"greedy": {"kl_mean": interval(0.05), "agreement": interval(0.9)}},
            "accuracy": {"all": interval(0.7)}
        }]
    });
    let path = dir.join("eval.json");
    std::fs::write(&path, json.to_string()).unwrap();
    path
}

#[test]
fn measured_quality_is_of_these_files() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &[]);
    let record: Value = serde_json::from_slice(&std::fs::read(out.with_extension("mbq.json")).unwrap()).unwrap();
    let digest = record["summary"]["model"]["files"][0]["sha256"].as_str().unwrap();
    let path = report(dir.path(), digest);
    let eval = ["--eval", path.to_str().unwrap()];
    let (said, notes) = card(&[&out], &eval).unwrap();
    let row = "| pictures | 0.0500 (0.0450 to 0.0550) | 90.0 % (81.0 to 99.0) | 70.0 % (63.0 to 77.0) |";
    assert!(
        said.contains(row) && said.contains("400 questions, 400 of them about a picture, from `questions.jsonl`"),
        "{said}"
    );
    assert!(
        said.contains("The reference answers 80.0 % (72.0 to 88.0) right.") && !notes.contains("quality"),
        "{said}"
    );
    report(dir.path(), &"0".repeat(64));
    let said = card(&[&out], &eval).unwrap_err();
    assert!(said.contains("measured other files (other.gguf) than tiny-model-2.0M-MBQ3.gguf"), "{said}");
    for content in ["[]", "{\"candidates\": 1}", "no JSON"] {
        std::fs::write(&path, content).unwrap();
        assert!(card(&[&out], &eval).unwrap_err().contains("is not what `mbq-convert eval --json FILE` writes"));
    }
}

#[test]
fn records_that_are_missing_or_of_another_model() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (out, elsewhere) = (model(dir.path(), &[]), model(other.path(), &["--type", "q8_0"]));
    let record = out.with_extension("mbq.json");
    let own = std::fs::read(&record).unwrap();
    std::fs::remove_file(&record).unwrap();
    let said = card(&[&out], &[]).unwrap_err();
    assert!(said.contains("there is no record tiny-model-2.0M-MBQ3.mbq.json beside it"), "{said}");
    std::fs::copy(elsewhere.with_extension("mbq.json"), &record).unwrap();
    let said = card(&[&out], &[]).unwrap_err();
    assert!(said.contains("is not what the record") && said.contains("lists no file with the SHA-256"), "{said}");
    std::fs::write(&record, own).unwrap();
    let mmproj = out.with_file_name("mmproj-tiny-model-2.0M-MBQ3-f16.gguf");
    assert!(card(&[&mmproj], &[]).unwrap_err().contains("is an mmproj; give the language model"));
    std::fs::remove_file(&mmproj).unwrap();
    assert!(card(&[&out], &[]).unwrap_err().contains("no mmproj*.gguf beside it"));
    let whole = std::fs::read(&out).unwrap();
    std::fs::write(&out, &whole[..whole.len() / 2]).unwrap();
    assert!(card(&[&out], &[]).unwrap_err().contains("it is cut off"));
}

#[test]
fn a_folder_that_should_not_be_uploaded() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &[]);
    let folder = out.parent().unwrap();
    let done = program().arg("card").arg(&out).args(["--base-model", "org/tiny-model"]).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(check(folder).0, "{}", check(folder).1);
    let readme = folder.join("README.md");
    let card_text = std::fs::read_to_string(&readme).unwrap();
    // Front matter: each line changed, and what is said then.
    let changes = [
        ("license_name: tiny-research\n", "", "`license` is other, so `license_name` has to be there"),
        ("license: other\n", "", "`license_name` stands without"),
        (
            "license_link: \"https://huggingface.co/org/tiny-model/blob/main/LICENSE\"",
            "license_link: LICENCE",
            "is LICENCE, which is neither",
        ),
        ("base_model: org/tiny-model", "base_model: tiny", "\"tiny\", which is no repository org/name"),
        ("base_model_relation: quantized", "base_model_relation: finetune", "`base_model_relation` is finetune"),
        ("pipeline_tag: image-text-to-text", "pipeline_tag: text-generation", "expected image-text-to-text"),
        ("pipeline_tag: image-text-to-text\n", "", "`pipeline_tag` is missing"),
        ("- en\n", "- English\n", "no ISO 639 code"),
        ("library_name: gguf\n", "library_name: gguf\nlibrary_name: gguf\n", "`library_name` stands twice"),
        ("tags:\n", "tags: [\n", "is no YAML"),
        ("---\n", "", "no front matter"),
    ];
    for (old, new, words) in changes {
        assert!(card_text.contains(old), "{old}: {card_text}");
        std::fs::write(&readme, card_text.replacen(old, new, 1)).unwrap();
        fails(folder, &[words]);
    }
    std::fs::remove_file(&readme).unwrap();
    fails(folder, &["README.md: cannot be read"]);
    std::fs::write(&readme, &card_text).unwrap();
    // Names.
    let named = |name: &str, words: &[&str]| {
        std::fs::rename(&out, folder.join(name)).unwrap();
        fails(folder, words);
        std::fs::rename(folder.join(name), &out).unwrap();
    };
    named(
        "model.gguf",
        &["WRONG: model.gguf: its name ends in", "by its metadata it would be tiny-model-", "-MBQ3.gguf"],
    );
    named("tiny-MBQ3.gguf", &["has no size such as 7B"]);
    named("tiny-model-2.0M-Q4_K.gguf", &["its name says Q4_K, its general.file_type is 192"]);
    // A renamed file is still the record's.
    std::fs::rename(&out, folder.join("tiny-2.0M-MBQ3.gguf")).unwrap();
    assert!(check(folder).0, "{}", check(folder).1);
    std::fs::rename(folder.join("tiny-2.0M-MBQ3.gguf"), &out).unwrap();
    // Changed, cut off and left over files.
    let whole = std::fs::read(&out).unwrap();
    let mut bytes = whole.clone();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&out, &bytes).unwrap();
    fails(folder, &["its SHA-256 is", "the record tiny-model-2.0M-MBQ3.mbq.json says"]);
    std::fs::write(&out, &whole[..whole.len() - 64]).unwrap();
    fails(folder, &["it is cut off", "no language model"]);
    std::fs::write(&out, &whole).unwrap();
    std::fs::write(folder.join(".mbq-x.part"), "").unwrap();
    fails(folder, &["left of an interrupted conversion"]);
    std::fs::remove_file(folder.join(".mbq-x.part")).unwrap();
    // The vision file: away, another model's, under a name that nobody looks for.
    let mmproj = folder.join("mmproj-tiny-model-2.0M-MBQ3-f16.gguf");
    let hidden = folder.join("vision-f16.gguf");
    std::fs::rename(&mmproj, &hidden).unwrap();
    fails(folder, &["programs find it by a name that begins with mmproj"]);
    std::fs::rename(&hidden, dir.path().join("mmproj")).unwrap();
    fails(
        folder,
        &["without one it sees no pictures", "lists mmproj-tiny-model-2.0M-MBQ3-f16.gguf, which is not here"],
    );
    let other = tempfile::tempdir().unwrap();
    let rotated = model(other.path(), &["--rotate", "on"]);
    std::fs::copy(rotated.with_file_name(mmproj.file_name().unwrap()), &mmproj).unwrap();
    fails(folder, &["goes with none of the mmproj files here", "goes with none of the models here"]);
}

#[test]
fn the_card_of_onevision() {
    let dir = tempfile::tempdir().unwrap();
    carded(
        &checkpoint(dir.path(), Naming::Published, 1),
        "language:\n- en\n- zh\nlicense: apache-2.0\ntags:\n- vision\n- conversational\ndatasets:\n\
         - lmms-lab/LLaVA-OneVision-Data\nlibrary_name: transformers\narxiv: 2408.03326",
        &[("license", &["apache-2.0"]), ("language", &["en", "zh"]), ("arxiv", &[])],
    );
}
