//! `mbq-convert report`: a page of a real conversion, one of a record that strangers wrote, and records that are not the
//! model's.
mod common;
mod tiny;

use common::{root, runtime_dir};
use mbq_convert::digest::FileDigest;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tiny::{Naming, checkpoint, convert, listing, program, text};

/// The page that `args` write, or the error.
fn report(model: &Path, args: &[&str]) -> Result<String, String> {
    let page = model.with_file_name("page.html");
    let _ = std::fs::remove_file(&page);
    let done = program().arg("report").arg(model).arg("-o").arg(&page).args(args).output().unwrap();
    match done.status.success() {
        true => Ok(std::fs::read_to_string(page).unwrap()),
        false => {
            assert!(!page.exists(), "a page in spite of {}", text(&done.stderr));
            Err(text(&done.stderr))
        }
    }
}

/// `out.gguf` of the made-up model in a folder of its own.
fn model(parent: &Path, args: &[&str]) -> PathBuf {
    let out = parent.join("out/out.gguf");
    std::fs::create_dir_all(out.parent().unwrap()).unwrap();
    let done = convert(&checkpoint(parent, Naming::Published, 1), &out, args);
    assert!(done.status.success(), "{}", text(&done.stderr));
    out
}

fn edit(json: &Path, change: impl Fn(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(json, value.to_string()).unwrap();
}

/// No address but of data inside the page, no script, every section's heading and every box's label in place.
fn self_contained(page: &str) {
    for bad in ["<script", "<link", "<iframe", "@import", "url(", "src=\"http", "href=", " onerror", " onload"] {
        assert!(!page.contains(bad), "{bad}");
    }
    assert!(page.split("src=\"").skip(1).all(|rest| rest.starts_with("data:image/png;base64,")));
    assert!(page.contains("prefers-color-scheme:dark") && page.contains("@media print"));
    let count = |needle: &str| page.matches(needle).count();
    for tag in ["section", "figure", "table", "details", "article", "div", "svg", "dl", "p"] {
        let open = count(&format!("<{tag} ")) + count(&format!("<{tag}>"));
        assert_eq!(open, count(&format!("</{tag}>")), "{tag}");
    }
    // What is only read aloud stays inside the table that scrolls, or a phone's page would be as wide as the table.
    assert!(page.contains(".scroll{position:relative;"));
    // What scrolls can be reached by keys, and has a name.
    assert_eq!(count("class=\"scroll\""), count("tabindex=\"0\" role=\"region\" aria-label=\""));
}

/// What a browser makes of escaped text.
fn unescaped(html: &str) -> String {
    let pairs = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'"), ("&amp;", "&")];
    pairs.iter().fold(html.to_owned(), |text, (code, c)| text.replace(code, c))
}

fn between<'a>(page: &'a str, start: &str, end: &str) -> &'a str {
    page.split_once(start).unwrap_or_else(|| panic!("{start}")).1.split_once(end).unwrap().0
}

/// The demo model, calibrated: what the record has stands on the page, and the command on it makes the same file.
#[test]
fn a_conversion_is_told_and_repeated() {
    if runtime_dir().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // A quote in the folder's name must come through the page and a shell.
    let pictures = dir.path().join("it's pictures");
    std::fs::create_dir(&pictures).unwrap();
    for name in ["blue-heart", "red-star"] {
        let file = format!("{name}.png");
        std::fs::copy(root().join("demo/pictures").join(&file), pictures.join(&file)).unwrap();
    }
    std::fs::write(pictures.join("blue-heart.txt"), "A blue heart.").unwrap();
    let out = dir.path().join("o.gguf");
    let done = program()
        .arg(root().join("demo/model"))
        .args(["--set", "target=0.25", "--calib"])
        .arg(&pictures)
        .arg("-o")
        .arg(&out)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    let page = report(&out, &[]).unwrap();
    self_contained(&page);
    for id in ["blocks", "linears", "bytes", "calib", "time", "again"] {
        assert!(page.contains(&format!("id=\"h-{id}\"")), "{id}");
    }
    for id in ["plot", "acc", "sense", "scales"] {
        assert!(!page.contains(&format!("id=\"h-{id}\"")), "{id} without data");
    }
    assert_eq!(page.matches("<img ").count(), 2);
    let record: Value = serde_json::from_slice(&std::fs::read(dir.path().join("o.mbq.json")).unwrap()).unwrap();
    let own = record["calibration"]["own_answers"].as_object().unwrap();
    for turn in own.values().flat_map(|turns| turns.as_array().unwrap()) {
        assert!(unescaped(&page).contains(&format!(
            "<dt>{}</dt><dd>{}</dd>",
            turn[0].as_str().unwrap(),
            turn[1].as_str().unwrap()
        )));
    }
    // A cell for each matrix of each block, before and after, wide and for a phone.
    let compensated = record["calibration"]["compensated"].as_array().unwrap();
    assert_eq!(page.matches("class=\"cell\"").count(), compensated.len() * 7 * 2 * 2);
    let gain = &compensated[1]["linears"][6];
    let (left, share) = (gain["error"].as_f64().unwrap(), gain["gain"].as_f64().unwrap());
    let name = gain["linear"].as_str().unwrap();
    assert!(page.contains(&format!("<title>block 1, {name}: {:.2e}</title>", left / share)), "before");
    assert!(page.contains(&format!("<title>block 1, {name}: {left:.2e}</title>")), "after");
    assert!(page.contains(record["summary"]["model"]["files"][0]["sha256"].as_str().unwrap()));

    let again = dir.path().join("again");
    std::fs::create_dir(&again).unwrap();
    let command = unescaped(between(&page, "<code>", "</code>"));
    let command = command.replacen("mbq-convert", env!("CARGO_BIN_EXE_mbq-convert"), 1);
    let done = std::process::Command::new("sh").args(["-c", &command]).current_dir(&again).output().unwrap();
    assert!(done.status.success(), "{command}: {}", text(&done.stderr));
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(again.join("o.gguf")).unwrap(), "{command}");

    // Pictures and texts can be left out; without a name the page lies beside the model.
    let bare = report(&out, &["--no-pictures"]).unwrap();
    assert!(!bare.contains("<img ") && !bare.contains("A blue heart."));
    let done = program().arg("report").arg(&out).output().unwrap();
    assert!(done.status.success() && dir.path().join("o.report.html").is_file());
}

/// What calibration would have noted of a list of conversations, with everything a page shows.
fn noted(source: &str, evil: &str) -> Value {
    let sense = |vision: f64, answer: f64| json!({"vision": vision, "answer": answer});
    let blocks = |found: Value| json!([found.clone(), found.clone(), found]);
    json!({
        "method": "mbq", "tokens": 321, "data_sha256": "00", "skipped": [format!("{evil}: entry 9: {evil}")],
        "settings": {
            "source": source, "samples": 4, "imatrix": evil, "switches": {"seed": null, evil: evil},
            "compensation": {"vision": "Ratio", "damping": 0.01, "search_levels": true, "target": 0.5, "residual": false},
        },
        "own_answers": {evil: [[evil, evil]], format!("{source}: entry 1"): [["Which colour?", evil]]},
        "sensitivities": blocks(json!({"attn": sense(1e-7, 3e-6), "mlp": sense(2e-7, 4e-6)})),
        "ratios": blocks(json!({"attn": 0.033, "mlp": 0.05})),
        "blocks": blocks(json!([{"group": evil, "ratio": 0.033, "exponent": 0.35, "loss": 1.0}])),
        "compensated": blocks(json!({"linears": [{"linear": evil, "gain": 0.25, "error": 0.01},
            {"linear": "mlp.down_proj", "gain": 0.0, "error": 0.0}], "vision": 0.002, "text": 0.004})),
        "seconds": {"embedding": 1.5, "phases": {evil: 2.0, "": 1.0, "blocks": 3.0, "each block": [1.0, 1.0, 1.0]}, "all": 8.0},
        "image_root": null, "bpw": 3.5,
    })
}

/// Names, answers and paths are strangers' text.
#[test]
fn what_strangers_wrote_stays_text() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &[]);
    let evil = "<script>alert(1)</script>\"' onload='x";
    let entry = |image: &str| json!({"image": image, "question": evil, "answer": evil});
    std::fs::create_dir(dir.path().join("data")).unwrap();
    let list = dir.path().join("data/list.json");
    let red = std::fs::read(root().join("demo/pictures/red-star.png")).unwrap();
    for place in ["data/in.png", "outside.png"] {
        std::fs::write(dir.path().join(place), &red).unwrap();
    }
    let entries =
        json!([entry("in.png"), entry("../outside.png"), entry("missing.png"), {"question": evil, "answer": "4"}]);
    std::fs::write(&list, entries.to_string()).unwrap();
    edit(&out.with_file_name("out.mbq.json"), |record| {
        record["source"] = evil.into();
        record["converter"] = evil.into();
        record["calibration"] = noted(list.to_str().unwrap(), evil);
        record["origin"] =
            json!({"name": evil, "revision": evil, "files": [{"name": evil, "bytes": 1, "sha256": evil}]});
        let written = &mut record["summary"]["model"];
        written["type"] = evil.into();
        written["fallbacks"] = json!([{"tensor": evil, "row": 96, "wanted": evil, "used": evil}]);
    });
    let evaluation = dir.path().join("eval.json");
    std::fs::write(&evaluation, evaluated(&out, evil).to_string()).unwrap();
    let page = report(&out, &["--eval", evaluation.to_str().unwrap()]).unwrap();
    assert!(page.matches("&lt;script&gt;alert(1)&lt;/script&gt;").count() > 20);
    let markup: String = page.split('<').map(|part| part.split_once('>').map_or(part, |p| p.0)).collect();
    assert!(!markup.contains("alert"), "in a tag");
    for id in ["plot", "acc", "blocks", "linears", "sense", "scales", "bytes", "calib", "time", "again"] {
        assert!(page.contains(&format!("id=\"h-{id}\"")), "{id}");
    }
    self_contained(&unscripted(&page));
    // One picture is shown; the page of a list shows none from outside its folder.
    assert_eq!(page.matches("<img ").count(), 1);
    assert!(page.contains("outside.png lies outside") && page.contains("missing.png does not exist"));
    // An error that rounding to nearest did not make is left out, not drawn.
    assert!(page.contains("<title>block 2, ") && !page.contains("block 2, down"));
    assert!(page.contains("<td class=\"n\">0.35 (r 0.03)</td>"));
    for option in ["--bpw 3.5", "--vision-weight ratio", "--samples 5"] {
        assert!(page.contains(option), "{option}");
    }
}

/// Text that says ` onload` is harmless outside of tags.
fn unscripted(page: &str) -> String {
    page.replace(" onload=&#39;", "")
}

/// What eval writes of `model` and of another one.
fn evaluated(model: &Path, name: &str) -> Value {
    let digest = FileDigest::of(model, &std::fs::read(model).unwrap()).sha256;
    let interval = |value: f64| json!({"value": value, "low": value * 0.9, "high": value * 1.1});
    let accuracy = |right: usize| json!({"all": interval(right as f64 / 20.0), "correct": right, "questions": 20, "kinds": {name: [right, 20]}});
    let fidelity = json!({"positions": 50, "kl_mean": interval(0.0423), "kl_median": 0.01, "kl_p99": 0.5, "kl_max": 1.0,
        "agreement": interval(0.875), "perplexity": 1.2, "perplexity_reference": 1.1, "perplexity_ratio": interval(1.1)});
    // Nothing decoded in no time: serde_json writes null.
    let speed = json!({"prefill_tokens_per_second": 100.0, "decode_tokens_per_second": null, "times": {"load": 0.0,
        "prefill": 1.0, "prefill_tokens": 100, "score": 1.0, "score_tokens": 10, "decode": 0.0, "decode_tokens": 0}});
    let info = |name: &str, sha256: &str| {
        json!({"name": name, "sha256": sha256, "file_bytes": 2_000_000, "weights": 10,
        "bits_per_weight": 3.5, "block_bits_per_weight": 3.25})
    };
    let candidate = |name: &str, sha256: &str, right: usize| {
        json!({"model": info(name, sha256), "text": null, "accuracy": accuracy(right),
        "picture": {"questions": 20, "greedy": fidelity, "given": null}, "speed": speed})
    };
    json!({"version": name, "runtime": name, "threads": 2, "gpu_layers": 0, "reference": info(name, "ff"), "mmproj": null,
        "data": {"path": name, "sha256": name, "questions": 20, "with_picture": 20, "text_only": 0, "max_tokens": 8,
            "bootstrap_resamples": 10, "seed": 1},
        "reference_accuracy": accuracy(18), "reference_speed": speed, "pairs": [], "questions": [],
        "candidates": [candidate("other.gguf", "00", 12), candidate(name, &digest, 15)],
        "cost": {"wall_seconds": 1.0, "prepare_seconds": 0.0, "encode_seconds": 0.0, "peak_memory_bytes": null,
            "cache_bytes": 0, "cache_log_prob_error": 0.0, "cache_kl_bound": 0.0}})
}

#[test]
fn an_evaluation_of_this_file_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let out = model(dir.path(), &[]);
    let path = dir.path().join("eval.json");
    let put = |value: &Value| std::fs::write(&path, value.to_string()).unwrap();
    let measured = |words: &[&str]| {
        let error = report(&out, &["--eval", path.to_str().unwrap()]).unwrap_err();
        words.iter().for_each(|word| assert!(error.contains(word), "{word}: {error}"));
    };
    let own = evaluated(&out, "own.gguf");
    put(&own);
    let page = report(&out, &["--eval", path.to_str().unwrap()]).unwrap();
    assert!(page.contains("own (this model)") && !page.contains("other (this model)"));
    // Of this model, not of the other.
    assert!(page.contains("answers <b>75.0 %</b> right, the model it was made from 90.0 %"));
    assert!(page.contains("<b>87.5 %</b> of places") && page.contains("differ by 0.04230 nats"));

    let mut others = own.clone();
    others["candidates"][1]["model"]["sha256"] = "ab".repeat(32).into();
    put(&others);
    measured(&["eval.json: ", "was not measured there", "other.gguf (00…), own.gguf (abab", "or leave out --eval"]);
    others["reference"]["sha256"] = own["candidates"][1]["model"]["sha256"].clone();
    put(&others);
    measured(&["it has it as the reference"]);
    put(&json!({"questions": []}));
    measured(&["eval.json: not what `mbq-convert eval --json` writes: missing field"]);
    let mut short = own.clone();
    short["questions"] = json!([{"id": "q7", "kind": "k", "image": null, "question": "?", "expected": "!",
        "reference": {"text": "!", "correct": true, "kl": null}, "candidates": []}]);
    put(&short);
    measured(&["question \"q7\" has 0 answers of 2 models"]);
    std::fs::remove_file(&path).unwrap();
    measured(&["eval.json", "No such file"]);
}

#[test]
fn records_that_are_not_the_models_are_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (out, twin) = (model(dir.path(), &[]), model(other.path(), &["--rotate", "on"]));
    let record = out.with_file_name("out.mbq.json");
    let own = std::fs::read(&record).unwrap();
    let refused = |words: &[&str]| {
        let error = report(&out, &[]).unwrap_err();
        words.iter().for_each(|word| assert!(error.contains(word), "{word}: {error}"));
    };
    let page = report(&out, &[]).unwrap();
    self_contained(&page);
    assert!(page.contains("Each weight was rounded to the nearest value") && !page.contains("without digests"));

    std::fs::copy(twin.with_file_name("out.mbq.json"), &record).unwrap();
    refused(&["is not this file's", "out.mbq.json says", "convert again"]);
    std::fs::remove_file(&record).unwrap();
    refused(&["out.gguf: there is no record out.mbq.json beside it", "convert again"]);
    std::fs::write(&record, "{").unwrap();
    refused(&["out.mbq.json: not a record of a conversion"]);
    std::fs::write(&record, &own).unwrap();
    edit(&record, |r| r["calibration"] = json!({"compensated": 7}));
    refused(&["out.mbq.json: not a record of a conversion: calibration: invalid type"]);
    // Without digests the sizes must fit, and the page says that they are all there is.
    let undigested = |r: &mut Value| {
        ["model", "mmproj"].iter().for_each(|key| drop(r["summary"][key].as_object_mut().unwrap().remove("files")));
    };
    std::fs::write(&record, &own).unwrap();
    edit(&record, undigested);
    assert!(report(&out, &[]).unwrap().contains("without digests"));
    edit(&record, |r| r["summary"]["model"]["tensors"] = 7.into());
    refused(&["it is of 7 tensors in"]);
    std::fs::write(&record, &own).unwrap();

    let vision = report(&out.with_file_name("mmproj-out-f16.gguf"), &[]).unwrap_err();
    assert!(vision.contains("is a vision file (mmproj); give the language model"), "{vision}");
    let before = listing(out.parent().unwrap());
    let done = program().arg("report").arg(&out).arg("-o").arg(dir.path()).output().unwrap();
    assert!(text(&done.stderr).contains("is a directory; name a file"));
    assert_eq!(listing(out.parent().unwrap()), before);
}
