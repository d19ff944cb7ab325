//! Builds the native parts: the pinned llama.cpp source is found, copied below OUT_DIR and patched;
//! ggml-base is compiled from it and linked in; with feature `runtime` llama.cpp's libraries and tools are
//! built too and packed for the program to carry.
//!
//! Environment: `MBQ_LLAMA_CPP_DIR` names another llama.cpp checkout to use; docs.rs builds nothing.

#[cfg(feature = "bindgen")]
#[path = "build/bindings.rs"]
mod bindings;
#[path = "build/ggml_base.rs"]
mod ggml_base;
#[cfg(feature = "runtime")]
#[path = "build/runtime.rs"]
mod runtime;
#[path = "build/source.rs"]
mod source;

use std::path::PathBuf;
use std::process::ExitCode;

/// What a step may fail with: a message for the person who builds.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    if std::env::var_os("DOCS_RS").is_some() {
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={}", message.replace('\n', " | "));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let manifest_dir = env_path("CARGO_MANIFEST_DIR")?;
    let out_dir = env_path("OUT_DIR")?;
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");

    let tree = out_dir.join("llama.cpp");
    source::prepare(&manifest_dir, &tree)?;
    ggml_base::build(&tree, &out_dir)?;
    #[cfg(feature = "cuda")]
    cuda_kernels(&out_dir)?;
    #[cfg(feature = "bindgen")]
    bindings::generate(&tree, &manifest_dir, &out_dir)?;
    #[cfg(feature = "runtime")]
    runtime::build(&manifest_dir, &tree, &out_dir)?;
    Ok(())
}

/// Calibration's own kernels, for the GPU that candle's are compiled for.
#[cfg(feature = "cuda")]
fn cuda_kernels(out_dir: &std::path::Path) -> Result<()> {
    let kernels = ["src/calibrate/feedback/mbq3_levels.cu", "src/text/ops/masked_softmax.cu"];
    kernels.iter().for_each(|kernel| println!("cargo::rerun-if-changed={kernel}"));
    let builder = cudaforge::KernelBuilder::new().source_files(kernels).args(["-std=c++17", "-O3"]);
    let made = builder.build_ptx().and_then(|ptx| ptx.write(out_dir.join("cuda_kernels.rs")));
    made.map_err(|e| format!("{}: {e}", kernels.join(", ")))
}

/// A path-valued variable that cargo sets for every build script.
fn env_path(name: &str) -> Result<PathBuf> {
    std::env::var_os(name)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{name} is not set: this program is a cargo build script"))
}
