//! The importance matrix gathered with pictures drives llama-quantize, which then writes what this program writes.
mod common;

use common::{root, runtime_dir};
use mbq_convert::gguf::GgufFile;
use mbq_convert::runtime;
use std::path::Path;
use std::process::Command;

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Share of equal bytes among the decoder linears' data.
fn equal_share(a: &Path, b: &Path) -> f64 {
    let read = |path: &Path| (GgufFile::open(path).unwrap(), std::fs::read(path).unwrap());
    let ((a, a_bytes), (b, b_bytes)) = (read(a), read(b));
    let (mut same, mut all) = (0, 0);
    for left in &a.tensors {
        let is_linear = left.name.starts_with("blk.") && left.name.ends_with(".weight") && left.shape.len() == 2;
        if !is_linear {
            continue;
        }
        let right = b.tensor(&left.name).unwrap();
        assert_eq!((left.type_id, left.size), (right.type_id, right.size), "{}", left.name);
        let (from, other, size) = (left.offset as usize, right.offset as usize, left.size.unwrap() as usize);
        let pairs = a_bytes[from..from + size].iter().zip(&b_bytes[other..other + size]);
        same += pairs.filter(|(x, y)| x == y).count();
        all += size;
    }
    assert!(all > 100_000, "{all} bytes compared");
    same as f64 / all as f64
}

#[test]
fn llama_quantize_takes_the_importance_matrix() {
    let Some(runtime_dir) = runtime_dir() else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let convert = |arguments: &[&str], output: &Path| {
        let pairs = root().join("demo/calib/pairs.json");
        let mut program = Command::new(env!("CARGO_BIN_EXE_mbq-convert"));
        program.args(arguments).arg(root().join("demo/model")).arg("-o").arg(output);
        if arguments.contains(&"balanced") {
            program.arg("--calib").arg(pairs).args(["--samples", "8"]);
        }
        run(program.arg("--quiet"));
    };
    convert(&["--method", "rtn", "--type", "f32"], &file("exact.gguf"));
    convert(&["imatrix", "--imatrix", "balanced"], &file("balanced.gguf"));
    let left = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.contains("progress")).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    convert(&["--method", "rtn", "--type", "q3_k_s", "--imatrix", "balanced"], &file("ours.gguf"));
    convert(&["--method", "rtn", "--type", "q3_k_s"], &file("plain.gguf"));
    let tool = runtime::tool(&runtime_dir, "llama-quantize").unwrap();
    let mut quantize = Command::new(tool);
    quantize.arg("--imatrix").arg(file("balanced.gguf")).arg(file("exact.gguf")).arg(file("theirs.gguf"));
    run(quantize.arg("Q3_K_S"));
    // The file's sums are means times tokens, divided again: the last bit of an importance may differ, and with it,
    // rarely, a code.
    let same = equal_share(&file("ours.gguf"), &file("theirs.gguf"));
    assert!(same > 0.999, "{same}");
    // Read back, the file does what gathering did.
    let from_file = file("balanced.gguf");
    convert(&["--method", "rtn", "--type", "q3_k_s", "--imatrix", from_file.to_str().unwrap()], &file("again.gguf"));
    let again = equal_share(&file("ours.gguf"), &file("again.gguf"));
    assert!(again > 0.999, "{again}");
    let plain = equal_share(&file("ours.gguf"), &file("plain.gguf"));
    assert!(plain < 0.9, "the matrix changes nothing: {plain} of the bytes are those without it");
    assert_eq!(std::fs::read(file("balanced.gguf")).unwrap(), std::fs::read(file("ours.imatrix.gguf")).unwrap());
    let names = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = names.filter(|name| name.contains("progress")).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}
