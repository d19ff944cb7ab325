//! Faults around the program: a slice of tests/bench/faults.py, a model that changes under it, and that the number of
//! threads changes nothing.
mod common;

use common::{root, runtime_dir};
use mbq_convert::convert::{Calibration, Conversion, ConvertOptions};
use mbq_convert::events::Silent;
use mbq_convert::front::FoundModel;
use mbq_convert::gguf::{FileType, TypeChoice};
use mbq_convert::hub::Hub;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

/// Killed, out of room, cut off, limited, interrupted, oddly named: what the script finds is printed.
#[test]
fn a_slice_of_the_faults() {
    if runtime_dir().is_none() {
        return;
    }
    let mut command = Command::new("python3");
    command.arg(root().join("tests/bench/faults.py")).args([env!("CARGO_BIN_EXE_mbq-convert"), "--quick"]);
    match command.output() {
        Ok(done) => assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout)),
        Err(e) => eprintln!("skipped: no python3: {e}"),
    }
}

/// A copy of the demo model in `dir`.
fn copy_of_demo(dir: &Path) {
    for file in fs::read_dir(root().join("demo/model")).unwrap().map(|f| f.unwrap()) {
        if file.file_type().unwrap().is_file() {
            fs::copy(file.path(), dir.join(file.file_name())).unwrap();
        }
    }
}

/// A weight is written over between the first and the last look: nothing gets its name.
#[test]
fn a_model_that_changes_is_refused() {
    let (model, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    copy_of_demo(model.path());
    let found = FoundModel::find(model.path(), None, &Hub::from_env(true), &Silent).unwrap();
    let pair = found.pair().unwrap();
    let options = ConvertOptions {
        output: Some(out.path().join("o.gguf")),
        types: TypeChoice::of("q4_0".parse::<FileType>().unwrap()),
        mmproj_type: None,
        split_max_size: None,
        origin: found.origin(),
    };
    let conversion = Conversion::begin(&pair, &options, &Silent).unwrap();
    let weights = fs::File::options().write(true).open(model.path().join("model.safetensors")).unwrap();
    weights.write_all_at(&[0], weights.metadata().unwrap().len() - 1).unwrap();
    let error = conversion.finish(&Calibration::default(), &Silent).unwrap_err().to_string();
    assert!(error.contains("changed while it was converted"), "{error}");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

/// One thread or two: the same bytes by default, in another basis, with scales, and in another type.
#[test]
fn threads_change_nothing() {
    if runtime_dir().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let pairs = root().join("demo/calib/pairs.json");
    for more in ["", "--rotate on", "--method mbq-scales", "--type q4_k"] {
        let bytes = ["1", "2"].map(|threads| {
            let out = dir.path().join("o.gguf");
            let mut command = Command::new(env!("CARGO_BIN_EXE_mbq-convert"));
            command.arg(root().join("demo/model")).arg("-o").arg(&out).args(["--quiet", "--samples", "2", "--calib"]);
            command.arg(&pairs).args(more.split_whitespace()).env("RAYON_NUM_THREADS", threads);
            let done = command.output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            (fs::read(&out).unwrap(), fs::read(dir.path().join("mmproj-o-f16.gguf")).unwrap())
        });
        assert!(bytes[0] == bytes[1], "another file with two threads: {more}");
    }
}
