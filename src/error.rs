use std::path::PathBuf;

/// Any error of this library, each naming its file, tensor or field.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::CheckpointError),
    #[error(transparent)]
    Front(#[from] crate::front::FrontError),
    #[error(transparent)]
    Config(#[from] crate::front::ConfigError),
    #[error(transparent)]
    Text(#[from] crate::text::TextError),
    #[error(transparent)]
    Image(#[from] crate::image::ImageError),
    #[error(transparent)]
    Gguf(#[from] crate::gguf::GgufError),
    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),
    #[error(transparent)]
    Fold(#[from] crate::quant::fold::FoldError),
    #[error(transparent)]
    Mbq3(#[from] crate::quant::mbq3::Mbq3Error),
    #[error(transparent)]
    Prompt(#[from] crate::prompt::PromptError),
    #[error(transparent)]
    Engine(#[from] crate::runtime::engine::EngineError),
    #[error(transparent)]
    Runtime(#[from] crate::runtime::RuntimeError),
    #[error("tensor arithmetic: {0}")]
    Candle(#[from] candle_core::Error),
    #[error(transparent)]
    Calibrate(#[from] crate::calibrate::CalibrateError),
}

/// Why the files of a converted model cannot be described or published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelFileError {
    #[error(transparent)]
    Unreadable(#[from] crate::gguf::ReadError),
    #[error(transparent)]
    Record(#[from] crate::record::RecordError),
    #[error(transparent)]
    Runtime(#[from] crate::runtime::RuntimeError),
    #[error(transparent)]
    Pair(#[from] crate::gguf::GgufError),
    #[error("{path}: {problem}")]
    Unfit { path: PathBuf, problem: String },
    #[error("{path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
}

/// What to do about a place that cannot be written, to follow the error's text.
pub(crate) fn advice(error: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::*;
    match error.kind() {
        StorageFull | QuotaExceeded | FileTooLarge => "; make room there, or name another place",
        PermissionDenied | ReadOnlyFilesystem => "; name a place that may be written",
        InvalidFilename => "; take a shorter name",
        _ => "",
    }
}

impl ModelFileError {
    pub(crate) fn unfit(path: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        ModelFileError::Unfit { path: path.into(), problem: problem.into() }
    }
}
