//! Where the bytes go: by kind of tensor, and the bits of each.
use super::subject::Subject;
use crate::gguf::TensorInfo;
use crate::page::{TABLE_END, open_table, section, text};
use std::fmt::{Result, Write};

/// Kinds of tensors, in the bar's order.
const KINDS: [&str; 7] =
    ["Attention", "MLP", "Embedding", "Output head", "Norms and biases", "Other", "Vision tower and projector"];
const VISION: usize = 6;

/// The place in [`KINDS`] of the text model's tensor `name`.
fn kind(name: &str) -> usize {
    match name {
        n if n.contains("_norm") || n.ends_with(".bias") => 4,
        n if n.starts_with("token_embd.") => 2,
        "output.weight" => 3,
        n if n.contains(".attn_") => 0,
        n if n.contains(".ffn_") => 1,
        _ => 5,
    }
}

pub fn write(s: &Subject, out: &mut String) -> Result {
    let mut shares = [(0u64, 0u64); KINDS.len()];
    for t in &s.file.tensors {
        let share = &mut shares[kind(&t.name)];
        *share = (share.0 + t.size.unwrap_or(0), share.1 + t.elements() as u64);
    }
    if let Some(vision) = &s.record.summary.mmproj {
        shares[VISION] = (vision.types.iter().map(|t| t.1).sum(), vision.parameters as u64);
    }
    let total: u64 = shares.iter().map(|s| s.0).sum();
    section(out, "bytes", "Where the bytes go")?;
    out.push_str(
        "<p>Only the large matrices of the language model are rounded hard; the rest keeps more bits, and may \
                  be what a small model’s file mostly is.</p>\n<div class=\"stack\" aria-hidden=\"true\">",
    );
    let share = |bytes: u64| 100.0 * bytes as f64 / total.max(1) as f64;
    let present = || shares.iter().enumerate().filter(|(_, s)| s.0 > 0);
    for (i, (bytes, _)) in present() {
        write!(out, "<span class=\"k{i}\" style=\"width:{:.2}%\"></span>", share(*bytes))?;
    }
    out.push_str("</div>\n");
    open_table(out, "", "Bytes by kind of tensor", "", &["Kind", "#MB", "#%", "#bits per weight"].map(String::from))?;
    for (i, (bytes, weights)) in present() {
        writeln!(
            out,
            "<tr><th scope=\"row\"><span class=\"key k{i}\" aria-hidden=\"true\"></span>{}</th><td class=\"n\">{:.2}</td>\
             <td class=\"n\">{:.1}</td><td class=\"n\">{:.2}</td></tr>",
            KINDS[i],
            *bytes as f64 / 1e6,
            share(*bytes),
            8.0 * *bytes as f64 / (*weights).max(1) as f64
        )?;
    }
    out.push_str(TABLE_END);
    tensors(s, out)?;
    fallbacks(s, out)?;
    out.push_str("</section>\n");
    Ok(())
}

/// Tensors of one name but for the block's number.
struct Alike {
    name: String,
    count: usize,
    bytes: u64,
    weights: usize,
    /// Each type and the blocks that have it.
    types: Vec<(String, Vec<usize>)>,
}

fn alike(all: &[TensorInfo]) -> Vec<Alike> {
    let mut out: Vec<Alike> = Vec::new();
    for t in all {
        let block = t.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let block = block.and_then(|(number, part)| Some((number.parse().ok()?, part)));
        let name = block.map_or_else(|| t.name.clone(), |(_, part)| format!("blk.*.{part}"));
        let i = out.iter().position(|a| a.name == name).unwrap_or_else(|| {
            out.push(Alike { name, count: 0, bytes: 0, weights: 0, types: Vec::new() });
            out.len() - 1
        });
        let a = &mut out[i];
        a.count += 1;
        a.bytes += t.size.unwrap_or(0);
        a.weights += t.elements();
        let ty = t.ty().map_or_else(|| format!("type {}", t.type_id), |ty| ty.name().into());
        let number = block.map(|b: (usize, &str)| b.0);
        match a.types.iter_mut().find(|(name, _)| *name == ty) {
            Some((_, blocks)) => blocks.extend(number),
            None => a.types.push((ty, number.into_iter().collect())),
        }
    }
    out.sort_by_key(|a| std::cmp::Reverse(a.bytes));
    out
}

/// `0–3, 5`.
fn ranges(numbers: &[usize]) -> String {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for n in sorted {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == n => *end = n,
            _ => runs.push((n, n)),
        }
    }
    let run = |&(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}–{b}") };
    runs.iter().map(run).collect::<Vec<_>>().join(", ")
}

fn tensors(s: &Subject, out: &mut String) -> Result {
    out.push_str("<details><summary>Bits by tensor</summary>\n");
    let columns = ["Tensor", "#how many", "Type", "#bits per weight", "#MB"].map(String::from);
    open_table(out, "", "Bits by tensor", "", &columns)?;
    for a in alike(&s.file.tensors) {
        let of = |(ty, blocks): &(String, Vec<usize>)| match a.types.len() {
            1 => ty.clone(),
            _ => format!("{ty} in {}", ranges(blocks)),
        };
        let types = a.types.iter().map(of).collect::<Vec<_>>().join("; ");
        writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td class=\"n\">{}</td><td>{}</td><td class=\"n\">{:.2}</td><td class=\"n\">{:.2}</td></tr>",
            text(&a.name),
            a.count,
            text(&types),
            8.0 * a.bytes as f64 / a.weights.max(1) as f64,
            a.bytes as f64 / 1e6
        )?;
    }
    writeln!(out, "{TABLE_END}</details>")
}

/// Tensors that got another type than was asked for.
fn fallbacks(s: &Subject, out: &mut String) -> Result {
    let summary = &s.record.summary;
    let all: Vec<_> = std::iter::once(&summary.model).chain(&summary.mmproj).flat_map(|w| &w.fallbacks).collect();
    if all.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "<h3>What fell back</h3>\n<p>A type stores weights in blocks of fixed length, which the rows of these {} tensors do not \
         fill: they got a type that fits.</p>",
        all.len()
    )?;
    open_table(out, "", "Tensors of another type", "", &["Tensor", "#row", "asked for", "got"].map(String::from))?;
    for f in all {
        writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td class=\"n\">{}</td><td>{}</td><td>{}</td></tr>",
            text(&f.tensor),
            f.row,
            text(&f.wanted),
            text(&f.used)
        )?;
    }
    out.push_str(TABLE_END);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_told_shortly() {
        assert_eq!(ranges(&[7, 0, 1, 2, 5]), "0–2, 5, 7");
        assert_eq!(ranges(&[]), "");
    }

    #[test]
    fn every_kind_has_its_tensors() {
        let of = |name: &str| KINDS[kind(name)];
        assert_eq!(of("blk.0.attn_norm.weight"), "Norms and biases");
        assert_eq!(of("blk.0.attn_q.bias"), "Norms and biases");
        assert_eq!(of("blk.0.attn_output.weight"), "Attention");
        assert_eq!(of("blk.11.ffn_down.weight"), "MLP");
        assert_eq!((of("output.weight"), of("output_norm.weight")), ("Output head", "Norms and biases"));
        assert_eq!((of("token_embd.weight"), of("rope_freqs.weight")), ("Embedding", "Other"));
    }
}
