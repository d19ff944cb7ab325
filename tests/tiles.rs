//! The runtime's resampling and tiles against Pillow and transformers, byte for byte; tests/reference/tile_goldens.py made
//! the digests.
mod common;

use common::{root, runtime_dir};
use mbq_convert::digest::hex;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// What the program makes of each request, SHA-256.
fn digests(runtime: &Path, requests: &[String]) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("tiles");
    let tree = Path::new(env!("OUT_DIR")).join("llama.cpp");
    let include = ["tools/mtmd", "common", "include", "ggml/include", "vendor"];
    let output = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".into()))
        .args(["-std=c++17", "-O1", "-w"])
        .args(include.map(|dir| format!("-I{}", tree.join(dir).display())))
        .arg(root().join("tests/kernels/tiles.cpp"))
        .arg(format!("-L{}", runtime.display()))
        .arg(format!("-Wl,-rpath,{},--allow-shlib-undefined", runtime.display()))
        .args(["-lmtmd", "-lggml-base", "-o"])
        .arg(&program)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut child = Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let lines = requests.join("\n");
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success());
    let (mut rest, mut all) = (&output.stdout[..], Vec::new());
    while let Some(end) = rest.iter().position(|&b| b == b'\n') {
        let n: usize = std::str::from_utf8(&rest[..end]).unwrap().parse().unwrap();
        all.push(hex(&Sha256::digest(&rest[end + 1..end + 1 + n])));
        rest = &rest[end + 1 + n..];
    }
    all
}

#[test]
fn pixels_are_those_of_pillow_and_transformers() {
    let Some(runtime) = runtime_dir() else { return };
    let goldens: Value = serde_json::from_str(include_str!("golden/tiles.json")).unwrap();
    let cases = |key: &str| goldens[key].as_array().unwrap().clone();
    let n = |case: &Value, i: usize| case[i].as_u64().unwrap();
    let (mut requests, mut wanted) = (Vec::new(), Vec::new());
    for case in cases("resize") {
        let numbers: Vec<String> = (0..5).map(|i| n(&case, i).to_string()).collect();
        requests.push(format!("resize {}", numbers.join(" ")));
        wanted.push(case[5].as_str().unwrap().to_string());
    }
    for case in cases("tiles") {
        requests.push(format!("tiles {} {}", n(&case, 0), n(&case, 1)));
        wanted.push(case[3].as_str().unwrap().to_string());
    }
    assert_eq!(requests.len(), 18 + 11);
    let got = digests(&runtime, &requests);
    assert_eq!(got.len(), wanted.len());
    for ((request, got), want) in requests.iter().zip(&got).zip(&wanted) {
        assert_eq!(got, want, "{request}");
    }
}
