//! The thread that the model lives in: its start, and what it says of itself.
use super::job::Message;
use super::prompt::PictureCache;
use super::scheduler::{Scheduler, Slot};
use super::{ModelCard, ServeError, Setup};
use crate::prompt::ChatTemplate;
use crate::runtime::engine::{Model, Runtime, Sequences, Vision};
use std::collections::VecDeque;
use std::thread::JoinHandle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;

/// A model that waits for jobs.
pub struct ModelThread {
    pub jobs: UnboundedSender<Message>,
    pub template: ChatTemplate,
    pub runtime: String,
    pub handle: JoinHandle<()>,
}

/// What the thread tells when it is ready.
type Ready = Result<(ChatTemplate, String), ServeError>;

impl ModelThread {
    /// Loads the model in a thread of its own; waits until it can answer.
    ///
    /// # Errors
    /// What the runtime refuses; a model without a usable chat template.
    pub fn start(setup: &Setup, card: &ModelCard) -> Result<Self, ServeError> {
        let (jobs, inbox) = unbounded_channel();
        let (ready, is_ready) = oneshot::channel();
        let setup = setup.clone();
        let (context, leading_space) = (card.context, card.leading_space);
        let work = move || work(&setup, (context, leading_space), inbox, ready);
        let handle = std::thread::Builder::new().name("model".into()).spawn(work).map_err(ServeError::Thread)?;
        let (template, runtime) = is_ready.blocking_recv().map_err(|_| ServeError::Ended)??;
        Ok(ModelThread { jobs, template, runtime, handle })
    }
}

fn work(
    setup: &Setup,
    (context, leading_space): (usize, bool),
    inbox: UnboundedReceiver<Message>,
    ready: oneshot::Sender<Ready>,
) {
    let loaded = load(setup, context);
    let (vision, sequences, template, runtime) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let model = sequences.model();
    let longest_token = (0..model.vocab_size()).map(|token| model.bytes(token as i32).len()).max().unwrap_or(1);
    if ready.send(Ok((template, runtime))).is_err() {
        return;
    }
    let slots = (0..setup.slots).map(|_| Slot::default()).collect();
    let scheduler = Scheduler {
        sequences,
        vision: vision.as_ref(),
        inbox,
        pictures: PictureCache::new(setup.picture_cache),
        slots,
        context,
        batch: setup.compute.batch as usize,
        longest_token,
        leading_space,
        waiting: VecDeque::new(),
        clock: 0,
    };
    scheduler.run();
}

type Loaded = (Option<Vision>, Sequences, ChatTemplate, String);

fn load(setup: &Setup, context: usize) -> Result<Loaded, ServeError> {
    let runtime = Runtime::open_on(&setup.runtime, setup.device.as_deref())?;
    let vision = match &setup.mmproj {
        // Its own copy of the vocabulary, without weights.
        Some(mmproj) => {
            let vocabulary = Model::load(&runtime, &setup.model, setup.compute, false)?;
            Some(Vision::load(vocabulary, mmproj, setup.compute)?)
        }
        None => None,
    };
    let model = Model::load(&runtime, &setup.model, setup.compute, true)?;
    let template = match model.template() {
        Some(template) => template.map_err(|e| ServeError::Template(setup.model.clone(), e.to_string()))?,
        None => return Err(ServeError::NoTemplate(setup.model.clone())),
    };
    let sequences = Sequences::apart(model, setup.compute, context, setup.slots)?;
    Ok((vision, sequences, template, runtime.describe()))
}
