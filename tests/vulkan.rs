//! MBQ3 on Vulkan: every operation against float64, and answers about pictures, on whatever device there is: a GPU, or
//! lavapipe, Mesa's Vulkan on the processor.
//!
//! A runtime built with feature `vulkan` has the backend; for another one it is built here from the same tree, which takes
//! some minutes the first time. glslc, Vulkan's and SPIR-V's headers and a Vulkan driver are needed, or the tests are skipped.
#![cfg(target_os = "linux")]
mod common;

use common::{convert, root, runtime_dir};
use mbq_convert::runtime;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// A runtime with the backend, and the device to run on.
struct Vulkan {
    dir: PathBuf,
    device: String,
    /// ggml takes a device that is a processor only if it is named.
    visible: bool,
    /// Whether the device is lavapipe.
    lavapipe: bool,
}

impl Vulkan {
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        if self.visible {
            command.env("GGML_VK_VISIBLE_DEVICES", "0");
        }
        command
    }

    /// Output of a command. Lavapipe of Mesa 22.3 (Debian 12) corrupts its own memory now and then, stock types' products too: a run
    /// there that a signal ended is repeated; one that failed or answered wrongly is not.
    fn output(&self, command: &mut Command) -> Output {
        let mut output = command.output().unwrap();
        for _ in 0..3 {
            let by_signal = output.status.signal().is_some()
                || String::from_utf8_lossy(&output.stderr).contains("llama-mtmd-cli crashed");
            if !(self.lavapipe && by_signal) {
                break;
            }
            eprintln!("lavapipe: {}, once more", output.status);
            output = command.output().unwrap();
        }
        output
    }
}

fn vulkan() -> Option<&'static Vulkan> {
    static FOUND: OnceLock<Option<Vulkan>> = OnceLock::new();
    FOUND.get_or_init(|| find().map_err(|why| eprintln!("skipped: {why}")).ok()).as_ref()
}

/// The runtime with backend and test program in a folder of this package's target, or why there is none.
fn find() -> Result<Vulkan, String> {
    let source = runtime_dir().ok_or("there is no runtime")?;
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vulkan-runtime");
    std::fs::create_dir_all(&dir).unwrap();
    for file in std::fs::read_dir(&source).unwrap().map(|file| file.unwrap()) {
        std::fs::copy(file.path(), dir.join(file.file_name())).unwrap();
    }
    let library = runtime::library_file("ggml-vulkan");
    if !source.join(&library).is_file() {
        std::fs::copy(build(&library)?, dir.join(&library)).unwrap();
    }
    let tree = Path::new(env!("OUT_DIR")).join("llama.cpp");
    run(Command::new("c++")
        .args(["-O2", "-std=c++17", "-pthread", "-o"])
        .arg(dir.join("mbq3_ops"))
        .arg(root().join("tests/kernels/mbq3_ops.cpp"))
        .arg(format!("-I{}", tree.join("ggml/include").display()))
        .arg(format!("-L{}", dir.display()))
        .args(["-lggml", "-lggml-base", "-Wl,-rpath,$ORIGIN"]));
    for visible in [false, true] {
        let mut vulkan = Vulkan { dir: dir.clone(), device: String::new(), visible, lavapipe: false };
        let listed = vulkan.command(&dir.join("mbq3_ops")).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stderr).into_owned();
        let mut devices = listed.lines().filter_map(|line| line.strip_prefix("  "));
        if let Some(device) = devices.find(|device| device.starts_with("Vulkan")) {
            vulkan.device = device.split(' ').next().unwrap_or_default().to_owned();
            vulkan.lavapipe = device.contains("llvmpipe");
            eprintln!("{listed}");
            return Ok(vulkan);
        }
    }
    Err("no Vulkan device (Debian, Ubuntu: apt-get install mesa-vulkan-drivers)".into())
}

/// Builds the backend from the patched tree.
fn build(library: &str) -> Result<PathBuf, String> {
    let headers = ["/usr/include/vulkan/vulkan.hpp", "/usr/include/spirv/unified1/spirv.hpp"];
    let glslc = Command::new("glslc").arg("--version").output().is_ok();
    if std::env::var_os("VULKAN_SDK").is_none() && !(glslc && headers.iter().all(|path| Path::new(path).is_file())) {
        return Err(
            "no Vulkan to build with (Debian, Ubuntu: apt-get install glslc libvulkan-dev spirv-headers)".into()
        );
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vulkan-build");
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(Path::new(env!("OUT_DIR")).join("llama.cpp")).arg("-B").arg(&folder);
    if Command::new("ninja").arg("--version").output().is_ok() {
        configure.args(["-G", "Ninja"]);
    }
    for setting in ["TESTS", "EXAMPLES", "APP", "UI", "SERVER", "TOOLS", "COMMON"] {
        configure.arg(format!("-DLLAMA_BUILD_{setting}=OFF"));
    }
    run(configure.args([
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        "-DGGML_NATIVE=OFF", // loadable backends are not for one processor
        "-DGGML_BACKEND_DL=ON",
        "-DGGML_VULKAN=ON",
        "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON",
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
        "-DCMAKE_INSTALL_RPATH=$ORIGIN",
    ]));
    let jobs = std::thread::available_parallelism().map_or(2, |n| n.get()).to_string();
    run(Command::new("cmake").arg("--build").arg(&folder).args(["--target", "ggml-vulkan", "--parallel", &jobs]));
    Ok(folder.join("bin").join(library))
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&text));
}

/// What the paths of a device give: with 16-bit floats and integer products where it has them, and without.
#[test]
fn operations_agree_with_double_precision() {
    let Some(vulkan) = vulkan() else { return };
    for without in [None, Some("GGML_VK_DISABLE_INTEGER_DOT_PRODUCT"), Some("GGML_VK_DISABLE_F16")] {
        let mut command = vulkan.command(&vulkan.dir.join("mbq3_ops"));
        command.args([&vulkan.device, "quick"]).envs(without.map(|name| (name, "1")));
        let output = vulkan.output(&mut command);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{without:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains(" tests, 0 failed"), "{without:?}: {text}");
    }
}

#[test]
fn the_demo_model_answers() {
    let Some(vulkan) = vulkan() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = convert(&root().join("demo/model"), "mbq3", folder.path());
    let ask = |device: &str| {
        let mut command = vulkan.command(Path::new(env!("CARGO_BIN_EXE_mbq-convert")));
        command.arg("chat").arg(&model).arg("--image").arg(root().join("demo/pictures/red-star.png"));
        command.args(["-p", "What is in the picture?", "--device", device, "--runtime"]).arg(&vulkan.dir);
        vulkan.output(command.args(["--", "--temp", "0", "-c", "1024", "-n", "32"]))
    };
    let output = ask(&vulkan.device);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "a red star");
    assert!(!ask("Vulkan9").status.success(), "the name of the device is not looked at");
}

#[test]
fn a_device_that_is_not_there_is_refused_by_name() {
    let Some(dir) = runtime_dir() else { return };
    let folder = tempfile::tempdir().unwrap();
    let model = convert(&root().join("demo/model"), "mbq3", folder.path());
    let output = Command::new(env!("CARGO_BIN_EXE_mbq-convert"))
        .arg("serve")
        .arg(&model)
        .args(["--device", "Vulkan9", "--no-browser", "--port", "0", "--runtime"])
        .arg(&dir)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("finds no device Vulkan9, but: "), "{error}");
}
