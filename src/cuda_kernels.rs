//! This program's own CUDA kernels as PTX, by the names of their sources (`build.rs`).
include!(concat!(env!("OUT_DIR"), "/cuda_kernels.rs"));
