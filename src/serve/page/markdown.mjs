// The part of Markdown that models write: paragraphs, headings, lists, quotes, code, bold, italics. Links and HTML stay
// the text that they are. `parse` makes a tree of plain values, `{tag, children}` or a string, and nothing else: whoever
// shows it makes elements and text nodes of it, so that no answer can become HTML.

const FENCE = /^\s{0,3}(```+|~~~+)\s*([\w+#.-]*)\s*$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.+?)\s*#*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^\s{0,3}>\s?(.*)$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
/** Lists and quotes deeper than this stay text: an answer is no place for a stack that overflows. */
const DEEPEST = 8;

/** The blocks of an answer, also of one that is not finished yet. */
export function parse(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const out = [];
  let paragraph = [];
  const close = () => {
    if (paragraph.length) out.push({ tag: "p", children: inline(paragraph.join("\n")) });
    paragraph = [];
  };
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const next = special(lines, i, depth, paragraph.length > 0);
    if (next) {
      close();
      out.push(next.block);
      i = next.after;
    } else {
      if (line.trim()) paragraph.push(line.trim());
      else close();
      i += 1;
    }
  }
  close();
  return out;
}

/** What begins at line `i` and is no paragraph, and the line after it. */
function special(lines, i, depth, inParagraph) {
  const line = lines[i];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, i, fence);
  const heading = HEADING.exec(line);
  if (heading) return { block: { tag: "h" + Math.min(heading[1].length + 2, 6), children: inline(heading[2]) }, after: i + 1 };
  if (RULE.test(line)) return { block: { tag: "hr", children: [] }, after: i + 1 };
  if (depth >= DEEPEST) return null;
  const item = ITEM.exec(line);
  // A paragraph's line such as "1986. A great year" begins no list.
  if (item && !(inParagraph && /^\d/.test(item[2]) && parseInt(item[2], 10) !== 1)) return list(lines, i, depth);
  if (QUOTE.test(line)) {
    let end = i;
    while (end < lines.length && QUOTE.test(lines[end])) end += 1;
    const inside = lines.slice(i, end).map((l) => QUOTE.exec(l)[1]);
    return { block: { tag: "blockquote", children: blocks(inside, depth + 1) }, after: end };
  }
  return null;
}

function code(lines, i, [, fence, language]) {
  let end = i + 1;
  while (end < lines.length && !(lines[end].trim().startsWith(fence) && !lines[end].trim().replaceAll(fence[0], ""))) end += 1;
  const text = lines.slice(i + 1, end).join("\n");
  return { block: { tag: "pre", language, children: [{ tag: "code", children: [text] }] }, after: end + 1 };
}

/** A list: items at one indentation, each with the lines below that stand further in. */
function list(lines, i, depth) {
  const first = ITEM.exec(lines[i]);
  const [indent, ordered] = [first[1].length, /\d/.test(first[2])];
  const items = [];
  let end = i;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || item[1].length > indent + 1 || item[1].length < indent || /\d/.test(item[2]) !== ordered) break;
    const inside = [item[3]];
    end += 1;
    while (end < lines.length && continues(lines, end, indent)) {
      inside.push(lines[end].slice(Math.min(indent + 2, lines[end].search(/\S|$/))));
      end += 1;
    }
    items.push({ tag: "li", children: tight(blocks(inside, depth + 1)) });
    // Empty lines between items.
    let after = end;
    while (after < lines.length && !lines[after].trim()) after += 1;
    if (after < lines.length && ITEM.test(lines[after])) end = after;
  }
  const start = parseInt(first[2], 10);
  return { block: { tag: ordered ? "ol" : "ul", ...(ordered && start !== 1 && { start }), children: items }, after: end };
}

/** Whether a line is still of the item that began at this indentation. */
function continues(lines, at, indent) {
  const line = lines[at];
  if (line.trim()) return line.search(/\S/) > indent + 1 || !(ITEM.test(line) || FENCE.test(line) || HEADING.test(line));
  return at + 1 < lines.length && lines[at + 1].trim() !== "" && lines[at + 1].search(/\S/) > indent + 1;
}

/** An item of one paragraph needs none. */
function tight(children) {
  return children[0]?.tag === "p" ? [...children[0].children, ...children.slice(1)] : children;
}

const ESCAPABLE = /[\\`*_{}[\]()#+\-.!~>|]/;

/** Code, bold and italics of a paragraph; a mark without its partner is text. */
function inline(text) {
  const out = [];
  let plain = "";
  // Marks that have no partner from here on, which need not be looked for again.
  const alone = new Set();
  for (let i = 0; i < text.length; ) {
    const c = text[i];
    const escaped = c === "\\" && ESCAPABLE.test(text[i + 1] ?? "");
    const marks = /^(`+|\*\*?|__?)/.exec(text.slice(i, i + 9))?.[0];
    const span = marks && !escaped && !alone.has(marks) ? (c === "`" ? codeSpan : emphasis)(text, i, marks, alone) : null;
    if (span) {
      if (plain) out.push(plain);
      plain = "";
      out.push(span.node);
      i = span.after;
    } else {
      plain += escaped ? text[i + 1] : c;
      i += escaped ? 2 : 1;
    }
  }
  if (plain) out.push(plain);
  return out;
}

function codeSpan(text, i, marks, alone) {
  const inside = i + marks.length;
  const end = text.indexOf(marks, inside);
  if (end < 0) {
    alone.add(marks);
    return null;
  }
  return { node: { tag: "code", children: [text.slice(inside, end).trim()] }, after: end + marks.length };
}

function emphasis(text, i, marks, alone) {
  const c = marks[0];
  const inside = i + marks.length;
  if (/\s|^$/.test(text[inside] ?? "")) return null;
  // snake_case is no italics.
  if (c === "_" && /\w/.test(text[i - 1] ?? "")) return null;
  for (let end = text.indexOf(marks, inside + 1); end > 0; end = text.indexOf(marks, end + 1)) {
    // Of three marks the last two are the bold's.
    if (marks.length === 2 && text[end + 2] === c) continue;
    const after = end + marks.length;
    const closes = !/\s/.test(text[end - 1]) && !(c === "_" && /\w/.test(text[after] ?? ""));
    // A single mark does not end at half of a double one.
    const half = marks.length === 1 && (text[after] === c || text[end - 1] === c);
    if (closes && !half) {
      return { node: { tag: marks.length === 2 ? "strong" : "em", children: inline(text.slice(inside, end)) }, after };
    }
  }
  alone.add(marks);
  return null;
}
