//! Any-res geometry against transformers 5, for every picture up to 800 x 800: the program's, and the runtime's.
//! tests/reference/anyres_goldens.py made the digests.
use mbq_convert::image::anyres::{Size, best_pinpoint, shrunk, unpadded};
use serde_json::Value;

fn goldens() -> Vec<Value> {
    serde_json::from_str(include_str!("golden/anyres.json")).unwrap()
}

/// Side of a tile in pixels and in tokens, and pinpoints of 1 to n tiles each way.
fn grid(golden: &Value) -> (usize, usize, usize) {
    let n = |key: &str| golden[key].as_u64().unwrap() as usize;
    (n("side"), n("grid"), n("pinpoints"))
}

/// Rows and columns of tiles; the first row, the rows, the first column and the columns of tokens kept; all tokens.
fn plan(width: usize, height: usize, (side, grid, _): (usize, usize, usize), pinpoints: &[Size]) -> [usize; 7] {
    let original = Size { height, width };
    let best = best_pinpoint(original, pinpoints).unwrap();
    let (rows, cols) = (best.height / side, best.width / side);
    let (top, h, left, w) = unpadded(original, rows * grid, cols * grid);
    let (out_h, out_w) = shrunk(h, w, grid, 9);
    let (top, left) = if h * w == 0 { (0, 0) } else { (top, left) };
    [rows, cols, top, h, left, w, grid * grid + out_h * (out_w + 1)]
}

fn pinpoints((side, _, n): (usize, usize, usize)) -> Vec<Size> {
    (1..=n).flat_map(|a| (1..=n).map(move |b| Size { height: side * a, width: side * b })).collect()
}

/// FNV-1a of 64 bits, over the numbers as 4 bytes each.
fn digest(numbers: impl Iterator<Item = usize>) -> String {
    let bytes = numbers.flat_map(|n| (n as u32).to_le_bytes());
    format!("{:016x}", bytes.fold(0xCBF2_9CE4_8422_2325u64, |x, b| (x ^ u64::from(b)).wrapping_mul(0x100_0000_01B3)))
}

#[test]
fn geometry_is_that_of_transformers() {
    for golden in goldens() {
        let grid = grid(&golden);
        let pinpoints = pinpoints(grid);
        for some in golden["some"].as_array().unwrap() {
            let n: Vec<usize> = some.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect();
            assert_eq!(plan(n[0], n[1], grid, &pinpoints), n[2..], "{} x {} on {grid:?}", n[0], n[1]);
        }
        let rows = golden["rows"].as_array().unwrap();
        assert_eq!(rows.len(), 800);
        for (height, want) in (1..).zip(rows) {
            let got = digest((1..=800).flat_map(|width| plan(width, height, grid, &pinpoints)));
            assert_eq!(got, want.as_str().unwrap(), "height {height} on {grid:?}");
        }
    }
}

/// The published grid; transformers' own test of it counts 6567 with 16 tokens of text.
#[test]
fn a_published_number_of_tokens() {
    let grid = (384, 27, 6);
    assert_eq!(plan(1024, 899, grid, &pinpoints(grid))[6], 6567 - 16);
}

/// The header that the runtime's preprocessing, graph and token count share, compiled alone.
#[test]
fn the_runtime_has_the_same_geometry() {
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
