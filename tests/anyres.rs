//! The runtime's any-res geometry against transformers 5, for every picture up to 800 x 800.
//! tests/reference/anyres_goldens.py made the digests.
use serde_json::Value;

fn goldens() -> Vec<Value> {
    serde_json::from_str(include_str!("golden/anyres.json")).unwrap()
}

/// Side of a tile in pixels and in tokens, and pinpoints of 1 to n tiles each way.
fn grid(golden: &Value) -> (usize, usize, usize) {
    let n = |key: &str| golden[key].as_u64().unwrap() as usize;
    (n("side"), n("grid"), n("pinpoints"))
}

/// The header that the runtime's preprocessing, graph and token count share, compiled alone.
#[test]
fn geometry_is_that_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("anyres");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let output = std::process::Command::new(compiler)
        .args(["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror"])
        .arg(format!("-I{}", root.join("patches/files/tools/mtmd").display()))
        .arg(root.join("tests/kernels/anyres.cpp"))
        .arg("-o")
        .arg(&program)
        .output()
        .expect("a C++ compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for golden in goldens() {
        let (side, grid, n) = grid(&golden);
        let output =
            std::process::Command::new(&program).args([side, grid, n].map(|n| n.to_string())).output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let wants = golden["rows"].as_array().unwrap();
        assert_eq!(text.lines().count(), wants.len());
        for ((height, got), want) in (1..).zip(text.lines()).zip(wants) {
            assert_eq!(got, want.as_str().unwrap(), "height {height} on tiles of {side}");
        }
    }
}
