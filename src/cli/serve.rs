//! `mbq-convert serve MODEL.gguf`
use anyhow::{Context, Result, bail};
use mbq_convert::runtime::engine::Compute;
use mbq_convert::runtime::{self, RuntimeError};
use mbq_convert::serve::{Server, Setup};
use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Answers over OpenAI's protocol (http://127.0.0.1:8080/v1) and on a page in the browser.
#[derive(clap::Args)]
pub struct Args {
    /// The language model's GGUF file
    model: PathBuf,
    /// The vision file [default: the mmproj*.gguf beside the model; without one, text alone]
    #[arg(long, value_name = "FILE")]
    mmproj: Option<PathBuf>,
    /// Address to listen on; 0.0.0.0 for all of this machine's
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on [default: 8080, or the next free one]
    #[arg(long, value_name = "N")]
    port: Option<u16>,
    /// Key that requests must show (`Authorization: Bearer KEY`)
    #[arg(long, value_name = "KEY", env = "MBQ_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Another name that browsers may call this machine by; may be given several times
    #[arg(long, value_name = "NAME")]
    allow_host: Vec<String>,
    /// Folder whose pictures requests may name by path or file:// URL
    #[arg(long, value_name = "DIR")]
    allow_files: Option<PathBuf>,
    /// Tokens of a conversation, prompt and answer [default: what the model and the memory allow, 32768 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(256..=1 << 24))]
    context: Option<u32>,
    /// Answers that are written at the same time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    slots: u32,
    /// Requests that may wait for a slot [default: 4 for each slot]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1 << 16))]
    queue: Option<u32>,
    /// Memory for pictures that were looked at before
    #[arg(long, value_name = "BYTES", default_value = "512M", value_parser = bytes)]
    picture_cache: usize,
    /// Longest body of a request
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = bytes)]
    max_body: usize,
    /// Seconds that a request may take, waiting included
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// CPU threads [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=1024))]
    threads: Option<i32>,
    /// Layers on the GPU [default: all, if the runtime has one]
    #[arg(long, value_name = "N", default_value_t = -1, allow_hyphen_values = true)]
    gpu_layers: i32,
    /// The GPU to run on, by ggml's name of it: Vulkan0, CUDA0 [default: llama.cpp's choice]
    #[arg(long, value_name = "NAME")]
    device: Option<String>,
    /// Do not open the page in the browser
    #[arg(long)]
    no_browser: bool,
}

fn bytes(text: &str) -> Result<usize, String> {
    if text == "0" { Ok(0) } else { super::size(text, 1 << 10) }
}

pub fn run(args: Args, common: &super::Common) -> Result<()> {
    let no_browser = args.no_browser;
    let setup = setup(args, common)?;
    if !setup.host.is_loopback() && setup.api_key.is_none() {
        eprintln!("warning: whoever reaches {} can use this server; --api-key KEY asks for a key", setup.host);
    }
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = tokio.as_ref().map(|tokio| tokio.block_on(serve(setup, common.quiet, no_browser)));
    match result {
        Ok(result) => result,
        Err(error) => bail!("no threads for the server: {error}"),
    }
}

async fn serve(setup: Setup, quiet: bool, no_browser: bool) -> Result<()> {
    let open = setup.api_key.is_none();
    let (model, slots, vision) = (setup.model.clone(), setup.slots, setup.mmproj.is_some());
    let server = Server::start(setup).await?;
    let mut address = server.address()?;
    if address.ip().is_unspecified() {
        address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
    }
    let url = format!("http://{address}");
    // Whoever started it may not listen any more.
    let _ = writeln!(std::io::stdout(), "{url}");
    if !quiet {
        let sees = if vision { "" } else { ", text alone (no mmproj beside it)" };
        let key = if open { "" } else { ", with the API key" };
        let _ = writeln!(
            std::io::stderr(),
            "{}{sees}: {slots} slots of {} tokens; OpenAI's protocol at {url}/v1{key}; Ctrl-C ends it",
            model.display(),
            server.card().context
        );
    }
    if !no_browser {
        open_browser(&url);
    }
    Ok(server
        .run(async {
            super::interrupt::signal().await;
        })
        .await?)
}

fn setup(args: Args, common: &super::Common) -> Result<Setup> {
    super::are_files(&args.model, args.mmproj.as_deref())?;
    if let Some(dir) = args.allow_files.as_deref().filter(|dir| !dir.is_dir()) {
        let problem =
            if dir.exists() { "is no folder; name the one that the pictures lie in" } else { "no such folder" };
        bail!("--allow-files {}: {problem}", dir.display());
    }
    if args.api_key.as_deref().is_some_and(|key| key.trim().is_empty()) {
        bail!("the API key is empty");
    }
    let mmproj = match args.mmproj {
        Some(mmproj) => Some(mmproj),
        None => beside(&args.model)?,
    };
    let threads = || std::thread::available_parallelism().map_or(1, |n| n.get() as i32);
    let compute = Compute {
        threads: args.threads.unwrap_or_else(threads),
        gpu_layers: args.gpu_layers,
        batch: 512,
        exact: false,
    };
    Ok(Setup {
        runtime: runtime::directory(common.runtime.as_deref())?,
        model: args.model,
        mmproj,
        compute,
        device: args.device,
        host: args.host,
        port: args.port,
        slots: args.slots,
        queue: args.queue.unwrap_or(4 * args.slots) as usize,
        context: args.context.map(|n| n as usize),
        picture_cache: args.picture_cache,
        body_limit: args.max_body,
        timeout: Duration::from_secs(args.timeout),
        api_key: args.api_key,
        names: args.allow_host,
        files: args.allow_files,
        log: !common.quiet,
    })
}

/// The vision file beside the model; none where there is none.
fn beside(model: &Path) -> Result<Option<PathBuf>> {
    match runtime::find_mmproj(model) {
        Ok(found) => Ok(Some(found)),
        Err(RuntimeError::NoMmproj { .. }) => Ok(None),
        Err(error) => Err(error).context("which vision file the model's is, is not clear"),
    }
}

/// Opens the page where there is a screen; it is no loss where that fails.
fn open_browser(url: &str) {
    let screen =
        ["DISPLAY", "WAYLAND_DISPLAY"].iter().any(|name| std::env::var_os(name).is_some_and(|v| !v.is_empty()));
    let mut command = if cfg!(windows) {
        let mut command = Command::new("cmd");
        command.args(["/c", "start", ""]);
        command
    } else if cfg!(target_os = "macos") {
        Command::new("open")
    } else if screen {
        Command::new("xdg-open")
    } else {
        return;
    };
    let _ = command.arg(url).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
}
