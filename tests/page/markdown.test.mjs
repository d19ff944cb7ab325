import test from "node:test";
import assert from "node:assert/strict";
import { parse } from "../../src/serve/page/markdown.mjs";

/** A tree as one line: tag[children]. */
const line = (node) => (typeof node === "string" ? node : `${node.tag}[${node.children.map(line).join("")}]`);
const shown = (text) => parse(text).map(line).join(" ");

const cases = [
  ["one\ntwo\n\nthree", "p[one\ntwo] p[three]"],
  ["**bold** and *it* and __b__ and _i_", "p[strong[bold] and em[it] and strong[b] and em[i]]"],
  ["**a *b* c** ***d***", "p[strong[a em[b] c] strong[em[d]]]"],
  ["2 * 3 * 4, snake_case_name, **open", "p[2 * 3 * 4, snake_case_name, **open]"],
  ["a_b_ c, a _b_c", "p[a_b_ c, a _b_c]"],
  ["`a *b*` and ``x ` y`` and `open", "p[code[a *b*] and code[x ` y] and `open]"],
  ["\\*no\\* \\`no\\`", "p[*no* `no`]"],
  ["# A\n## B\ntext", "h3[A] h4[B] p[text]"],
  ["- a\n- b\n  - c\n  - d\n- e", "ul[li[a]li[bul[li[c]li[d]]]li[e]]"],
  ["1. a\n\n2. b\n   more\n\n   last\n\nafter", "ol[li[a]li[b\nmorep[last]]] p[after]"],
  ["text:\n- a\n* b", "p[text:] ul[li[a]li[b]]"],
  ["It was in\n1986. A year", "p[It was in\n1986. A year]"],
  ["> a\n> - b", "blockquote[p[a]ul[li[b]]]"],
  ["---\n***", "hr[] hr[]"],
  ["```js\nlet a = '**b**';\n\n- c\n```\nafter", "pre[code[let a = '**b**';\n\n- c]] p[after]"],
  ["```\nnot closed", "pre[code[not closed]]"],
  ["- a\n  ```\n  x\n  ```\n- b", "ul[li[apre[code[x]]]li[b]]"],
  ["a\r\nb\rc", "p[a\nb\nc]"],
  ["", ""],
];

for (const [text, want] of cases) test(JSON.stringify(text), () => assert.equal(shown(text), want));

test("HTML and links stay text", () => {
  const text = "<img src=x onerror=alert(1)> [a](javascript:b)";
  assert.deepEqual(parse(text), [{ tag: "p", children: [text] }]);
});

test("quotes in quotes end somewhere", () => {
  const depth = (node) => (typeof node === "string" ? 0 : 1 + Math.max(0, ...node.children.map(depth)));
  for (const mark of ["> ", "- "]) assert.ok(Math.max(...parse(mark.repeat(100) + "deep").map(depth)) < 20);
});

test("a list that begins late says where", () => assert.equal(parse("3. c\n4. d")[0].start, 3));

test("every beginning of a text is read, no tag is made up, no line is lost", () => {
  const text = cases.map(([text]) => text).join("\n\n") + "> ".repeat(300) + "deep\n" + "- ".repeat(300) + "deep";
  const known = /^(p|h[3-6]|ul|ol|li|blockquote|hr|pre|code|strong|em)$/;
  const walk = (node) => {
    if (typeof node === "string") return node;
    assert.match(node.tag, known);
    return node.children.map(walk).join("");
  };
  for (let end = 0; end <= text.length; end += 1) {
    const words = parse(text.slice(0, end)).map(walk).join(" ");
    if (end === text.length) for (const word of ["three", "snake_case_name", "last", "after", "deep"]) assert.ok(words.includes(word), word);
  }
});

test("a long answer full of marks is read at once", () => {
  const begun = performance.now();
  parse("*a _b `c **d ".repeat(6000));
  assert.ok(performance.now() - begun < 2000, `${performance.now() - begun} ms`);
});
