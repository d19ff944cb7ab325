//! `mbq-convert serve`: a model behind OpenAI's protocol, and a page to talk to it.
//!
//! [`Server::start`] loads the model into a thread of its own (`model`, `scheduler`: slots, batches, caches) and listens;
//! [`Server::run`] answers requests (`http` has the addresses, `guard` who may ask, `request` what may be asked, `chat`
//! the way of a request, `answer` the forms of an answer). Between the two sides stand the messages of `job`.
mod answer;
mod answer_text;
mod card;
mod chat;
mod error;
mod fields;
pub(crate) mod guard;
mod http;
mod job;
mod model;
mod page;
pub(crate) mod pictures;
mod prompt;
pub(crate) mod request;
mod sampler;
mod scheduler;

pub use card::ModelCard;

use crate::gguf::{GgufError, ReadError};
use crate::runtime::engine::{Compute, EngineError};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// What to serve, and how.
#[derive(Debug, Clone)]
pub struct Setup {
    pub model: PathBuf,
    /// The model's own; none: text alone.
    pub mmproj: Option<PathBuf>,
    /// Directory of the installed runtime.
    pub runtime: PathBuf,
    pub compute: Compute,
    /// The device to run on, by ggml's name; none: llama.cpp chooses.
    pub device: Option<String>,
    pub host: IpAddr,
    /// None: the first free one from 8080 on.
    pub port: Option<u16>,
    /// Answers that are written at the same time.
    pub slots: u32,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// Tokens of a conversation; none: what the model and the memory allow, 32768 at most.
    pub context: Option<usize>,
    /// Bytes of embedded pictures that are kept.
    pub picture_cache: usize,
    /// Bytes of a request's body, at most.
    pub body_limit: usize,
    /// For a whole request.
    pub timeout: Duration,
    pub api_key: Option<String>,
    /// Names that the server may be called by, beside its address and `localhost`.
    pub names: Vec<String>,
    /// The folder whose pictures requests may name.
    pub files: Option<PathBuf>,
    /// A line for each request on standard error.
    pub log: bool,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Unreadable(#[from] ReadError),
    #[error(transparent)]
    Pair(#[from] GgufError),
    #[error("{0} is a vision file (mmproj); give the language model, it is found beside it")]
    IsProjector(PathBuf),
    #[error("{0} is no vision file (mmproj); --mmproj names it")]
    NotProjector(PathBuf),
    #[error("{0} has no chat template: there is no telling how a conversation is put to it")]
    NoTemplate(PathBuf),
    #[error("{0}: {1}")]
    Template(PathBuf, String),
    #[error("--context {wanted} is more than the {trained} tokens that the model was trained for")]
    Context { wanted: usize, trained: u64 },
    #[error("cannot listen on {address}: {source}")]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error("no thread for the model: {0}")]
    Thread(std::io::Error),
    #[error("the model's thread ended while it loaded")]
    Ended,
    #[error("the server failed: {0}")]
    Serve(std::io::Error),
}

/// Where it listens unless it is told to.
const PORT: u16 = 8080;
/// How many ports are tried from there on.
const PORTS: u16 = 20;
/// How long connections may take to end.
const GRACE: Duration = Duration::from_secs(5);
/// Requests whose pictures are decoded at the same time.
const DECODING: usize = 2;

/// A server that listens, its model loaded.
pub struct Server {
    listener: TcpListener,
    app: Arc<http::App>,
    model: JoinHandle<()>,
    /// Version of llama.cpp, and what it uses of the processor.
    pub runtime: String,
}

impl Server {
    /// Finds a port, then loads the model. Must be called within tokio.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn start(setup: Setup) -> Result<Self, ServeError> {
        let listener = listen(setup.host, setup.port).await?;
        let loaded = tokio::task::spawn_blocking(move || {
            let card = ModelCard::new(&setup)?;
            let thread = model::ModelThread::start(&setup, &card)?;
            Ok::<_, ServeError>((setup, card, thread))
        });
        let (setup, card, thread) = loaded.await.map_err(|_| ServeError::Ended)??;
        let app = http::App {
            card,
            guard: guard::Guard { address: setup.host, names: setup.names, key: setup.api_key },
            pictures: pictures::Pictures { files: setup.files, vision: setup.mmproj.is_some() },
            template: thread.template,
            jobs: thread.jobs,
            places: Arc::new(Semaphore::new(setup.slots as usize + setup.queue)),
            slots: Arc::new(Semaphore::new(setup.slots as usize)),
            decoding: Semaphore::new(DECODING),
            queue: setup.queue,
            body_limit: setup.body_limit,
            timeout: setup.timeout,
            log: setup.log,
        };
        Ok(Server { listener, app: Arc::new(app), model: thread.handle, runtime: thread.runtime })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn address(&self) -> Result<SocketAddr, ServeError> {
        self.listener.local_addr().map_err(ServeError::Serve)
    }

    /// The model.
    pub fn card(&self) -> &ModelCard {
        &self.app.card
    }

    /// Answers until `shutdown` is over; then ends what is being answered, and returns when that is said to all.
    ///
    /// # Errors
    /// The system takes the listener away.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<(), ServeError> {
        let Server { listener, app, model, .. } = self;
        let (slots, jobs) = (app.slots.clone(), app.jobs.clone());
        let (told, mut is_told) = tokio::sync::watch::channel(false);
        let until = async move {
            shutdown.await;
            // Whoever waits for a slot is told, too.
            slots.close();
            let _ = jobs.send(job::Message::Stop);
            let _ = told.send(true);
        };
        // Whoever holds a connection open without a word is not waited for.
        let late = async move {
            let _ = is_told.changed().await;
            tokio::time::sleep(GRACE).await;
        };
        let ended = tokio::select! {
            ended = axum::serve(listener, http::router(app)).with_graceful_shutdown(until) => ended,
            () = late => Ok(()),
        };
        // The runtime must not be taken from under a model that computes.
        let _ = tokio::task::spawn_blocking(move || model.join()).await;
        ended.map_err(ServeError::Serve)
    }
}

/// Listens on `port`, or where none is asked for on the first free one from the usual port on.
async fn listen(host: IpAddr, port: Option<u16>) -> Result<TcpListener, ServeError> {
    let (first, last) = port.map_or((PORT, PORT + PORTS), |port| (port, port));
    let mut at = first;
    loop {
        let address = SocketAddr::new(host, at);
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && at < last => at += 1,
            Err(source) => return Err(ServeError::Listen { address, source }),
        }
    }
}
