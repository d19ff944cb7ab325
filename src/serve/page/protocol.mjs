// What the page says to the server and hears from it: OpenAI's chat completions, streamed as server-sent events.

/** Takes a stream of text apart into the data of its events. */
export class EventReader {
  #rest = "";
  #data = [];

  /** The data of every event that `text`, which may end anywhere, completes. */
  feed(text) {
    const whole = this.#rest + text;
    // A \r at the end may be half of a \r\n.
    const cut = whole.endsWith("\r") ? whole.length - 1 : whole.length;
    const lines = whole.slice(0, cut).split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + whole.slice(cut);
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return events;
  }
}

/** What an event's data say: `{done}`, `{error}`, or any of `{text, finish, usage}`. */
export function chunk(data) {
  if (data.trim() === "[DONE]") return { done: true };
  let json;
  try {
    json = JSON.parse(data);
  } catch {
    return { error: failure(0, null, "The server sent something that is not JSON.") };
  }
  if (json.error) return { error: failure(0, json) };
  const choice = json.choices?.[0];
  return {
    text: choice?.delta?.content ?? "",
    finish: choice?.finish_reason ?? null,
    usage: json.usage ?? null,
  };
}

/**
 * A request's body. An exchange without an answer is left out: many chat templates refuse two questions in a row.
 * `exchanges`: `{question: {text, pictures}, answer: {text}}`; `url` makes the data URL of a picture.
 */
export async function request(model, exchanges, settings, url) {
  const messages = [];
  for (const [i, { question, answer }] of exchanges.entries()) {
    const last = i === exchanges.length - 1;
    if (!last && !answer.text) continue;
    const parts = [];
    for (const picture of question.pictures) parts.push({ type: "image_url", image_url: { url: await url(picture) } });
    if (question.text) parts.push({ type: "text", text: question.text });
    messages.push({ role: "user", content: question.pictures.length ? parts : question.text });
    if (!last) messages.push({ role: "assistant", content: answer.text });
  }
  const body = { model, messages, stream: true, stream_options: { include_usage: true } };
  if (settings.temperature !== null) body.temperature = settings.temperature;
  if (settings.maxTokens !== null) body.max_tokens = settings.maxTokens;
  return body;
}

/** A failure for people: `{message, advice, kind}`, with `kind` `key`, `full`, `busy` or none. */
export function failure(status, json, otherwise) {
  const error = json?.error;
  const said = typeof error === "string" ? error : error?.message;
  const message = said || otherwise || `The server answered with status ${status}.`;
  const code = typeof error === "object" ? error?.code : null;
  if (status === 401) return { kind: "key", message, advice: "Enter the key that the server was started with." };
  if (code === "context_length_exceeded") {
    return {
      kind: "full",
      message,
      advice: "Begin a new conversation, ask with fewer or smaller pictures, or start the server with a larger --context.",
    };
  }
  if (status === 413) return { kind: "full", message, advice: "Begin a new conversation, or send fewer pictures." };
  if (status === 429 || status === 503) return { kind: "busy", message, advice: "The server is busy: try again in a moment." };
  return { kind: "", message, advice: "" };
}

/** How fast an answer came: milliseconds to its first token, tokens, and tokens per second after the first. */
export function speed({ sent, first, last, pieces, usage }) {
  const tokens = usage?.completion_tokens ?? pieces;
  const seconds = (last - first) / 1000;
  return {
    wait: first === null ? null : first - sent,
    tokens,
    counted: usage?.completion_tokens !== undefined,
    rate: first !== null && tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
  };
}
