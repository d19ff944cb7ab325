// Pictures before they are sent. A file that the server reads is sent as it is; one that is larger than the bounds, or of
// a format that only browsers read, is drawn anew, and its `note` says so.

/** The longest side in pixels, and the bytes, of a picture that is sent as it is. */
export const LONGEST = 4096;
export const BYTES = 8 * 1024 * 1024;
/** What the server decodes. */
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/** `{id, name, blob, width, height, note, url}` of a file; throws an Error for people where it is no picture. */
export async function prepare(file) {
  const name = file.name || "picture";
  const drawing = await decode(file).catch(() => null);
  if (!drawing) throw new Error(`${name} is not a picture that this browser can read.`);
  const { width, height } = drawing;
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const known = SENT_AS_THEY_ARE.includes(file.type);
  let picture = { blob: file, width, height, note: "" };
  if (scale < 1 || !known || file.size > BYTES) {
    picture = await redraw(drawing, scale, file.type === "image/jpeg");
    const form = picture.blob.type.slice("image/".length).toUpperCase();
    picture.note = scale < 1 ? `scaled from ${width} × ${height} to ${picture.width} × ${picture.height}` : `sent as ${form}`;
  }
  drawing.close?.();
  return { id: newId(), name, ...picture, url: URL.createObjectURL(picture.blob) };
}

/** An id for storage; `crypto.randomUUID` is there only on secure origins. */
function newId() {
  return [...crypto.getRandomValues(new Uint32Array(4))].map((n) => n.toString(16).padStart(8, "0")).join("");
}

/** Something that a canvas draws, upright, with its size. */
async function decode(file) {
  try {
    return await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    // SVG, and whatever else only an element shows.
    const image = new Image();
    const url = URL.createObjectURL(file);
    try {
      image.src = url;
      await image.decode();
    } finally {
      URL.revokeObjectURL(url);
    }
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    if (!width || !height) throw new Error("no size");
    Object.assign(image, { width, height });
    return image;
  }
}

/** The picture anew: JPEG of a JPEG, else PNG, and JPEG where that is above the bound. */
async function redraw(drawing, scale, jpeg) {
  const [width, height] = [drawing.width, drawing.height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  const encode = (type) => new Promise((done) => canvas.toBlob(done, type, 0.95));
  context.drawImage(drawing, 0, 0, width, height);
  let blob = await encode(jpeg ? "image/jpeg" : "image/png");
  if (!blob || blob.size > BYTES) {
    // JPEG has no transparency: what is behind becomes white, not black.
    context.globalCompositeOperation = "destination-over";
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, height);
    blob = await encode("image/jpeg");
  }
  if (!blob) throw new Error("this browser cannot scale a picture of this size; scale it down first");
  return { blob, width, height };
}

/** A picture's data URL. */
export function dataUrl({ blob }) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}
