//! `mbq-convert chat MODEL.gguf --image PICTURE -p QUESTION`
use anyhow::{Context, Result, bail};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};
use mbq_convert::gguf::{GgufFile, check_pair};
use mbq_convert::image::load_rgb;
use mbq_convert::prompt;
use mbq_convert::runtime::{self, assumed};
use std::ffi::{OsStr, OsString};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(clap::Args)]
pub struct Args {
    /// The language model's GGUF file
    model: PathBuf,
    /// A picture to ask about; may be given several times
    #[arg(long, value_name = "FILE", allow_hyphen_values = true)]
    image: Vec<PathBuf>,
    /// The question; without one and without a picture a conversation begins
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// The vision file [default: the mmproj*.gguf beside the model]
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// The GPU to run on, by ggml's name of it: Vulkan0, CUDA0 [default: llama.cpp's choice]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Show what llama.cpp logs
    #[arg(short, long)]
    verbose: bool,
    /// More arguments for llama-mtmd-cli, after --
    #[arg(last = true, value_name = "ARGUMENT")]
    more: Vec<OsString>,
}

pub fn run(args: Args, common: &super::Common) -> Result<()> {
    super::are_files(&args.model, args.mmproj.as_deref())?;
    let pictures = args.image.iter().map(|path| PictureArg::of(path)).collect::<Result<Vec<_>>>()?;
    let mmproj = args.mmproj.map_or_else(|| runtime::find_mmproj(&args.model), Ok)?;
    // llama.cpp would say less of a file that is cut off or of a shard that is missing.
    let (model, vision) = (GgufFile::open(&args.model)?, GgufFile::open(&mmproj)?);
    if model.is_projector() {
        bail!("{}: a vision file (mmproj), not a language model", args.model.display());
    }
    if !vision.is_projector() {
        bail!("{}: no vision file (mmproj); --mmproj names it", mmproj.display());
    }
    check_pair(&model, &vision)?;
    let given = args.more.iter().any(|word| word.to_string_lossy().starts_with("--chat-template"));
    if !given {
        const GIVE: &str = "-- --chat-template NAME, or --chat-template-file FILE";
        let path = args.model.display();
        let Some(template) = model.metadata.str("tokenizer.chat_template") else {
            bail!("{path}: has no chat template; give one: {GIVE}");
        };
        if let Err(problem) = prompt::gguf::check(template) {
            bail!("{path}: {problem}; give another: {GIVE}");
        }
    }
    assumed::check(&model)?;
    assumed::check(&vision)?;
    let tool = runtime::tool(&runtime::directory(common.runtime.as_deref())?, "llama-mtmd-cli")?;

    let mut command = Command::new(&tool);
    command.arg("-m").arg(&args.model).arg("--mmproj").arg(&mmproj);
    // The model's own chat template: llama-mtmd-cli would write ChatML of its own, with other tokens than the model's.
    command.arg("--jinja");
    if !pictures.is_empty() {
        // One list with commas: it warns where the option comes twice.
        let paths: Vec<_> = pictures.iter().map(|p| p.path.as_os_str()).collect();
        command.arg("--image").arg(paths.join(OsStr::new(",")));
    }
    // llama-mtmd-cli answers one question when it has one, and else asks for input.
    let prompt = args.prompt.or_else(|| (!args.image.is_empty()).then(|| "Describe this picture.".into()));
    if let Some(prompt) = prompt {
        command.arg("-p").arg(prompt);
    }
    if let Some(device) = args.device {
        command.arg("--device").arg(device); // of the vision file, too
    }
    if !args.verbose {
        command.args(["--verbosity", "1"]);
    }
    // Where ggml gives up, it would start a debugger.
    command.env("GGML_NO_BACKTRACE", "1").args(args.more);
    ends_with_us(&mut command);
    let status = command.status().with_context(|| format!("{} does not start", tool.display()))?;
    let on = format!("on {} with {}", args.model.display(), vision.path.display());
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => bail!("llama-mtmd-cli failed with status {code} {on}; --verbose shows its log"),
        None => bail!("llama-mtmd-cli crashed {on}; `mbq-convert inspect --verify` checks a file"),
    }
}

/// Has the tool end when this program is ended.
fn ends_with_us(command: &mut Command) {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::process::CommandExt;
        // SAFETY: one system call, which may be made between fork and exec.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM as libc::c_ulong) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = command;
}

/// A picture as our loader reads it, upright and in a form and under a name that llama-mtmd-cli takes, which splits
/// names at commas and knows fewer formats.
struct PictureArg {
    /// On Unix the file has no name of its own, so that nothing is left behind however the program ends.
    path: PathBuf,
    #[cfg(unix)]
    _file: std::fs::File,
    #[cfg(not(unix))]
    _file: tempfile::TempPath,
}

impl PictureArg {
    fn of(path: &Path) -> Result<Self> {
        let picture = load_rgb(path)?;
        let write = |file: &std::fs::File| -> Result<()> {
            let mut out = BufWriter::new(file);
            let encoder = PngEncoder::new_with_quality(&mut out, CompressionType::Fast, FilterType::Adaptive);
            let (width, height) = (picture.width as u32, picture.height as u32);
            encoder.write_image(&picture.data, width, height, ExtendedColorType::Rgb8)?;
            Ok(out.flush()?)
        };
        Self::kept(write).with_context(|| format!("{}: no temporary copy can be written", path.display()))
    }

    #[cfg(unix)]
    fn kept(write: impl Fn(&std::fs::File) -> Result<()>) -> Result<Self> {
        use std::io::Seek;
        use std::os::fd::AsRawFd;
        let mut file = tempfile::tempfile()?;
        write(&file)?;
        file.rewind()?;
        // The child inherits it.
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
        Ok(PictureArg { path: format!("/dev/fd/{}", file.as_raw_fd()).into(), _file: file })
    }

    #[cfg(not(unix))]
    fn kept(write: impl Fn(&std::fs::File) -> Result<()>) -> Result<Self> {
        let file = tempfile::NamedTempFile::new()?;
        write(file.as_file())?;
        let file = file.into_temp_path();
        Ok(PictureArg { path: file.to_path_buf(), _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tool_gets_what_the_loader_sees() {
        let photo = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pictures/load/exif6.jpg");
        let handed = PictureArg::of(&photo).unwrap();
        let bytes = std::fs::read(&handed.path).unwrap();
        let seen = mbq_convert::image::decode_rgb(&handed.path, &bytes).unwrap();
        assert_eq!((seen.width, seen.height), (13, 21), "upright");
        assert_eq!(seen, load_rgb(&photo).unwrap());
    }
}
