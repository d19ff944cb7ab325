// The page: questions about pictures, answers as they come. What it shows is in view.mjs, what it sends in protocol.mjs.
import { EventReader, chunk, failure, request, speed } from "./protocol.mjs";
import { BYTES, LONGEST, dataUrl, prepare } from "./pictures.mjs";
import { $, ExchangeView, announce, notice, pictureItem } from "./view.mjs";
import * as about from "./model.mjs";
import { open as openStore } from "./store.mjs";

/** What is asked where there are pictures and no question. */
const DESCRIBE = "Describe this picture.";

const state = {
  /** `{question: {text, pictures}, answer: {text, state, finish, speed, usage, failure}}` each. */
  exchanges: [],
  views: [],
  /** To be sent with the next question. */
  attached: [],
  /** Ends the request that runs. */
  running: null,
  /** The last question is being asked anew. */
  editing: false,
  model: null,
  /** Where the conversation is kept, if it is; nothing is sent before that is known. */
  store: null,
  ready: false,
};

// ---- the server -------------------------------------------------------------------------------------------------------

function headers() {
  const key = $("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** What a refusal is about. */
async function failureOf(response) {
  const json = await response.json().catch(() => null);
  return failure(response.status, json);
}

async function loadModel() {
  let again = 3000;
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.ok) {
      state.model = (await response.json()).data[0];
      notice("");
      showModel();
      again = 0;
    } else {
      const { kind, message } = await failureOf(response);
      notice(message);
      if (kind === "key") return askForKey();
    }
  } catch {
    notice("The server does not answer. Is mbq-convert serve still running? This page tries again by itself.");
  }
  if (again) setTimeout(loadModel, again);
}

function showModel() {
  $("model-name").textContent = document.title = state.model.id;
  $("model-facts").textContent = about.line(state.model) || "about this model";
  const rows = about.facts(state.model).map(([name, value]) => {
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("dt"), { textContent: name }));
    row.append(Object.assign(document.createElement("dd"), { textContent: value }));
    return row;
  });
  $("facts").replaceChildren(...rows);
  if (state.model.meta?.vision === false) {
    for (const id of ["choose", "attach"]) $(id).hidden = true;
    $("welcome").textContent = "Ask something";
  }
  showContext();
}

function askForKey() {
  if (!$("settings").open) $("settings").showModal();
  $("key").focus();
}

// ---- the conversation -------------------------------------------------------------------------------------------------

function add(exchange) {
  const view = new ExchangeView(exchange, { edit, retry, advise });
  state.exchanges.push(exchange);
  state.views.push(view);
  $("conversation").append(view.element);
  showParts();
}

function removeLast() {
  state.exchanges.pop();
  state.views.pop().element.remove();
  showParts();
}

/** What is on the page follows from the state. */
function showParts() {
  const running = state.running !== null;
  $("empty").hidden = state.exchanges.length > 0;
  $("new").hidden = state.exchanges.length === 0;
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("editing").hidden = !state.editing;
  $("attached").hidden = state.attached.length === 0;
  $("question").placeholder = state.attached.length ? DESCRIBE : state.exchanges.length ? "Ask something else" : "Ask something";
  $("send").disabled = !state.attached.length && !$("question").value.trim();
  document.body.classList.toggle("running", running);
  showContext();
}

function showContext() {
  const usage = state.exchanges.findLast(({ answer }) => answer.usage)?.answer.usage;
  const most = state.model?.meta?.n_ctx;
  const used = usage ? usage.prompt_tokens + usage.completion_tokens : 0;
  $("context").textContent = used && most ? `${about.whole(used)} of ${about.whole(most)} tokens` : "";
  $("context").classList.toggle("nearly", used > 0.85 * most);
  $("context").title = "How much of the context this conversation fills";
}

function save() {
  return state.store?.save(state.exchanges);
}

function send() {
  const text = $("question").value.trim() || (state.attached.length ? DESCRIBE : "");
  if (!text || state.running || !state.ready) return;
  if (state.editing) removeLast();
  state.editing = false;
  add({ question: { text, pictures: state.attached }, answer: { text: "", state: "waiting" } });
  state.attached = [];
  $("question").value = "";
  showAttached();
  ask();
}

function retry() {
  if (state.running) return;
  state.exchanges.at(-1).answer = { text: "", state: "waiting" };
  ask();
}

function edit() {
  if (state.running) return;
  const { question } = state.exchanges.at(-1);
  state.editing = true;
  state.attached = [...question.pictures];
  $("question").value = question.text;
  showAttached();
  $("question").focus();
}

function cancelEdit() {
  state.editing = false;
  state.attached = [];
  $("question").value = "";
  showAttached();
  $("question").focus();
}

async function newConversation() {
  stop();
  await state.asking;
  while (state.exchanges.length) removeLast();
  cancelEdit();
  notice("");
  announce("New conversation");
  save();
}

/** Buttons that help after a failure. */
function advise({ kind }) {
  const button = (text, action) => Object.assign(document.createElement("button"), { type: "button", className: "quiet small", textContent: text, onclick: action });
  if (kind === "key") return [button("Enter the key", askForKey)];
  if (kind === "full") return [button("New conversation", newConversation)];
  return [];
}

// ---- an answer --------------------------------------------------------------------------------------------------------

/** Sends the conversation and shows the answer to its last question as it comes. */
function ask() {
  state.running = new AbortController();
  showParts();
  toEnd();
  const [exchange, view] = [state.exchanges.at(-1), state.views.at(-1)];
  const answer = exchange.answer;
  const times = { sent: performance.now(), first: null, last: null, pieces: 0, usage: null };
  const waiting = () => view.waited((performance.now() - times.sent) / 1000, exchange.question.pictures.length);
  waiting();
  view.update();
  // A tab that is closed has no time to write: what there is of the answer is written as it comes.
  const ticks = [setInterval(waiting, 500), setInterval(save, 2000)];
  state.asking = stream(exchange, view, times)
    .catch((error) => {
      if (error.name === "AbortError") answer.state = "stopped";
      else Object.assign(answer, { state: "failed", failure: error.failure ?? lost(answer) });
    })
    .then(() => {
      ticks.forEach(clearInterval);
      state.running = null;
      if (times.first !== null) answer.speed = speed(times);
      const end = atEnd();
      view.update();
      showParts();
      if (end) toEnd();
      announce(answer.state === "failed" ? `${answer.failure.message} ${answer.failure.advice}` : view.body.textContent.slice(view.spoken));
      save();
    });
  save();
}

function lost(answer) {
  const message = answer.text ? "The connection was lost in the middle of the answer." : "The server does not answer.";
  return { kind: "", message, advice: "Is mbq-convert serve still running? Then try again." };
}

async function stream(exchange, view, times) {
  const answer = exchange.answer;
  view.spoken = 0;
  const settings = { temperature: numberIn("temperature"), maxTokens: numberIn("max-tokens") };
  answer.limit = settings.maxTokens;
  const body = await request(state.model?.id ?? "", state.exchanges, settings, dataUrl);
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal: state.running.signal,
  });
  if (!response.ok) throw Object.assign(new Error(), { failure: await failureOf(response) });
  const [reader, events] = [response.body.pipeThrough(new TextDecoderStream()).getReader(), new EventReader()];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    for (const data of events.feed(value)) {
      const said = chunk(data);
      if (said.error) throw Object.assign(new Error(), { failure: said.error });
      if (said.done) {
        answer.state = "done";
        return;
      }
      take(said, answer, times);
    }
    draw(view);
  }
  throw new Error("the stream ended without an end");
}

function take(said, answer, times) {
  if (said.text) {
    times.last = performance.now();
    times.first ??= times.last;
    times.pieces += 1;
    answer.text += said.text;
    answer.state = "streaming";
  }
  if (said.finish) answer.finish = said.finish;
  if (said.usage) answer.usage = times.usage = said.usage;
}

/** Draws once per frame, and reads whole sentences to who listens. */
function draw(view) {
  if (view.frame) return;
  view.frame = requestAnimationFrame(() => {
    view.frame = 0;
    const end = atEnd();
    view.update();
    if (end) toEnd();
    const text = view.body.textContent;
    const sentence = Math.max(...[". ", "! ", "? ", ": "].map((mark) => text.lastIndexOf(mark))) + 1;
    if (sentence > view.spoken) {
      announce(text.slice(view.spoken, sentence));
      view.spoken = sentence;
    }
  });
}

function stop() {
  state.running?.abort();
}

const page = document.scrollingElement;

function atEnd() {
  return page.scrollHeight - page.clientHeight - page.scrollTop < 80;
}

function toEnd() {
  page.scrollTop = page.scrollHeight;
}

// ---- pictures ---------------------------------------------------------------------------------------------------------

async function attach(files) {
  const pictures = [...files];
  if (!pictures.length) return;
  notice("");
  for (const file of pictures) {
    try {
      state.attached.push(await prepare(file));
      announce(`${file.name || "A picture"} added`);
    } catch (error) {
      notice(error.message);
    }
    showAttached();
  }
  $("question").focus();
}

function showAttached() {
  const remove = (picture) => () => {
    state.attached = state.attached.filter((other) => other !== picture);
    showAttached();
    $("question").focus();
  };
  $("attached").replaceChildren(...state.attached.map((picture) => pictureItem(picture, remove(picture))));
  showParts();
}

function listenForPictures() {
  $("files").onchange = () => {
    attach($("files").files).then(() => ($("files").value = ""));
  };
  for (const id of ["choose", "attach"]) $(id).onclick = () => $("files").click();
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    attach(event.clipboardData.files);
  });
  const dropping = (shown) => ($("dropping").hidden = !shown);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    dropping(event.dataTransfer.types.includes("Files"));
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget || dropping(false));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dropping(false);
    if (event.dataTransfer.files.length) attach(event.dataTransfer.files);
    else notice("That was no file. Save the picture first, or copy and paste it.");
  });
}

// ---- settings and keys ------------------------------------------------------------------------------------------------

/** The number in a field; null where it is empty or none. */
function numberIn(id) {
  const field = $(id);
  return field.value.trim() && field.validity.valid ? field.valueAsNumber : null;
}

/** Fields keep what is in them: settings for good, a key until the tab is closed. */
function keepField(id, storage) {
  const name = `mbq-convert ${id}`;
  try {
    $(id).value = storage().getItem(name) ?? "";
  } catch {
    // A browser that keeps nothing.
  }
  $(id).addEventListener("change", () => {
    try {
      storage().setItem(name, $(id).value);
    } catch {
      // As above.
    }
  });
}

function listen() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  $("question").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  $("question").oninput = showParts;
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (state.running) stop();
    else if (state.editing) cancelEdit();
  });
  $("stop").onclick = stop;
  $("cancel-edit").onclick = cancelEdit;
  $("new").onclick = newConversation;
  $("open-card").onclick = () => $("card").showModal();
  $("open-settings").onclick = () => $("settings").showModal();
  $("settings").onclose = () => state.model ?? loadModel();
  for (const dialog of document.querySelectorAll("dialog")) {
    // A click beside a panel closes it.
    dialog.onclick = (event) => event.target === dialog && dialog.close();
  }
  window.addEventListener("pagehide", save);
}

async function start() {
  for (const id of ["temperature", "max-tokens"]) keepField(id, () => localStorage);
  keepField("key", () => sessionStorage);
  $("about-pictures").textContent = `Pictures are sent as they are, up to ${LONGEST} pixels on the longer side and ${BYTES / 1024 / 1024} MB; larger ones are made smaller here, and say so.`;
  const here = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  $("where").textContent = here ? "The model runs on this computer. Pictures and questions do not leave it." : `The model runs on ${location.hostname}. Pictures and questions are sent there and nowhere else.`;
  listen();
  listenForPictures();
  showParts();
  loadModel();
  state.store = await openStore();
  const kept = (await state.store?.load().catch(() => [])) ?? [];
  state.ready = true;
  if (!state.store) return notice("This tab’s conversation is not kept: another tab has the one that is, or the browser stores none.");
  state.store.failed = () => notice("The browser could not store this conversation: a reload would lose it.");
  for (const exchange of kept) {
    // The tab was closed while an answer came.
    if (["waiting", "streaming"].includes(exchange.answer.state)) exchange.answer.state = "stopped";
    add(exchange);
  }
  toEnd();
}

start();
