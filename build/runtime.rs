//! Builds llama.cpp's libraries and tools from the patched tree (feature `runtime`) and packs them.
//!
//! `runtime.zip`: shared libraries and tools, side by side; each looks for libraries in its own folder, so
//! that the folder may be moved. `source.zip`: the patched tree, which plain cmake builds.
//!
//! Environment: `MBQ_PORTABLE=1` makes the CPU code choose its instructions at run time instead of
//! compiling for this machine; `MBQ_EMPTY_RUNTIME` packs nothing, for checks that only compile this package;
//! `MBQ_CMAKE_ARGS` are further arguments of the configuring cmake, split at white space, after all others;
//! `CMAKE_<LANG>_COMPILER_LAUNCHER` and `CUDAARCHS` mean what they mean to cmake.

use crate::Result;
use crate::source::write_if_changed;
use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The tools of an installed runtime.
const TOOLS: [&str; 7] = [
    "llama-mtmd-cli",
    "llama-bench",
    "llama-perplexity",
    "llama-quantize",
    "llama-imatrix",
    "llama-completion",
    "llama-gguf-split",
];

/// The step that fails where Vulkan's headers or glslc are missing.
const CONFIGURING_VULKAN: &str = "configuring Vulkan's backend";

/// What changes the result without being an input file.
const ENVIRONMENT: [&str; 16] = [
    "MBQ_EMPTY_RUNTIME",
    "MBQ_PORTABLE",
    "MBQ_CMAKE_ARGS",
    "CUDAARCHS",
    "CUDA_HOME",
    "CUDACXX",
    "CUDAFLAGS",
    "CC",
    "CXX",
    "CFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
    "CMAKE_GENERATOR",
    "CMAKE_C_COMPILER_LAUNCHER",
    "CMAKE_CXX_COMPILER_LAUNCHER",
    "CMAKE_CUDA_COMPILER_LAUNCHER",
];

/// Configures, builds and packs; what is up to date is left alone.
pub fn build(manifest_dir: &Path, tree: &Path, out_dir: &Path) -> Result<()> {
    for name in ENVIRONMENT {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let instructions = manifest_dir.join("vendor/BUILD.md");
    println!("cargo::rerun-if-changed={}", instructions.display());
    pack_source(tree, instructions, &out_dir.join("source.zip"))?;

    if std::env::var_os("MBQ_EMPTY_RUNTIME").is_some() {
        return pack(Vec::new(), &out_dir.join("runtime.zip"));
    }
    let folder = out_dir.join("llama.cpp-build");
    let server = has_server(tree);
    let mut arguments = arguments(tree, &folder, server);
    if std::env::var_os("MBQ_LLAMA_CPP_DIR").is_none_or(|dir| dir.is_empty()) {
        // Which sources may be compiled together is known of the pinned ones.
        let settings = manifest_dir.join("build/llama.cmake");
        arguments.push(format!("-DCMAKE_PROJECT_llama.cpp_INCLUDE={}", settings.display()));
    }
    // The last setting of a name holds: these override the ones above.
    arguments.extend(std::env::var("MBQ_CMAKE_ARGS").unwrap_or_default().split_whitespace().map(String::from));
    let stamp = folder.join("mbq-arguments.txt");
    let wanted = format!("{arguments:?} {:?}", ENVIRONMENT.map(std::env::var_os));
    if fs::read_to_string(&stamp).is_ok_and(|old| old != wanted) {
        // cmake keeps compilers and launchers of the first configuration.
        fs::remove_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    }
    fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    require_cmake()?;
    run(Command::new("cmake").args(&arguments), "configuring llama.cpp")?;
    write_if_changed(&stamp, wanted.as_bytes())?;

    let targets: Vec<_> = TOOLS.into_iter().chain(server.then_some("llama-server")).collect();
    build_targets(&folder, &targets, "building llama.cpp")?;
    let mut files = runtime_files(&folder, server)?;
    if std::env::var_os("CARGO_FEATURE_VULKAN").is_some() {
        files.push(build_vulkan(&arguments, &out_dir.join("llama.cpp-vulkan"))?);
    }
    pack(files, &out_dir.join("runtime.zip"))
}

/// Builds targets of a folder that cmake configured.
fn build_targets(folder: &Path, targets: &[&str], what: &str) -> Result<()> {
    let mut command = Command::new("cmake");
    command.arg("--build").arg(folder).args(["--config", "Release", "--parallel"]);
    command.arg(std::env::var("NUM_JOBS").unwrap_or_else(|_| "2".into()));
    run(command.arg("--target").args(targets), what)
}

/// Where a build leaves libraries and tools.
fn bin(folder: &Path) -> Result<PathBuf> {
    [folder.join("bin/Release"), folder.join("bin")]
        .into_iter()
        .find(|path| path.is_dir())
        .ok_or_else(|| format!("{}: the build left no bin folder", folder.display()))
}

/// Builds Vulkan's backend, a library that ggml loads where the system has Vulkan; the others need no such system. ggml makes
/// loadable backends only in builds that are not for one processor: this one has a folder of its own, and no other target.
fn build_vulkan(arguments: &[String], folder: &Path) -> Result<(String, PathBuf, u32)> {
    let mut configure = Command::new("cmake");
    configure.args(arguments).arg("-B").arg(folder);
    configure.args(["-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CUDA=OFF", "-DGGML_VULKAN=ON"]);
    run(&mut configure, CONFIGURING_VULKAN)?;
    build_targets(folder, &["ggml-vulkan"], "building Vulkan's backend")?;
    let (prefix, suffix) = (std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let name = format!("{prefix}ggml-vulkan{suffix}");
    let path = bin(folder)?.join(&name);
    Ok((name, path, 0o755))
}

/// Whether the tree holds llama-server: the pinned package does not, a full checkout does.
fn has_server(tree: &Path) -> bool {
    ["server/server-context.cpp", "cli/CMakeLists.txt", "ui/CMakeLists.txt"]
        .iter()
        .all(|file| tree.join("tools").join(file).is_file())
}

/// The arguments of the configuring cmake, but for the user's.
fn arguments(tree: &Path, folder: &Path, server: bool) -> Vec<String> {
    let portable = std::env::var("MBQ_PORTABLE").is_ok_and(|value| value == "1");
    let cuda = std::env::var_os("CARGO_FEATURE_CUDA").is_some();
    let target = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let mut arguments = vec!["-S".into(), tree.display().to_string(), "-B".into(), folder.display().to_string()];
    if std::env::var_os("CMAKE_GENERATOR").is_none() && starts("ninja") {
        arguments.extend(["-G".into(), "Ninja".into()]);
    }
    let switch = |on: bool| if on { "ON" } else { "OFF" };
    let mut set = |name: &str, value: &str| arguments.push(format!("-D{name}={value}"));
    set("CMAKE_BUILD_TYPE", "Release");
    set("BUILD_SHARED_LIBS", "ON");
    for name in ["TESTS", "EXAMPLES", "APP", "UI"] {
        set(&format!("LLAMA_BUILD_{name}"), "OFF");
    }
    for name in ["LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL", "LLAMA_CURL"] {
        set(name, "OFF");
    }
    set("LLAMA_BUILD_SERVER", switch(server));
    // Or cmake would report the version of whatever repository the tree lies in.
    set("LLAMA_BUILD_NUMBER", "0");
    set("LLAMA_BUILD_COMMIT", "mbq-convert");
    set("GIT_EXE", "OFF");
    // One file per library, found beside whoever asks for it.
    set("CMAKE_PLATFORM_NO_VERSIONED_SONAME", "ON");
    set("CMAKE_BUILD_WITH_INSTALL_RPATH", "ON");
    set("CMAKE_INSTALL_RPATH", if target == "macos" { "@loader_path" } else { "$ORIGIN" });
    if target == "linux" {
        // The driver's library comes with the driver: the machine that builds may have none.
        set("CMAKE_EXE_LINKER_FLAGS", if cuda { "-s -Wl,--allow-shlib-undefined" } else { "-s" });
        for kind in ["SHARED", "MODULE"] {
            set(&format!("CMAKE_{kind}_LINKER_FLAGS"), "-s");
        }
    }
    set("GGML_NATIVE", switch(!portable));
    if portable {
        set("GGML_BACKEND_DL", "ON");
        set("GGML_CPU_ALL_VARIANTS", "ON");
        // libgomp comes with the compiler: a machine without one may lack it. ggml has its own threads.
        set("GGML_OPENMP", "OFF");
    }
    if cuda {
        set("GGML_CUDA", "ON");
        set("GGML_CUDA_NCCL", "OFF");
        if let Ok(architectures) = std::env::var("CUDAARCHS") {
            set("CMAKE_CUDA_ARCHITECTURES", &architectures);
        }
    }
    arguments
}

/// Whether `program --version` runs.
fn starts(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn require_cmake() -> Result<()> {
    if starts("cmake") {
        return Ok(());
    }
    Err("cmake is needed to build llama.cpp and was not found (Debian, Ubuntu: apt-get install cmake ninja-build build-essential). \
         `--no-default-features` builds the converter alone, without the runtime"
        .into())
}

/// Runs a command; its output goes to cargo's log of this script, the end of it into the error.
fn run(command: &mut Command, what: &str) -> Result<()> {
    const KEPT: usize = 40;
    // The variables that cargo sets for a build script mean other things to cmake's compilers.
    command.env_remove("TARGET").env_remove("HOST").env_remove("OPT_LEVEL").env_remove("DEBUG");
    let (reader, writer) = std::io::pipe().map_err(|e| format!("{what}: {e}"))?;
    let errors = writer.try_clone().map_err(|e| format!("{what}: {e}"))?;
    command.stdin(Stdio::null()).stdout(writer).stderr(errors);
    let mut child = command.spawn().map_err(|e| format!("{what}: {command:?} does not start: {e}"))?;
    // The command still holds the pipe's writing ends; the loop below ends when all are closed.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut last = VecDeque::with_capacity(KEPT + 1);
    for line in BufReader::new(reader).split(b'\n').map_while(std::result::Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        println!("{}", line.strip_prefix("cargo:").unwrap_or(&line));
        last.push_back(line);
        if last.len() > KEPT {
            last.pop_front();
        }
    }
    let status = child.wait().map_err(|e| format!("{what}: {e}"))?;
    if status.success() {
        return Ok(());
    }
    let tail = Vec::from(last).join("\n");
    let hint = if tail.contains("No CMAKE_CXX_COMPILER could be found") || tail.contains("No CMAKE_C_COMPILER") {
        "\nA C++ compiler is needed (Debian, Ubuntu: apt-get install build-essential)"
    } else if tail.contains("CMAKE_MAKE_PROGRAM") {
        "\nNinja or make is needed (Debian, Ubuntu: apt-get install ninja-build)"
    } else if what == CONFIGURING_VULKAN {
        "\nFeature vulkan needs glslc and the headers of Vulkan and SPIR-V (Debian, Ubuntu: apt-get install glslc libvulkan-dev \
         spirv-headers)"
    } else {
        ""
    };
    Err(format!("{what} failed ({status}){hint}\n{tail}"))
}

/// Libraries and tools: name, file, permissions.
fn runtime_files(folder: &Path, server: bool) -> Result<Vec<(String, PathBuf, u32)>> {
    let bin = bin(folder)?;
    let mut names = Vec::new();
    for entry in fs::read_dir(&bin).map_err(|e| format!("{}: {e}", bin.display()))? {
        let name = entry.map_err(|e| format!("{}: {e}", bin.display()))?.file_name();
        let name = name.to_string_lossy().into_owned();
        let stem = name.strip_suffix(".exe").unwrap_or(&name);
        let is_library = [".so", ".dylib", ".dll"].iter().any(|end| name.ends_with(end));
        let is_tool = TOOLS.contains(&stem) || (server && stem == "llama-server");
        if is_library || is_tool {
            names.push((name.clone(), bin.join(&name), 0o755));
        }
    }
    Ok(names)
}

/// Packs the patched tree and how to build it.
fn pack_source(tree: &Path, instructions: PathBuf, zip: &Path) -> Result<()> {
    let mut entries: Vec<_> = crate::source::list_all(tree)?
        .into_iter()
        .map(|relative| {
            let name = relative.to_string_lossy().replace('\\', "/");
            (name, tree.join(&relative), 0o644)
        })
        .collect();
    entries.push(("BUILD.md".into(), instructions, 0o644));
    pack(entries, zip)
}

/// Writes a zip of (name, file, permissions), the same bytes for the same content.
fn pack(mut entries: Vec<(String, PathBuf, u32)>, zip: &Path) -> Result<()> {
    let fail = |e: &dyn std::fmt::Display| format!("{}: {e}", zip.display());
    entries.sort();
    let part = zip.with_extension("part");
    let mut writer = zip::ZipWriter::new(fs::File::create(&part).map_err(|e| fail(&e))?);
    for (name, path, permissions) in entries {
        let content = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated)
            .last_modified_time(zip::DateTime::default())
            .unix_permissions(permissions);
        writer.start_file(name, options).map_err(|e| fail(&e))?;
        writer.write_all(&content).map_err(|e| fail(&e))?;
    }
    writer.finish().map_err(|e| fail(&e))?;
    fs::rename(&part, zip).map_err(|e| fail(&e))
}
