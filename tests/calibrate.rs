//! Calibration through the program: bad input is refused by name, and a killed run that is resumed gives the very file.
use mbq_convert::calibrate::store::WorkFiles;
use mbq_convert::events::Silent;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/model")
}

fn convert(out: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mbq-convert"));
    command.arg(demo()).arg("-o").arg(out).args(["--quiet", "--memory", "64M"]).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// A pairs file or picture that must be refused with `words` in the message, and without output.
fn refused(pairs: &str, prepare: impl Fn(&Path), more: &[&str], words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (list, out) = (dir.path().join("pairs.jsonl"), dir.path().join("out"));
    fs::write(&list, pairs).unwrap();
    fs::create_dir(&out).unwrap();
    prepare(dir.path());
    let mut arguments = vec!["--calib", list.to_str().unwrap()];
    arguments.extend(more);
    let done = convert(&out.join("o.gguf"), &arguments).output().unwrap();
    let message = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(1), "{words:?}: {message}");
    assert!(words.iter().all(|w| message.contains(w)), "{words:?} not in: {message}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0, "{message}");
}

const PAIR: &str = r#"{"image": "p.png", "question": "What is it?", "answer": "A red star."}"#;

fn picture(dir: &Path) {
    fs::copy(demo().parent().unwrap().join("pictures/red-star.png"), dir.join("p.png")).unwrap();
}

#[test]
fn bad_pairs_are_named() {
    refused("", picture, &[], &["pairs.jsonl", "no image-text pairs"]);
    refused("{\"image\": ", picture, &[], &["pairs.jsonl", "line 1", "not JSON"]);
    refused("{\"image\": \"p.png\", \"answer\": \" \"}", picture, &[], &["entry 1", "the answer is empty"]);
    refused("{\"image\": \"p.png\", \"question\": \"?\"}", picture, &[], &["entry 1", "`answer` is missing"]);
    refused(PAIR, |_| (), &[], &["p.png", "does not exist", "--image-root"]);
    refused(PAIR, |dir| fs::write(dir.join("p.png"), "no picture").unwrap(), &[], &["p.png", "not a readable picture"]);
    refused(PAIR, picture, &["--set", "max-tokens=20"], &["entry 1", "tokens", "max-tokens"]);
}

/// One in ten may be missing or broken: they are left out and counted. More are too many.
#[test]
fn a_few_bad_pairs_are_skipped() {
    let missing = PAIR.replace("p.png", "gone.png");
    let lines = |n: usize| format!("{missing}\n{}", format!("{PAIR}\n").repeat(n));
    refused(&lines(8), picture, &[], &["1 of 9 drawn entries", "more than one in ten", "entry 1", "gone.png"]);
    let dir = tempfile::tempdir().unwrap();
    picture(dir.path());
    let (list, out) = (dir.path().join("pairs.jsonl"), dir.path().join("o.gguf"));
    let record =
        || -> serde_json::Value { serde_json::from_slice(&fs::read(out.with_extension("mbq.json")).unwrap()).unwrap() };
    let run = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mbq-convert"));
        command.arg(demo()).arg("-o").arg(&out).args(["--method", "smoothquant", "--calib"]);
        let done = command.arg(&list).args(more).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8_lossy(&done.stderr).into_owned()
    };
    fs::write(&list, lines(9)).unwrap();
    let said = run(&[]);
    assert!(said.contains("1 of 10 drawn entries were skipped") && said.contains("gone.png"), "{said}");
    assert_eq!(record()["calibration"]["settings"]["samples"], 9);
    assert!(record()["calibration"]["skipped"][0].as_str().unwrap().contains("gone.png"));
    // A broken picture is known only once it is opened; what is not drawn is not opened.
    fs::write(dir.path().join("gone.png"), "no picture").unwrap();
    assert!(run(&[]).contains("not a readable picture"));
    for seed in ["0", "1", "2", "3"] {
        let said = run(&["--samples", "1", "--set", &format!("seed={seed}")]);
        assert!(!said.contains("skipped"), "seed {seed}: {said}");
    }
}

/// What would change nothing is not passed over.
#[test]
fn settings_without_effect_are_refused() {
    let nothing = |_: &Path| ();
    for (more, words) in [
        (&["--method", "rtn"][..], &["--calib", "rtn"][..]),
        (&["--type", "f16"], &["--calib", "rtn"]),
        (&["--method", "gptq", "--vision-weight", "0.3"], &["--vision-weight", "gptq"]),
        (&["--type", "q4_k", "--method", "mbq-scales", "--set", "target=1"], &["--set target", "mbq-scales"]),
        (&["--set", "loss=mse"], &["--set loss", "mbq"]),
        (&["--set", "losses=mse"], &["losses", "share-heads"]),
        (&["--method", "awq", "--bpw", "4"], &["--bpw"]),
        (&["--type", "q4_k", "--imatrix", "Cargo.toml"], &["--imatrix FILE", "mbq"]),
    ] {
        refused(PAIR, nothing, more, words);
    }
}

/// The shapes of lists that people have (MBQ_SHARED, cases/pairs): all entries are read but for those that name a
/// picture that is missing or truncated.
#[test]
fn lists_that_people_have() {
    use mbq_convert::calibrate::pairs::List;
    let Some(shared) = std::env::var_os("MBQ_SHARED") else { return eprintln!("skipped: MBQ_SHARED is not set") };
    let cases = Path::new(&shared).join("cases/pairs");
    let (mut lists, mut bad) = (0, Vec::new());
    for file in fs::read_dir(&cases).unwrap().map(|f| f.unwrap()).filter(|f| f.file_type().unwrap().is_file()) {
        let list = List::read(&file.path(), None).unwrap();
        lists += 1;
        for index in 0..list.len() {
            let loaded = list.conversation(index).and_then(|c| {
                let pictures = c.pictures.iter().map(|p| p.load()).collect::<Result<Vec<_>, _>>()?;
                Ok((c.messages.len(), pictures.len()))
            });
            let name = file.file_name().into_string().unwrap();
            match (name.as_str(), index, loaded) {
                (_, _, Err(_)) => bad.push(format!("{name} {}", index + 1)),
                ("multiturn.json", 0, Ok(found)) => assert_eq!(found, (5, 1)),
                ("twoimg.json", 0, Ok(found)) => assert_eq!(found, (2, 2)),
                ("null_image.json", 0, Ok(found)) => assert_eq!(found, (2, 0)),
                (_, _, Ok(found)) => assert_eq!(found, (2, 1), "{name} {index}"),
            }
        }
    }
    bad.sort();
    assert_eq!(
        (lists, bad),
        (12, ["late_missing.json 32", "missing1.json 3", "trunc_jpg.json 3"].map(String::from).into())
    );
}

/// Text alone gives finite sensitivities, 0 at vision tokens, in the search and in the compensation.
#[test]
fn pairs_without_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("pairs.jsonl");
    let text = "{\"question\": \"What is it?\", \"answer\": \"A red star.\"}\n";
    fs::write(&list, format!("{text}{text}{text}")).unwrap();
    for more in [&["--method", "mbq-scales"][..], &["--set", "scales=on", "--imatrix", "balanced"]] {
        let out = dir.path().join("o.gguf");
        let done = convert(&out, &[&["--calib", list.to_str().unwrap()], more].concat()).output().unwrap();
        assert!(done.status.success(), "{more:?}: {}", String::from_utf8_lossy(&done.stderr));
        let record = fs::read_to_string(out.with_extension("mbq.json")).unwrap();
        let record: serde_json::Value = serde_json::from_str(&record).unwrap();
        for block in record["calibration"]["sensitivities"].as_array().unwrap() {
            assert_eq!(block["mlp"]["vision"], 0.0, "{more:?}");
            assert!(block["mlp"]["answer"].as_f64().unwrap() > 0.0, "{more:?}");
        }
    }
}

/// A picture of 60,000 x 60,000 pixels is refused from its header, before memory is taken for it.
#[test]
fn gigantic_picture() {
    let header = |dir: &Path| {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
        png.extend([0, 0, 0xea, 0x60, 0, 0, 0xea, 0x60, 8, 2, 0, 0, 0]);
        png.extend(crc(&png[12..]).to_be_bytes());
        png.extend(b"\0\0\0\0IDAT");
        png.extend(crc(b"IDAT").to_be_bytes());
        fs::write(dir.join("p.png"), png).unwrap();
    };
    refused(PAIR, header, &[], &["p.png", "60000 x 60000 pixels"]);
}

/// PNG's CRC-32.
fn crc(data: &[u8]) -> u32 {
    let step = |c: u32| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 };
    !data.iter().fold(u32::MAX, |c, &b| (0..8).fold(c ^ u32::from(b), |c, _| step(c)))
}

/// Waits for the end, or kills (SIGKILL) when `after` has passed. Whether it ended by itself.
fn ended(child: &mut Child, after: Duration) -> bool {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return true;
        }
        if start.elapsed() > after {
            child.kill().unwrap();
            child.wait().unwrap();
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Killed ten times at moments spread over a whole run's time and resumed each time, the program writes the same bytes
/// as without interruption. The moments differ from run to run with the machine's speed; the outcome may not.
#[test]
fn killed_and_resumed_gives_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, pieces) = (dir.path().join("a/model.gguf"), dir.path().join("b/model.gguf"));
    for path in [&whole, &pieces] {
        fs::create_dir(path.parent().unwrap()).unwrap();
    }
    let more = ["--samples", "4", "--resume"];
    let start = Instant::now();
    let done = convert(&whole, &more).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let all = start.elapsed();
    let (mut killed, mut resumed, mut state) = (0, 0, 0x9E37_79B9_7F4A_7C15u64);
    while killed < 10 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let part = (state >> 40) as f64 / (1u64 << 24) as f64;
        if fs::read_dir(pieces.parent().unwrap())
            .unwrap()
            .any(|f| f.unwrap().file_name().to_string_lossy().ends_with("progress.json"))
        {
            resumed += 1;
        }
        let mut child = convert(&pieces, &more).stderr(Stdio::null()).spawn().unwrap();
        if ended(&mut child, all.mul_f64(part)) {
            // What is left runs out sooner than a whole run: begin again, to be killed elsewhere.
            assert!(fs::read(&whole).unwrap() == fs::read(&pieces).unwrap(), "another file after {killed} kills");
            fs::remove_file(&pieces).unwrap();
        } else {
            killed += 1;
        }
    }
    let done = convert(&pieces, &more).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(fs::read(&whole).unwrap() == fs::read(&pieces).unwrap(), "another file after ten kills");
    eprintln!("{resumed} starts found progress; a whole run takes {:.1} s", all.as_secs_f64());
    let left = fs::read_dir(pieces.parent().unwrap()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|n| n.contains("progress")).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}

/// Another process calibrates for the same output, or in the same --work-dir: refused with its name, nothing touched.
#[test]
fn work_files_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let work = dir.path().join("work");
    fs::create_dir(&work).unwrap();
    for (stem, more) in [
        (dir.path().join("o.mbq-progress"), vec![]),
        (work.join("mbq-progress"), vec!["--work-dir", work.to_str().unwrap()]),
    ] {
        let held = WorkFiles::take(stem, "another model to o.gguf", &Silent).unwrap();
        fs::write(held.progress(), "theirs").unwrap();
        let done = convert(&dir.path().join("o.gguf"), &more).output().unwrap();
        let message = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(message.contains("another model to o.gguf") && message.contains("--work-dir"), "{message}");
        assert!(done.status.code() == Some(1) && fs::read(held.progress()).unwrap() == b"theirs");
        assert!(!dir.path().join("o.gguf").exists());
    }
}

/// `--bpw` keeps to its budget, spends it on the parts that the record says are worth it, and is refused where it
/// cannot be kept.
#[test]
fn a_budget_of_bits() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("o.gguf");
    let pairs = demo().parent().unwrap().join("calib/pairs.json");
    let calib = ["--calib", pairs.to_str().unwrap(), "--samples", "4", "--json", "--bpw"];
    let run = |bpw: &str, more: &[&str]| {
        let mut command = convert(&out, &[&calib[..], &[bpw], more].concat());
        command.stdout(Stdio::piped()).output().unwrap()
    };
    for (bpw, more, words) in [("3.2", &[][..], "3.25"), ("3.5", &["--type", "q3_k"][..], "--bpw")] {
        let done = run(bpw, more);
        let message = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(done.status.code() == Some(1) && message.contains(words) && !out.exists(), "{message}");
    }
    let done = run("3.5", &[]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let summary: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    let bits = summary["decoder_bits_per_weight"].as_f64().unwrap();
    let record: serde_json::Value = serde_json::from_slice(&fs::read(dir.path().join("o.mbq.json")).unwrap()).unwrap();
    let parts = record["calibration"]["parts"].as_array().unwrap();
    let weights = |p: &serde_json::Value| p["weights"].as_f64().unwrap();
    let (all, least) = (parts.iter().map(weights).sum::<f64>(), parts.iter().map(weights).fold(f64::MAX, f64::min));
    // 1.25 bits more for the smallest part would have gone over, or every part that gains has them already.
    assert!(bits <= 3.5 && bits > 3.5 - 1.25 * least / all - 1e-9, "{bits}");
    let wider = record["calibration"]["settings"]["wider"].as_object().unwrap();
    assert!(!wider.is_empty() && wider.values().all(|ty| ty == "q4_0"), "{wider:?}");
}
