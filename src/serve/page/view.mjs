// How an exchange looks. Elements are made one by one and text is set as text: nothing that a model wrote is HTML.
import { parse } from "./markdown.mjs";

export const $ = (id) => document.getElementById(id);

/** A message once for a screen reader. */
export function announce(text) {
  $("live").textContent = text;
}

/** A notice above the composer until the next one; none for an empty text. */
export function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

/** The elements of a tree that `parse` made. */
function elements(node) {
  if (typeof node === "string") return document.createTextNode(node);
  const element = document.createElement(node.tag);
  if (node.start !== undefined) element.start = node.start;
  element.append(...node.children.map(elements));
  if (node.tag === "pre") element.tabIndex = 0;
  return element;
}

/** Shows an answer as it grows: blocks that are as they were keep their elements, and what is selected in them. */
class Markdown {
  #shown = [];

  constructor(parent) {
    this.parent = parent;
  }

  update(text) {
    const blocks = parse(text);
    const keys = blocks.map((block) => JSON.stringify(block));
    const same = keys.findIndex((key, i) => key !== this.#shown[i]);
    const from = same < 0 ? keys.length : same;
    while (this.parent.childNodes.length > from) this.parent.lastChild.remove();
    this.parent.append(...blocks.slice(from).map(elements));
    this.#shown = keys;
  }
}

/** A picture of a question, or one to be sent, which `remove` takes away again. */
export function pictureItem(picture, remove) {
  const item = document.createElement("li");
  const image = Object.assign(document.createElement("img"), { src: picture.url, alt: picture.name });
  const open = Object.assign(document.createElement("button"), { type: "button", className: "picture", title: picture.name });
  open.setAttribute("aria-label", `Enlarge ${picture.name}`);
  open.append(image);
  open.onclick = () => {
    Object.assign($("viewed"), { src: picture.url, alt: picture.name });
    $("viewer").showModal();
  };
  item.append(open);
  if (remove) {
    const button = Object.assign(document.createElement("button"), { type: "button", className: "remove" });
    button.setAttribute("aria-label", `Remove ${picture.name}`);
    button.append(icon("close"));
    button.onclick = remove;
    item.append(button);
  }
  if (picture.note) item.append(Object.assign(document.createElement("span"), { className: "note", textContent: picture.note }));
  return item;
}

function icon(name) {
  const space = document.querySelector("symbol").namespaceURI;
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

/** Why an answer ended before its end. */
function ending({ state, finish, limit }) {
  if (state === "stopped") return "Stopped.";
  if (state === "done" && finish === "length") {
    return limit ? `Cut off at ${limit} tokens, the longest answer in the settings.` : "Cut off: the server’s limit for an answer, or the context, was reached.";
  }
  return "";
}

function speedText({ speed, state }) {
  if (!speed || state === "waiting") return "";
  const parts = [];
  if (speed.rate !== null) parts.push(`${number.format(speed.rate)} tokens/s`);
  if (speed.wait !== null) parts.push(`first token after ${number.format(speed.wait / 1000)} s`);
  if (speed.tokens) parts.push(`${speed.counted ? "" : "about "}${speed.tokens} token${speed.tokens === 1 ? "" : "s"}`);
  return parts.join(" · ");
}

/** A question and its answer on the page. */
export class ExchangeView {
  /** `actions`: `{edit, retry, advise}`; the last one makes buttons of a failure's kind. */
  constructor(exchange, actions) {
    this.exchange = exchange;
    this.actions = actions;
    this.element = $("exchange").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    const { question } = exchange;
    find(".question .pictures").append(...question.pictures.map((picture) => pictureItem(picture)));
    find(".question .pictures").hidden = !question.pictures.length;
    find(".question .text").textContent = question.text;
    find(".edit").onclick = () => actions.edit();
    find(".retry").onclick = () => actions.retry();
    find(".copy").onclick = (event) => this.copy(event.currentTarget);
    this.parts = Object.fromEntries(["waiting", "since", "ended", "failure", "speed"].map((name) => [name, find("." + name)]));
    this.body = find(".body");
    this.copyButton = find(".copy");
    this.markdown = new Markdown(this.body);
    this.update();
  }

  update() {
    const { answer } = this.exchange;
    const running = answer.state === "waiting" || answer.state === "streaming";
    this.element.dataset.state = answer.state;
    this.markdown.update(answer.text);
    this.body.ariaBusy = running;
    this.parts.waiting.hidden = answer.state !== "waiting";
    this.parts.ended.textContent = ending(answer);
    this.parts.speed.textContent = speedText(answer);
    this.copyButton.hidden = !answer.text || running;
    this.fail(answer.state === "failed" ? answer.failure : null);
  }

  /** Seconds that the answer has been waited for. */
  waited(seconds, pictures) {
    const what = pictures ? (pictures > 1 ? "Looking at the pictures" : "Looking at the picture") : "Reading";
    this.parts.since.textContent = seconds < 1 ? what : `${what} · ${Math.floor(seconds)} s`;
  }

  fail(failure) {
    this.parts.failure.hidden = !failure;
    if (!failure) return;
    this.parts.failure.querySelector(".message").textContent = failure.message;
    this.parts.failure.querySelector(".advice").textContent = failure.advice;
    this.parts.failure.querySelector(".actions").replaceChildren(...this.actions.advise(failure));
  }

  async copy(button) {
    const label = button.querySelector("span");
    let done = true;
    try {
      await navigator.clipboard.writeText(this.exchange.answer.text);
    } catch {
      done = copySelected(this.body);
    }
    label.textContent = done ? "Copied" : "Select it, and copy";
    announce(label.textContent);
    setTimeout(() => (label.textContent = "Copy"), 1600);
  }
}

/** The clipboard's API is there on secure origins alone: elsewhere the selection is copied. */
function copySelected(element) {
  const selection = getSelection();
  selection.selectAllChildren(element);
  const done = document.execCommand("copy");
  if (done) selection.removeAllRanges();
  return done;
}
