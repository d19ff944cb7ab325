// What the server says of its model (GET /v1/models), for people.

/** Names and values of the model's card, by what the server tells. */
export function facts({ id, meta = {} }) {
  const known = [
    ["Name", id],
    ["Made from", meta.base_model],
    ["Architecture", meta.architecture],
    ["Weights", meta.n_params && short(meta.n_params)],
    ["Size", meta.size && size(meta.size) + (meta.mmproj_size ? `, vision ${size(meta.mmproj_size)}` : "")],
    ["Bits per weight", bits(meta)],
    ["Method", meta.method],
    ["Types", types(meta.types)],
    ["Context", meta.n_ctx && `${whole(meta.n_ctx)} tokens`],
    ["Conversations at once", meta.slots],
    ["Licence", meta.license],
  ];
  return known.filter(([, value]) => value !== undefined && value !== null && value !== "").map(([name, value]) => [name, String(value)]);
}

/** The line below the model's name. */
export function line({ meta = {} }) {
  const parts = [meta.bits_per_weight && `${decimal(meta.bits_per_weight)} bits per weight`, meta.size && size(meta.size)];
  return parts.filter(Boolean).join(" · ");
}

export function whole(n) {
  return Number(n).toLocaleString("en");
}

function decimal(n) {
  return Number(n).toLocaleString("en", { maximumFractionDigits: 2 });
}

function size(bytes) {
  return bytes >= 1e9 ? `${decimal(bytes / 1e9)} GB` : `${decimal(bytes / 1e6)} MB`;
}

function short(n) {
  return n >= 1e9 ? `${decimal(n / 1e9)} billion` : `${decimal(n / 1e6)} million`;
}

function bits({ bits_per_weight: all, block_bits_per_weight: blocks }) {
  if (!all) return undefined;
  return blocks && decimal(blocks) !== decimal(all) ? `${decimal(blocks)} in the blocks, ${decimal(all)} overall` : decimal(all);
}

function types(types) {
  return Array.isArray(types) ? types.join(", ") : types;
}
