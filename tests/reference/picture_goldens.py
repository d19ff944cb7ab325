"""Makes tests/golden/pictures/load: small picture files of every kind that the loader takes, and expected.json with
the pixels that transformers sees, PIL.ImageOps.exif_transpose(PIL.Image.open(f)).convert("RGB"), or Pillow's refusal.
pip install pillow==13.0.0 numpy"""
import base64, io, json, os, struct, zlib
import numpy as np
from PIL import Image, ImageOps

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "../golden/pictures/load")
W, H = 21, 13
y, x = np.mgrid[0:H, 0:W]
ramp = np.stack([x * 12, y * 19, (x * 7 + y * 11) % 256], -1).astype(np.uint8)
ramp[3:7, 4:9] = (250, 20, 30)
rgb = Image.fromarray(ramp)
gray = rgb.convert("L")
alpha = Image.fromarray(((x * 31 + y * 17) % 256).astype(np.uint8))
rgba = Image.merge("RGBA", [*rgb.split(), alpha])
files = {}

def save(name, image, **options):
    out = io.BytesIO()
    image.save(out, {"jpg": "JPEG"}.get(name.rsplit(".", 1)[1], name.rsplit(".", 1)[1].upper()), **options)
    files[name] = out.getvalue()

def exif(orientation, order=">", kind=3):
    value = struct.pack(order + "HH", orientation, 0) if kind == 3 else struct.pack(order + "I", orientation)
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "I", 8)
    return b"Exif\0\0" + head + struct.pack(order + "H", 1) + struct.pack(order + "HHI", 0x112, kind, 1) + value + bytes(4)

def png(name, bits, color, rows, extra=b"", interlace=0):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", W, H, bits, color, 0, 0, interlace)
    chunks = b"".join(chunk(extra[i][0], extra[i][1]) for i in range(len(extra)))
    data = zlib.compress(b"".join(b"\0" + bytes(r) for r in rows))
    files[name] = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")

def bmp(name, bits, rows, masks=None):
    rows = [r + bytes(-len(r) % 4) for r in rows]
    head = struct.pack("<IiiHHIIiiII", 40, W, H, 1, bits, 3 if masks else 0, 0, 2835, 2835, 0, 0)
    head += struct.pack("<III", *masks) if masks else b""
    data = b"".join(reversed(rows))
    files[name] = b"BM" + struct.pack("<IHHI", 14 + len(head) + len(data), 0, 0, 14 + len(head)) + head + data

# PNG
save("rgb.png", rgb); save("gray.png", gray); save("rgba.png", rgba); save("palette.png", rgb.quantize(16))
save("gray-alpha.png", Image.merge("LA", [gray, alpha])); save("one-bit.png", gray.convert("1"))
save("palette-clear.png", rgb.quantize(16), transparency=3); save("rgb-clear.png", rgb, transparency=(250, 20, 30))
be = lambda a: [r.astype(">u2").tobytes() for r in a.astype(np.uint32).reshape(H, -1)]
wide = x * 97 + y * 61  # to both sides of 255
png("gray16.png", 16, 0, be(wide)); png("gray16-clear.png", 16, 0, be(wide), [(b"tRNS", b"\0\x61")])
png("gray16-alpha.png", 16, 4, be(np.stack([x * 3000, y * 5000], -1)))
deep = np.stack([x * 3120 + 129, y * 4999 + 255, (x * 7 + y * 11) * 200 + 128], -1)
png("rgb16.png", 16, 2, be(deep)); png("rgba16.png", 16, 6, be(np.concatenate([deep, deep[..., :1]], -1)))
png("gray2.png", 2, 0, [np.packbits(np.unpackbits(np.array((x[0] + r) % 4, np.uint8)[:, None], axis=1)[:, 6:].ravel()).tobytes() for r in range(H)])
png("gray4.png", 4, 0, [np.packbits(np.unpackbits(np.array((x[0] + r) % 16, np.uint8)[:, None], axis=1)[:, 4:].ravel()).tobytes() for r in range(H)])
save("exif.png", rgb, exif=exif(6))
# JPEG
for o in range(1, 9):
    save(f"exif{o}.jpg", rgb, quality=90, subsampling=0, exif=exif(o))
save("exif-little.jpg", rgb, quality=90, exif=exif(8, "<")); save("exif-zero.jpg", rgb, quality=90, exif=exif(0))
save("xmp.jpg", rgb, quality=90, xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>')
for name, sub in [("444", 0), ("422", 1), ("420", 2)]:
    save(f"{name}.jpg", rgb, quality=90, subsampling=sub)
    save(f"{name}-progressive.jpg", rgb, quality=90, subsampling=sub, progressive=True)
save("restart.jpg", rgb, quality=90, restart_marker_blocks=1); save("gray.jpg", gray, quality=90)
save("rgb.jpg", rgb, quality=90, keep_rgb=True); save("cmyk.jpg", rgb.convert("CMYK"), quality=90)
c = files["cmyk.jpg"]
at = c.index(b"Adobe")
files["ycck.jpg"] = c[:at + 11] + b"\2" + c[at + 12:]  # the same numbers, called YCCK
files["cmyk-plain.jpg"] = c[:at - 4] + c[at + 12:]  # without Adobe's marker
files["trailing.jpg"] = files["420.jpg"] + b"\0" * 7 + files["gray.jpg"]  # as phones append a second picture
# WebP, GIF, BMP
save("lossy.webp", rgb, quality=80); save("lossless.webp", rgb, lossless=True)
save("alpha.webp", rgba, lossless=True, exact=True); save("exif.webp", rgb, lossless=True, exif=exif(3))
other = Image.fromarray(255 - ramp)
save("animated.webp", rgb, save_all=True, append_images=[other], lossless=True, duration=50)
save("still.gif", rgb.quantize(32)); save("animated.gif", rgb.quantize(32), save_all=True, append_images=[other.quantize(32)])
save("clear.gif", rgb.quantize(32), transparency=5)
g = files["still.gif"]
files["offset.gif"] = g[:6] + struct.pack("<HH", W + 6, H + 4) + g[10:]
at = files["offset.gif"].index(b",\0\0\0\0" + struct.pack("<HH", W, H))
files["offset.gif"] = files["offset.gif"][:at + 1] + struct.pack("<HH", 4, 2) + files["offset.gif"][at + 5:]
g = files["clear.gif"]  # transparent, and reaches over the screen
at = g.index(b",\0\0\0\0" + struct.pack("<HH", W, H))
files["beyond.gif"] = g[:at + 1] + struct.pack("<HH", 3, 5) + g[at + 5:]
save("rgb.bmp", rgb); save("palette.bmp", rgb.quantize(16)); save("one-bit.bmp", gray.convert("1")); save("gray.bmp", gray)
save("rgba.bmp", rgba)
bmp("555.bmp", 16, [(ramp[r].astype(np.uint16) >> 3 << np.array([10, 5, 0])).sum(-1).astype("<u2").tobytes() for r in range(H)])
bmp("565.bmp", 16, [((ramp[r].astype(np.uint16) >> np.array([3, 2, 3])) << np.array([11, 5, 0])).sum(-1).astype("<u2").tobytes() for r in range(H)], (0xF800, 0x7E0, 0x1F))
# Refused
for name in ["420.jpg", "420-progressive.jpg", "rgb.png", "lossy.webp", "still.gif", "rgb.bmp"]:
    stem, end = name.rsplit(".", 1)
    files[f"cut-{stem}.{end}"] = files[name][:len(files[name]) * 3 // 4]
files["no-end.jpg"] = files["444.jpg"][:-2]
files["no-end.webp"] = files["lossy.webp"][:-1]

os.makedirs(OUT, exist_ok=True)
expected = {}
for name, data in files.items():
    with open(os.path.join(OUT, name), "wb") as f:
        f.write(data)
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        expected[name] = [image.width, image.height, base64.b64encode(image.tobytes()).decode()]
    except OSError:
        expected[name] = None
with open(os.path.join(OUT, "expected.json"), "w") as f:
    f.write("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(expected.items())) + "\n}\n")
print(len(expected), "files,", sum(map(len, files.values())), "bytes; refused:", [k for k, v in expected.items() if v is None])
