//! The CPU kernels of MBQ3 against double-precision references, one build per instruction set.
//!
//! The kernel file needs nothing of ggml's runtime, so each variant is compiled here with its own flags, together
//! with `tests/kernels/mbq3_kernels.c`, and run: natively where the CPU has the instructions, AArch64 under
//! qemu-user where a cross compiler and qemu are installed. What cannot run is still compiled, and named.
use std::path::{Path, PathBuf};
use std::process::Command;

struct Variant {
    /// what `mbq3_kernel_name` must say
    name: &'static str,
    flags: &'static [&'static str],
    runs: bool,
}

fn sources() -> (PathBuf, Vec<String>) {
    let tree = Path::new(env!("OUT_DIR")).join("llama.cpp/ggml");
    let kernel = tree.join("src/ggml-cpu/mbq3");
    let include =
        [&kernel, &tree.join("src"), &tree.join("include")].iter().map(|dir| format!("-I{}", dir.display())).collect();
    (kernel.join("mbq3-kernel.c"), include)
}

/// Compiles a variant, and runs it where `runner` (the program itself, or an emulator) can.
fn check(compiler: &str, runner: &[&str], variant: &Variant, extra: &[&str]) {
    let (kernel, include) = sources();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = folder.path().join(variant.name);
    let test = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels/mbq3_kernels.c");
    let output = Command::new(compiler)
        .args(["-O3", "-std=gnu11", "-Wall", "-Wextra", "-Werror"])
        .args(variant.flags)
        .args(extra)
        .args(&include)
        .args([&test, &kernel])
        .arg("-lm")
        .arg("-o")
        .arg(&program)
        .output()
        .expect("a C compiler");
    assert!(output.status.success(), "{}: {}", variant.name, String::from_utf8_lossy(&output.stderr));
    if !variant.runs {
        println!("{}: compiled only, this CPU cannot run it", variant.name);
        return;
    }
    let mut command: Vec<_> = runner.iter().map(AsRef::as_ref).collect();
    command.push(program.as_os_str());
    let output = Command::new(command[0]).args(&command[1..]).output().expect("the test program");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {text}", variant.name);
    assert_eq!(text.trim(), variant.name, "another variant was compiled");
    println!("{}: ok", variant.name);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn x86_variants_agree_with_double_precision() {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let vnni = avx2
        && ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"].iter().all(|feature| match *feature {
            "avx512f" => is_x86_feature_detected!("avx512f"),
            "avx512bw" => is_x86_feature_detected!("avx512bw"),
            "avx512dq" => is_x86_feature_detected!("avx512dq"),
            "avx512vl" => is_x86_feature_detected!("avx512vl"),
            _ => is_x86_feature_detected!("avx512vnni"),
        });
    let variants = [
        Variant { name: "portable", flags: &[], runs: true },
        Variant { name: "avx2", flags: &["-mavx2", "-mfma", "-mf16c"], runs: avx2 },
        Variant {
            name: "avxvnni",
            flags: &["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
            runs: avx2 && is_x86_feature_detected!("avxvnni"),
        },
        Variant {
            name: "avx512vnni",
            flags: &[
                "-mavx2",
                "-mfma",
                "-mf16c",
                "-mavx512f",
                "-mavx512bw",
                "-mavx512dq",
                "-mavx512vl",
                "-mavx512vnni",
            ],
            runs: vnni,
        },
    ];
    for variant in &variants {
        check("cc", &[], variant, &[]);
    }
}

#[test]
fn neon_variants_agree_with_double_precision() {
    let here = cfg!(target_arch = "aarch64");
    let compiler = if here { "cc" } else { "aarch64-linux-gnu-gcc" };
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !has(compiler) || !(here || has("qemu-aarch64")) {
        println!("skipped: needs {compiler} and qemu-aarch64 (gcc-aarch64-linux-gnu, qemu-user)");
        return;
    }
    let runner: &[&str] = if here { &[] } else { &["qemu-aarch64", "-cpu", "max"] };
    for variant in [
        Variant { name: "neon", flags: &["-march=armv8-a"], runs: true },
        Variant { name: "neon-dotprod", flags: &["-march=armv8.2-a+dotprod"], runs: true },
    ] {
        check(compiler, runner, &variant, &["-static"]);
    }
}
