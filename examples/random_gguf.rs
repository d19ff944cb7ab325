//! Writes a Qwen2 text model with random weights, for measuring speed: every block is valid, no
//! token means anything. The file is streamed, so the shape of a 72B model needs no memory.
//!
//! ```text
//! cargo run --release --example random_gguf -- --shape 1.5b --type mbq3 -o random.gguf
//! ```

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use half::f16;
use mbq_convert::random::Rng;

#[derive(Parser)]
struct Args {
    /// Shape of the model
    #[arg(long)]
    shape: ShapeName,
    /// Type of the decoder's linear weights
    #[arg(long = "type")]
    kind: Kind,
    /// Type of the embeddings and of the output matrix
    #[arg(long, default_value = "q6k")]
    head: Kind,
    /// Number of decoder blocks, if not that of the shape
    #[arg(long)]
    layers: Option<u32>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(short, long)]
    output: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum ShapeName {
    #[value(name = "0.5b")]
    B05,
    #[value(name = "1.5b")]
    B15,
    #[value(name = "7b")]
    B7,
    #[value(name = "72b")]
    B72,
}

struct Shape {
    hidden: u64,
    layers: u32,
    ffn: u64,
    heads: u64,
    kv_heads: u64,
    vocabulary: u64,
    tied: bool,
}

impl ShapeName {
    fn shape(self) -> Shape {
        let (hidden, layers, ffn, heads, kv_heads, vocabulary, tied) = match self {
            Self::B05 => (896, 24, 4864, 14, 2, 151936, true),
            Self::B15 => (1536, 28, 8960, 12, 2, 151936, true),
            Self::B7 => (3584, 28, 18944, 28, 4, 152064, false),
            Self::B72 => (8192, 80, 29568, 64, 8, 152064, false),
        };
        Shape { hidden, layers, ffn, heads, kv_heads, vocabulary, tied }
    }
}

/// A ggml type: what of its blocks has to be more than random bytes.
#[derive(Clone, Copy, ValueEnum, PartialEq)]
enum Kind {
    F32,
    F16,
    Q4_0,
    Q8_0,
    Q3K,
    Q4K,
    Q6K,
    Iq3S,
    Iq4Xs,
    Mbq3,
}

struct Layout {
    id: u32,
    /// `general.file_type` of a model that is mostly of this type
    file_type: u32,
    block: u64,
    bytes: u64,
    /// byte offset of the block's fp16 scale, its value, and the fp16 that follows it, if any
    scale: (usize, f32, Option<f32>),
}

impl Kind {
    fn layout(self) -> Layout {
        // The scales give weights of about ±0.05, so that activations stay finite.
        let (id, file_type, block, bytes, scale) = match self {
            Self::F32 => (0, 0, 1, 4, (0, 0.0, None)),
            Self::F16 => (1, 1, 1, 2, (0, 0.0, None)),
            Self::Q4_0 => (2, 2, 32, 18, (0, 0.006, None)),
            Self::Q8_0 => (8, 7, 32, 34, (0, 0.0004, None)),
            Self::Q3K => (11, 11, 256, 110, (108, 0.0004, None)),
            Self::Q4K => (12, 14, 256, 144, (0, 0.0001, Some(0.0007))),
            Self::Q6K => (14, 18, 256, 210, (208, 0.00001, None)),
            Self::Iq3S => (21, 26, 256, 110, (0, 0.0002, None)),
            Self::Iq4Xs => (23, 30, 256, 136, (0, 0.00001, None)),
            Self::Mbq3 => (192, 192, 128, 52, (0, 0.014, Some(-0.049))),
        };
        Layout { id, file_type, block, bytes, scale }
    }

    /// The type that llama-quantize falls back to for rows this type's blocks do not divide.
    fn for_columns(self, columns: u64) -> Self {
        if columns.is_multiple_of(self.layout().block) {
            return self;
        }
        let smaller = match self {
            Self::Q3K | Self::Q4K | Self::Iq3S | Self::Iq4Xs | Self::Mbq3 => Self::Q4_0,
            _ => Self::Q8_0,
        };
        if columns.is_multiple_of(32) { smaller } else { Self::F16 }
    }
}

struct Tensor {
    name: String,
    columns: u64,
    rows: u64,
    kind: Kind,
}

impl Tensor {
    fn bytes(&self) -> u64 {
        let layout = self.kind.layout();
        self.columns / layout.block * layout.bytes * self.rows
    }
}

const ALIGNMENT: u64 = 32;

fn tensors(shape: &Shape, kind: Kind, head: Kind) -> Vec<Tensor> {
    let mut all = Vec::new();
    let mut add = |name: String, columns: u64, rows: u64, kind: Kind| {
        all.push(Tensor { name, columns, rows, kind: kind.for_columns(columns) });
    };
    let hidden = shape.hidden;
    let kv = hidden / shape.heads * shape.kv_heads;
    add("token_embd.weight".into(), hidden, shape.vocabulary, head);
    for n in 0..shape.layers {
        let name = |rest: &str| format!("blk.{n}.{rest}");
        add(name("attn_norm.weight"), hidden, 1, Kind::F32);
        for (part, rows) in [("q", hidden), ("k", kv), ("v", kv)] {
            add(name(&format!("attn_{part}.weight")), hidden, rows, kind);
            add(name(&format!("attn_{part}.bias")), rows, 1, Kind::F32);
        }
        add(name("attn_output.weight"), hidden, hidden, kind);
        add(name("ffn_norm.weight"), hidden, 1, Kind::F32);
        add(name("ffn_gate.weight"), hidden, shape.ffn, kind);
        add(name("ffn_up.weight"), hidden, shape.ffn, kind);
        add(name("ffn_down.weight"), shape.ffn, hidden, kind);
    }
    add("output_norm.weight".into(), hidden, 1, Kind::F32);
    if !shape.tied {
        add("output.weight".into(), hidden, shape.vocabulary, head);
    }
    all
}

/// GGUF scalars and strings, little-endian.
#[derive(Default)]
struct Header {
    bytes: Vec<u8>,
    keys: u64,
}

impl Header {
    fn text(&mut self, value: &str) {
        self.bytes.extend((value.len() as u64).to_le_bytes());
        self.bytes.extend(value.as_bytes());
    }
    fn key(&mut self, key: &str, kind: u32) {
        self.text(key);
        self.bytes.extend(kind.to_le_bytes());
        self.keys += 1;
    }
    fn u32(&mut self, key: &str, value: u64) -> Result<()> {
        let value = u32::try_from(value).with_context(|| format!("{key} does not fit 32 bits"))?;
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
        Ok(())
    }
    fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }
    fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        self.text(value);
    }
}

fn write_tensor(out: &mut impl Write, tensor: &Tensor, random: &mut Rng) -> Result<()> {
    let layout = tensor.kind.layout();
    let mut row = vec![0u8; usize::try_from(tensor.columns / layout.block * layout.bytes)?];
    for _ in 0..tensor.rows {
        match tensor.kind {
            // norms and biases: near 1 and near 0
            Kind::F32 => {
                let centre = if tensor.name.ends_with(".weight") { 1.0 } else { 0.0 };
                for value in row.chunks_exact_mut(4) {
                    value.copy_from_slice(&(centre + 0.1 * random.uniform()).to_le_bytes());
                }
            }
            Kind::F16 => {
                for value in row.chunks_exact_mut(2) {
                    value.copy_from_slice(&f16::from_f32(0.05 * random.uniform()).to_le_bytes());
                }
            }
            _ => {
                for word in row.chunks_mut(8) {
                    word.copy_from_slice(&random.next_u64().to_le_bytes()[..word.len()]);
                }
                let (at, scale, second) = layout.scale;
                for block in row.chunks_exact_mut(usize::try_from(layout.bytes)?) {
                    block[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
                    if let Some(second) = second {
                        block[at + 2..at + 4].copy_from_slice(&f16::from_f32(second).to_le_bytes());
                    }
                }
            }
        }
        out.write_all(&row)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut shape = args.shape.shape();
    shape.layers = args.layers.unwrap_or(shape.layers);
    ensure!(args.kind != Kind::F32, "--type f32: F32 is kept for norms and biases");
    let tensors = tensors(&shape, args.kind, args.head);

    let mut header = Header::default();
    header.string("general.architecture", "qwen2");
    header.string("general.name", "random");
    header.u32("general.file_type", args.kind.layout().file_type.into())?;
    header.u32("qwen2.context_length", 32768)?;
    header.u32("qwen2.block_count", shape.layers.into())?;
    header.u32("qwen2.embedding_length", shape.hidden)?;
    header.u32("qwen2.feed_forward_length", shape.ffn)?;
    header.u32("qwen2.attention.head_count", shape.heads)?;
    header.u32("qwen2.attention.head_count_kv", shape.kv_heads)?;
    header.u32("qwen2.vocab_size", shape.vocabulary)?;
    header.f32("qwen2.rope.freq_base", 1e6);
    header.f32("qwen2.attention.layer_norm_rms_epsilon", 1e-6);
    header.string("tokenizer.ggml.model", "none");
    let keys = header.keys;

    let mut offset = 0u64;
    for tensor in &tensors {
        header.text(&tensor.name);
        let dimensions: &[u64] = if tensor.rows == 1 { &[tensor.columns] } else { &[tensor.columns, tensor.rows] };
        header.bytes.extend((dimensions.len() as u32).to_le_bytes());
        for dimension in dimensions {
            header.bytes.extend(dimension.to_le_bytes());
        }
        header.bytes.extend(tensor.kind.layout().id.to_le_bytes());
        header.bytes.extend(offset.to_le_bytes());
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }

    let at = || format!("cannot write {}", args.output.display());
    let mut out = BufWriter::with_capacity(1 << 20, File::create(&args.output).with_context(at)?);
    let mut start = b"GGUF".to_vec();
    start.extend(3u32.to_le_bytes());
    start.extend((tensors.len() as u64).to_le_bytes());
    start.extend(keys.to_le_bytes());
    start.extend(header.bytes);
    start.resize(start.len().next_multiple_of(ALIGNMENT as usize), 0);
    out.write_all(&start).with_context(at)?;

    let mut random = Rng::new(args.seed);
    for tensor in &tensors {
        write_tensor(&mut out, tensor, &mut random).with_context(at)?;
        let padding = tensor.bytes().next_multiple_of(ALIGNMENT) - tensor.bytes();
        out.write_all(&vec![0; padding as usize]).with_context(at)?;
    }
    out.flush().with_context(at)?;
    println!("{}: {} tensors, {offset} bytes of weights", args.output.display(), tensors.len());
    Ok(())
}
