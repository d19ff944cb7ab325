//! What llama.cpp takes for granted of a GGUF file: where it does not hold, it ends the whole program, reads what is not
//! there, or asks for all memory. A file is refused here first, by key or tensor.
//!
//! Its loader of language models checks types, counts and shapes of most keys and tensors itself; clip.cpp, which loads
//! vision files, checks few. Ranges are generous: no published model comes near their ends.
use crate::ggml::GgmlType;
use crate::gguf::{GgufFile, ReadError, TensorInfo, Value};
use std::collections::{BTreeMap, BTreeSet};

/// What llama.cpp reads a key of a vision file as; it stops where the file says otherwise.
#[derive(Clone, Copy)]
enum Kind {
    /// U32 from the first to the second number.
    Count(u64, u64),
    /// F32, finite and not negative.
    Float,
    Bool,
    Text,
    I32,
}

const BIG: u64 = i32::MAX as u64;

/// Keys behind `clip.` that clip.cpp reads, those of all projectors.
#[rustfmt::skip]
const KEYS: &[(&str, Kind)] = &[
    ("has_vision_encoder", Kind::Bool), ("has_audio_encoder", Kind::Bool), ("has_gen_audio_encoder", Kind::Bool),
    ("use_gelu", Kind::Bool), ("use_silu", Kind::Bool), ("projector_type", Kind::Text),
    ("minicpmv_version", Kind::I32), ("minicpmv_query_num", Kind::Count(0, 1 << 16)),
    ("vision.projector_type", Kind::Text), ("vision.image_resize_algo", Kind::Text), ("vision.mm_patch_merge_type", Kind::Text),
    ("vision.pad_to_square", Kind::Bool), ("vision.center_crop", Kind::Bool), ("vision.torchvision_resize", Kind::Bool),
    ("vision.attention.layer_norm_epsilon", Kind::Float), ("vision.preproc_max_pixels_tolerance", Kind::Float),
    ("vision.swiglu_clamp", Kind::Float),
    ("vision.image_size", Kind::Count(1, 1 << 14)), ("vision.patch_size", Kind::Count(1, 1 << 10)),
    ("vision.embedding_length", Kind::Count(1, 1 << 20)), ("vision.feed_forward_length", Kind::Count(0, 1 << 22)),
    ("vision.block_count", Kind::Count(0, 1 << 12)), ("vision.projection_dim", Kind::Count(0, 1 << 22)),
    ("vision.attention.head_count", Kind::Count(1, 1 << 12)), ("vision.attention.head_count_kv", Kind::Count(1, 1 << 12)),
    ("vision.attention.head_dim", Kind::Count(1, 1 << 16)), ("vision.spatial_merge_size", Kind::Count(1, 64)),
    ("vision.projector.scale_factor", Kind::Count(1, 64)), ("vision.projector.query_side", Kind::Count(1, 1 << 12)),
    ("vision.projector.window_side", Kind::Count(1, 1 << 12)), ("vision.n_wa_pattern", Kind::Count(0, 1 << 12)),
    ("vision.window_size", Kind::Count(1, 1 << 14)), ("vision.image_min_pixels", Kind::Count(0, 1 << 26)),
    ("vision.image_max_pixels", Kind::Count(1, BIG)), ("vision.preproc_image_size", Kind::Count(1, 1 << 14)),
    ("vision.preproc_tile_size", Kind::Count(1, 1 << 14)), ("vision.preproc_min_tiles", Kind::Count(0, 1 << 10)),
    ("vision.preproc_max_tiles", Kind::Count(0, 1 << 10)), ("vision.anyres_max", Kind::Count(0, 1 << 10)),
    ("vision.max_slice_nums", Kind::Count(0, 1 << 10)), ("vision.expert_used_count", Kind::Count(0, 1 << 10)),
    ("vision.sam.head_count", Kind::Count(1, 1 << 12)), ("vision.sam.block_count", Kind::Count(0, 1 << 12)),
    ("vision.sam.embedding_length", Kind::Count(1, 1 << 20)),
];

/// Projectors whose towers are rows of `v.blk.N`, as the families of this program have them.
const PLAIN: [&str; 8] = [
    "mlp",
    "llava_onevision",
    "qwen2vl_merger",
    "qwen2.5vl_merger",
    "qwen3vl_merger",
    "internvl",
    "idefics3",
    "gemma3",
];

/// Refuses what llama.cpp would not survive: of a vision file (mmproj) its keys and shapes, too.
///
/// # Errors
/// What is wrong, by key or tensor.
pub fn check(file: &GgufFile) -> Result<(), ReadError> {
    let unfit = |what: String| ReadError::Unfit { path: file.path.clone(), what: format!("{what}; {ADVICE}") };
    layout(file).map_err(unfit)?;
    if !file.is_projector() {
        text(file).map_err(unfit)?;
    } else {
        keys(file)
            .and_then(|()| relations(file))
            .and_then(|()| tower(file))
            .and_then(|()| siblings(file))
            .and_then(|()| unread(file))
            .map_err(unfit)?;
    }
    Ok(())
}

const ADVICE: &str = "llama.cpp would fail on it: fetch or convert the file again";

type Found = Result<(), String>;

/// Of any file: names, sizes and places of tensors.
fn layout(file: &GgufFile) -> Found {
    match file.metadata.get("general.alignment") {
        None => (),
        Some(Value::U32(alignment)) if alignment % 32 == 0 => (),
        Some(other) => return Err(format!("general.alignment is {other:?}, not a U32 that 32 divides")),
    }
    // Epsilons, bases, factors: llama.cpp calculates with whatever they are.
    for (key, value) in file.metadata.iter() {
        let Value::F32(x) = value else { continue };
        let positive = key.ends_with(".freq_base") || key.ends_with("epsilon") && *x != 0.0;
        if !x.is_finite() || positive && *x <= 0.0 {
            return Err(format!("{key} is {x}"));
        }
    }
    for t in &file.tensors {
        if t.name.is_empty() || t.name.len() > 63 {
            return Err(format!("tensor `{}` has a name of {} bytes, not 1 to 63", t.name, t.name.len()));
        }
        // gguf.cpp makes an enumerator of it before it looks.
        if t.type_id > 255 {
            return Err(format!("tensor `{}` has type {}", t.name, t.type_id));
        }
        if t.elements() == 0 || t.shape.iter().any(|d| *d > BIG as usize) {
            return Err(format!("tensor `{}` has the shape {:?}", t.name, t.shape));
        }
    }
    Ok(())
}

/// Of a language model: its vocabulary, and what its graph is made by.
fn text(file: &GgufFile) -> Found {
    // llama.cpp would split texts in a way that no model was trained with.
    if file.metadata.str("tokenizer.ggml.model") == Some("gpt2") && file.metadata.str("tokenizer.ggml.pre").is_none() {
        return Err("tokenizer.ggml.pre is missing, which says how texts are split: make the file anew".into());
    }
    let list = |key: &str| file.metadata.get(&format!("tokenizer.ggml.{key}")).and_then(Value::as_array);
    if let Some(tokens) = list("tokens").map(|tokens| tokens.len()) {
        for key in ["scores", "token_type"] {
            if let Some(other) = list(key).map(|other| other.len()).filter(|other| *other != tokens) {
                return Err(format!("tokenizer.ggml.{key} has {other} entries for {tokens} tokens"));
            }
        }
        for (key, value) in file.metadata.iter() {
            let is_id = key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id");
            if is_id && value.as_u64().is_none_or(|id| id >= tokens as u64) {
                return Err(format!("{key} is {}, no id of the {tokens} tokens", shown(value)));
            }
        }
    }
    let size = |key: &str| file.arch_u64(key);
    // llama.cpp's own bound.
    if let Some(blocks) = size("block_count").filter(|blocks| !(1..=512).contains(blocks)) {
        return Err(format!("{}.block_count is {blocks}, not from 1 to 512", file.architecture()));
    }
    // Features of the tower are added behind blocks, but not behind the last, where only the tokens that are asked for are left.
    if let (Some(deep), Some(blocks)) = (size("n_deepstack_layers"), size("block_count"))
        && deep >= blocks
    {
        return Err(format!(
            "{}.n_deepstack_layers is {deep}, not less than block_count {blocks}",
            file.architecture()
        ));
    }
    let head =
        size("embedding_length").zip(size("attention.head_count")).and_then(|(width, heads)| width.checked_div(heads));
    match (size("rope.dimension_count"), size("attention.key_length").or(head)) {
        (Some(turned), Some(head)) if turned % 2 != 0 || turned > head => {
            Err(format!("{}.rope.dimension_count is {turned}, of heads of {head}", file.architecture()))
        }
        _ => Ok(()),
    }
}

/// Types and ranges of the keys.
fn keys(file: &GgufFile) -> Found {
    for (key, value) in file.metadata.iter() {
        let kind = match key.strip_prefix("clip.") {
            Some(rest) => KEYS.iter().find(|(name, _)| *name == rest).map(|(_, kind)| *kind),
            None => ["general.name", "general.description"].contains(&key).then_some(Kind::Text),
        };
        let (fits, want) = match (kind, value) {
            (None, _) => (true, String::new()),
            (Some(Kind::Count(least, most)), Value::U32(n)) => {
                ((least..=most).contains(&u64::from(*n)), format!("from {least} to {most}"))
            }
            (Some(Kind::Count(..)), _) => (false, "a U32".into()),
            (Some(Kind::Float), Value::F32(x)) => (x.is_finite() && *x >= 0.0, "finite and not negative".into()),
            (Some(Kind::Float), _) => (false, "an F32".into()),
            (Some(Kind::Bool), v) => (matches!(v, Value::Bool(_)), "a Bool".into()),
            (Some(Kind::Text), v) => (matches!(v, Value::String(_)), "a String".into()),
            (Some(Kind::I32), v) => (matches!(v, Value::I32(_)), "an I32".into()),
        };
        if !fits {
            return Err(format!("{key} is {}, not {want}", shown(value)));
        }
    }
    Ok(())
}

fn shown(value: &Value) -> String {
    let text = format!("{value:?}");
    if text.len() > 60 { text.chars().take(60).chain("…".chars()).collect() } else { text }
}

fn count(file: &GgufFile, key: &str) -> Option<usize> {
    file.metadata.u64(&format!("clip.vision.{key}")).and_then(|n| usize::try_from(n).ok())
}

/// What keys say of each other.
fn relations(file: &GgufFile) -> Found {
    let array = |key: &str| file.metadata.get(&format!("clip.vision.{key}")).and_then(Value::as_array);
    for key in ["image_mean", "image_std"] {
        let Some(values) = array(key) else { continue };
        let values: Vec<f64> = values.iter().filter_map(|v| v.as_f64()).collect();
        let fits = |x: &f64| x.is_finite() && x.abs() < 1e6 && (key == "image_mean" || *x != 0.0);
        if values.len() < 3 || !values.iter().all(fits) {
            return Err(format!("clip.vision.{key} is {values:?}, not three numbers to shift or scale colours by"));
        }
    }
    if let Some(sides) = array("image_grid_pinpoints")
        && let Some(bad) = sides.iter().find(|v| v.as_i64().is_none_or(|side| !(1..=1 << 14).contains(&side)))
    {
        return Err(format!("clip.vision.image_grid_pinpoints holds {bad:?}, not the side of a picture"));
    }
    if let (Some(image), Some(patch)) = (count(file, "image_size"), count(file, "patch_size"))
        && image < patch
    {
        return Err(format!("clip.vision.image_size {image} is less than clip.vision.patch_size {patch}"));
    }
    if let (Some(least), Some(most)) = (count(file, "image_min_pixels"), count(file, "image_max_pixels"))
        && least > most
    {
        return Err(format!("clip.vision.image_min_pixels {least} is more than clip.vision.image_max_pixels {most}"));
    }
    let (Some(width), Some(heads)) = (count(file, "embedding_length"), count(file, "attention.head_count")) else {
        return Ok(());
    };
    match width.checked_rem(heads) {
        Some(0) => Ok(()),
        _ if count(file, "attention.head_dim").is_some() => Ok(()),
        _ => Err(format!("clip.vision.embedding_length {width} does not divide into attention.head_count {heads}")),
    }
}

/// Shapes of the towers that this program writes, too.
fn tower(file: &GgufFile) -> Found {
    let kind = file.metadata.str("clip.projector_type").unwrap_or_default();
    let size = |key: &str| count(file, key);
    let (Some(width), Some(inner), Some(heads), true) =
        (size("embedding_length"), size("feed_forward_length"), size("attention.head_count"), PLAIN.contains(&kind))
    else {
        return Ok(());
    };
    let rotated = kind.starts_with("qwen");
    if rotated && width / heads % 4 != 0 {
        return Err(format!("clip.vision.attention.head_count {heads} makes heads of {}, not 4n", width / heads));
    }
    let cells = size("image_size").unwrap_or(0) / size("patch_size").unwrap_or(1).max(1);
    let merge = size("projector.scale_factor").unwrap_or(1);
    if ["internvl", "idefics3", "gemma3"].contains(&kind) && (cells < merge || cells % merge != 0) {
        return Err(format!(
            "clip.vision.projector.scale_factor {merge} does not divide the {cells} patches of a side"
        ));
    }
    // What clip.cpp takes where the file does not say.
    let unsaid = if rotated { 2 } else { 1 };
    let rows = width * size("spatial_merge_size").or(size("projector.scale_factor")).unwrap_or(unsaid).pow(2);
    for t in &file.tensors {
        let float = |ty: GgmlType| matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        if t.ty().is_some_and(|ty| !float(ty) && (trimmed(t).len() < 2 || !ty.is_quantized())) {
            return Err(format!("tensor `{}` has type {}, which its place does not take", t.name, t.type_id));
        }
        let wanted = match t.name.strip_prefix("v.blk.").and_then(|rest| rest.split_once('.')) {
            Some((_, part)) => in_block(part, trimmed(t), width, inner),
            None if joins(kind, &t.name) => {
                (trimmed(t).first() != Some(&rows)).then(|| format!("rows of {rows}: patches that are merged"))
            }
            None => outside(t, width, (cells * cells, rotated), size("patch_size").unwrap_or(0)),
        };
        if let Some(wanted) = wanted {
            return Err(format!("tensor `{}` has the shape {:?}, not {wanted}", t.name, t.shape));
        }
    }
    Ok(())
}

/// Tensors that one block or layer lacks and another has. llama.cpp leaves a bias out that it does not find.
fn siblings(file: &GgufFile) -> Found {
    let kind = file.metadata.str("clip.projector_type").unwrap_or_default();
    if !PLAIN.contains(&kind) {
        return Ok(());
    }
    let mut blocks: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for t in &file.tensors {
        if let Some((block, part)) = t.name.strip_prefix("v.blk.").and_then(|rest| rest.split_once('.')) {
            blocks.entry(block).or_default().insert(part);
        }
    }
    let parts: BTreeSet<&str> = blocks.values().flatten().copied().collect();
    for (block, own) in &blocks {
        if let Some(part) = parts.difference(own).next() {
            return Err(format!("tensor `v.blk.{block}.{part}` is missing, which other blocks have"));
        }
    }
    let is_linear = |t: &&TensorInfo| t.name.starts_with("mm.") && t.name.ends_with(".weight") && trimmed(t).len() == 2;
    let biases = file.tensors.iter().filter(is_linear).map(|t| t.name.trim_end_matches("weight").to_owned() + "bias");
    let (there, missing): (Vec<_>, Vec<_>) = biases.partition(|bias| file.tensors.iter().any(|t| t.name == *bias));
    match missing.first() {
        Some(bias) if !there.is_empty() => Err(format!("tensor `{bias}` is missing; `{}` is there", there[0])),
        _ => Ok(()),
    }
}

/// Tensors that clip.cpp asks for under no name: it leaves out an optional one whose name is damaged.
fn unread(file: &GgufFile) -> Found {
    let kind = file.metadata.str("clip.projector_type").unwrap_or_default();
    match file.tensors.iter().find(|t| PLAIN.contains(&kind) && !is_read(&t.name)) {
        Some(t) => Err(format!("tensor `{}` is none that llama.cpp reads of a vision file of the kind {kind}", t.name)),
        None => Ok(()),
    }
}

/// Whether a tensor's name is one that clip.cpp has for the projectors of [`PLAIN`].
fn is_read(name: &str) -> bool {
    #[rustfmt::skip]
    const BLOCK: [&str; 17] = [
        "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_out", "attn_q_norm", "attn_k_norm", "attn_post_norm",
        "ln1", "ln2", "ls1", "ls2", "out_scale", "ffn_up", "ffn_gate", "ffn_down", "ffn_post_norm",
    ];
    #[rustfmt::skip]
    const OUTSIDE: [&str; 14] = [
        "v.patch_embd", "v.pre_ln", "v.post_ln", "mm.0", "mm.1", "mm.2", "mm.3", "mm.4", "mm.model.mlp.0",
        "mm.model.mlp.1", "mm.model.mlp.3", "mm.model.fc", "mm.input_projection", "mm.soft_emb_norm",
    ];
    // The last is LLaVA-NeXT's of older converters.
    const WHOLE: [&str; 5] =
        ["v.class_embd", "v.position_embd.weight", "v.patch_embd.weight.1", "v.image_newline", "model.image_newline"];
    // The text half of a CLIP, and towers for sound: not of pictures.
    const OTHERS: [&str; 5] = ["t.", "a.", "mm.a.", "text_projection", "visual_projection"];
    let part_of = |group: &str| {
        let (number, part) = name.strip_prefix(group)?.split_once('.')?;
        number.parse::<u32>().is_ok().then_some(part)
    };
    let one_of = |part: &str, names: &[&str]| {
        part.strip_suffix(".weight").or(part.strip_suffix(".bias")).is_some_and(|part| names.contains(&part))
    };
    WHOLE.contains(&name)
        || OTHERS.iter().any(|start| name.starts_with(start))
        || one_of(name, &OUTSIDE)
        || part_of("v.blk.").is_some_and(|part| one_of(part, &BLOCK))
        || part_of("v.deepstack.").is_some_and(|part| one_of(part, &["norm", "fc1", "fc2"]))
}

/// Whether a tensor takes patches that are merged already.
fn joins(kind: &str, name: &str) -> bool {
    match kind {
        "internvl" => name == "mm.model.mlp.0.weight",
        "idefics3" => name == "mm.model.fc.weight",
        _ => kind.starts_with("qwen") && name == "mm.0.weight",
    }
}

/// Without the dimensions of 1 behind the last that is more.
fn trimmed(t: &TensorInfo) -> &[usize] {
    &t.shape[..t.shape.iter().rposition(|d| *d != 1).map_or(0, |last| last + 1)]
}

/// What shape a tensor of a block should have, where it has another. Older converters exchange the MLP's two linears.
fn in_block(part: &str, shape: &[usize], width: usize, inner: usize) -> Option<String> {
    let (name, is_weight) = match part.rsplit_once('.')? {
        (name, "weight") => (name, true),
        (name, "bias") => (name, false),
        _ => return None,
    };
    let one_of = |shapes: &[&[usize]]| (!shapes.contains(&shape)).then(|| format!("{:?}", shapes[0]));
    match (name, is_weight) {
        ("attn_q" | "attn_k" | "attn_v" | "attn_out", true) => one_of(&[&[width, width]]),
        ("attn_qkv", true) => one_of(&[&[width, 3 * width]]),
        ("attn_qkv", false) => one_of(&[&[3 * width]]),
        ("ffn_up" | "ffn_gate", true) => one_of(&[&[width, inner], &[inner, width]]),
        ("ffn_down", true) => one_of(&[&[inner, width], &[width, inner]]),
        ("ffn_up" | "ffn_gate" | "ffn_down", false) => one_of(&[&[inner], &[width]]),
        ("attn_q" | "attn_k" | "attn_v" | "attn_out", false) => one_of(&[&[width]]),
        ("ln1" | "ln2", _) => one_of(&[&[width]]),
        _ => None,
    }
}

/// The same of a tensor before or behind the blocks; `resized`: positions are, to the picture, as Qwen's.
fn outside(t: &TensorInfo, width: usize, (cells, resized): (usize, bool), patch: usize) -> Option<String> {
    let shape = trimmed(t);
    let fits = match t.name.as_str() {
        "v.patch_embd.weight" | "v.patch_embd.weight.1" => shape == [patch, patch, 3, width],
        // One more where the tower has a token of its own.
        "v.position_embd.weight" => {
            let rows = shape.get(1).copied().unwrap_or(1);
            shape.first() == Some(&width) && (resized || rows == cells || rows == cells + 1)
        }
        "v.patch_embd.bias" | "v.class_embd" | "v.pre_ln.weight" | "v.pre_ln.bias" | "v.post_ln.weight"
        | "v.post_ln.bias" => shape == [width],
        _ => true,
    };
    (!fits).then(|| format!("that of a tower {width} wide, of {cells} patches of {patch}"))
}
