import test from "node:test";
import assert from "node:assert/strict";
import { EventReader, chunk, failure, request, speed } from "../../src/serve/page/protocol.mjs";
import { facts, line } from "../../src/serve/page/model.mjs";

const stream = ': comment\n\ndata: {"a": "ä\\n"}\n\nevent: x\r\ndata: one\r\ndata: two\r\n\r\nid: 7\n\ndata:bare\n\ndata: [DONE]\n\ndata: cut off';
const events = ['{"a": "ä\\n"}', "one\ntwo", "bare", "[DONE]"];

test("events come out of chunks of any length", () => {
  for (let size = 1; size <= stream.length; size += 1) {
    const reader = new EventReader();
    const got = [];
    for (let at = 0; at < stream.length; at += size) got.push(...reader.feed(stream.slice(at, at + size)));
    assert.deepEqual(got, events, `pieces of ${size}`);
  }
});

test("what an event says", () => {
  assert.deepEqual(chunk("[DONE]"), { done: true });
  const delta = (delta, finish) => JSON.stringify({ choices: [{ delta, finish_reason: finish }] });
  assert.deepEqual(chunk(delta({ role: "assistant", content: "" }, null)), { text: "", finish: null, usage: null });
  assert.equal(chunk(delta({ content: "a" }, null)).text, "a");
  assert.equal(chunk(delta({}, "length")).finish, "length");
  assert.deepEqual(chunk('{"choices": [], "usage": {"completion_tokens": 3}}').usage, { completion_tokens: 3 });
  assert.equal(chunk('{"error": {"message": "no"}}').error.message, "no");
  assert.match(chunk("{").error.message, /not JSON/);
});

test("a request has pictures in their turns, and no question without its answer", async () => {
  const turn = (text, pictures, answer) => ({ question: { text, pictures }, answer: { text: answer } });
  const exchanges = [turn("a", [1, 2], "A"), turn("failed", [3], ""), turn("b", [], "B"), turn("c", [4], "")];
  const body = await request("m", exchanges, { temperature: 0, maxTokens: null }, async (p) => `data:${p}`);
  const picture = (n) => ({ type: "image_url", image_url: { url: `data:${n}` } });
  const text = (text) => ({ type: "text", text });
  assert.deepEqual(body, {
    model: "m",
    messages: [
      { role: "user", content: [picture(1), picture(2), text("a")] },
      { role: "assistant", content: "A" },
      { role: "user", content: "b" },
      { role: "assistant", content: "B" },
      { role: "user", content: [picture(4), text("c")] },
    ],
    stream: true,
    stream_options: { include_usage: true },
    temperature: 0,
  });
  assert.equal((await request("m", exchanges, { temperature: null, maxTokens: 5 }, String)).max_tokens, 5);
});

test("failures name their kind", () => {
  assert.equal(failure(401, { error: { message: "no key" } }).kind, "key");
  const full = failure(400, { error: { message: "4096 < 5000", code: "context_length_exceeded" } });
  assert.deepEqual([full.kind, full.message], ["full", "4096 < 5000"]);
  assert.match(full.advice, /--context/);
  assert.equal(failure(413, null).kind, "full");
  assert.equal(failure(503, null).kind, "busy");
  assert.match(failure(502, null).message, /502/);
  assert.equal(failure(500, { error: "plain" }).message, "plain");
});

test("speed is that of the tokens after the first", () => {
  const times = { sent: 1000, first: 1500, last: 3500, pieces: 4, usage: { completion_tokens: 21 } };
  assert.deepEqual(speed(times), { wait: 500, tokens: 21, counted: true, rate: 10 });
  assert.deepEqual(speed({ ...times, usage: null }), { wait: 500, tokens: 4, counted: false, rate: 1.5 });
  assert.equal(speed({ ...times, last: 1500, usage: { completion_tokens: 1 } }).rate, null);
});

test("the model's card has what is known, and no more", () => {
  assert.deepEqual(facts({ id: "m" }), [["Name", "m"]]);
  const meta = { size: 1214e6, n_ctx: 4096, bits_per_weight: 3.576, types: ["mbq3", "f32"], license: "mit", slots: 4 };
  const card = Object.fromEntries(facts({ id: "m", meta }));
  assert.deepEqual([card.Size, card.Context, card.Types, card.Licence], ["1.21 GB", "4,096 tokens", "mbq3, f32", "mit"]);
  assert.deepEqual(facts({ id: "m", meta: { bits_per_weight: 3.51, block_bits_per_weight: 3.25, size: 1e6, mmproj_size: 27e5 } }).slice(1), [
    ["Size", "1 MB, vision 2.7 MB"],
    ["Bits per weight", "3.25 in the blocks, 3.51 overall"],
  ]);
  assert.equal(line({ id: "m", meta }), "3.58 bits per weight · 1.21 GB");
});
