//! What rounding did, block by block: the output's error, each linear's before and after compensation, and how
//! sensitive the model's loss is to errors at pictures' and answers' tokens.
use super::noted::Noted;
use super::subject::Subject;
use crate::calibrate::compensate::Compensated;
use crate::page::plot::{Cells, Line, cells, lines};
use crate::page::{TABLE_END, open_table, section, text};
use std::fmt::{Result, Write};

pub fn write(s: &Subject, out: &mut String) -> Result {
    let Some(noted) = &s.noted else { return Ok(()) };
    if !noted.compensated.is_empty() {
        blocks(&noted.compensated, out)?;
        linears(&noted.compensated, out)?;
    }
    if !noted.sensitivities.is_empty() {
        sensitivities(noted, out)?;
    }
    if noted.blocks.iter().any(|b| !b.is_empty()) {
        scales(noted, out)?;
    }
    Ok(())
}

/// What the lines of two kinds of token are called; `dashed` names those of a second place.
fn legend(out: &mut String, names: [&str; 2], dashed: &str) -> Result {
    writeln!(
        out,
        "<p class=\"legend\"><span class=\"key s0\" aria-hidden=\"true\"></span>{} <span class=\"key s1\" \
         aria-hidden=\"true\"></span>{}{dashed}</p>",
        names[0], names[1]
    )
}

/// A table under a fold, for those who want numbers, and for readers of screens.
fn numbers(out: &mut String, label: &str, columns: &[String], rows: impl Iterator<Item = Vec<String>>) -> Result {
    out.push_str("<details><summary>The numbers</summary>\n");
    open_table(out, "", label, "", columns)?;
    for row in rows {
        out.push_str("<tr>");
        for (i, cell) in row.iter().enumerate() {
            match i {
                0 => write!(out, "<th scope=\"row\">{cell}</th>")?,
                _ => write!(out, "<td class=\"n\">{cell}</td>")?,
            }
        }
        out.push_str("</tr>\n");
    }
    writeln!(out, "{TABLE_END}</details>")
}

fn percent(v: f64) -> String {
    match 100.0 * v {
        p if !p.is_finite() => "–".into(),
        0.0 => "0".into(),
        p if p < 0.01 => format!("{p:.1e}"),
        p if p < 1.0 => format!("{p:.3}"),
        p => format!("{p:.2}"),
    }
}

fn blocks(all: &[Compensated], out: &mut String) -> Result {
    section(out, "blocks", "Error by block")?;
    out.push_str(
        "<p>How far each block’s output is from the unrounded model’s, as a share of its size: blocks run one after the other, \
         and errors add up on the way. Lower is better.</p>\n<figure>\n",
    );
    legend(out, ["at pictures’ tokens", "at text tokens"], "")?;
    let values = |pick: fn(&Compensated) -> f64| all.iter().map(pick).collect();
    let both = [Line { class: "s0", values: values(|b| b.vision) }, Line { class: "s1", values: values(|b| b.text) }];
    lines(
        out,
        &both,
        "Error of each block’s output at vision and text tokens; the table below has its numbers",
        "error, squared",
    )?;
    out.push_str(
        "<figcaption>Squared error of the block’s output over its square, both streams as rounding left them, on the \
         calibration data (logarithmic).</figcaption>\n</figure>\n",
    );
    let columns = ["Block", "#pictures, %", "#text, %"].map(String::from);
    let row = |(i, b): (usize, &Compensated)| vec![i.to_string(), percent(b.vision), percent(b.text)];
    numbers(out, "Error by block", &columns, all.iter().enumerate().map(row))?;
    out.push_str("</section>\n");
    Ok(())
}

/// Between the least colour and the most.
const DECADES: f64 = 1e3;

/// `self_attn.q_proj`, as older records have it, as q.
fn short(linear: &str) -> String {
    linear.rsplit('.').next().unwrap_or(linear).trim_end_matches("_proj").into()
}

fn linears(all: &[Compensated], out: &mut String) -> Result {
    let mut names: Vec<String> = Vec::new();
    for gain in all.iter().flat_map(|b| &b.linears) {
        let name = short(&gain.linear);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    // The error of rounding to nearest is the error left over its share.
    let of = |pick: &dyn Fn(f64, f64) -> f64| -> Vec<Vec<Option<f64>>> {
        let cell = |name: &String, b: &Compensated| {
            b.linears.iter().find(|g| short(&g.linear) == *name).map(|g| pick(g.gain, g.error))
        };
        names.iter().map(|name| all.iter().map(|b| cell(name, b)).collect()).collect()
    };
    let (before, after) = (of(&|gain, error| error / gain), of(&|_, error| error));
    let shown = before.iter().chain(&after).flatten().flatten().copied().filter(|v| v.is_finite() && *v > 0.0);
    let high = shown.fold(0f64, f64::max);
    if high == 0.0 {
        return Ok(());
    }
    section(out, "linears", "Error by matrix, before and after")?;
    let gains: Vec<f64> = all.iter().flat_map(|b| &b.linears).map(|g| g.gain).filter(|g| g.is_finite()).collect();
    let mean = gains.iter().sum::<f64>() / gains.len().max(1) as f64;
    writeln!(
        out,
        "<p>Every matrix of every block: the stronger the colour, the further its output is off. Above, each weight rounded for itself; \
         below, with the weights that follow making up for it, which leaves <b>{:.0} %</b> of the error on average.</p>",
        100.0 * mean
    )?;
    for (title, values) in [("Rounded to nearest", &before), ("Compensated, as in this file", &after)] {
        writeln!(out, "<figure>\n<h3>{title}</h3>")?;
        let map = Cells { rows: &names, values, range: (high / DECADES, high) };
        cells(out, &map, &format!("{title}: error by matrix and block; the table below has the numbers"))?;
        out.push_str("</figure>\n");
    }
    writeln!(
        out,
        "<p class=\"note\">Both maps have one scale, logarithmic, from {} % (or less) to {} %: squared error of the matrix’s output over \
         its square, on the inputs that the rounded blocks before it give. Columns are blocks.</p>",
        percent(high / DECADES),
        percent(high)
    )?;
    let mut columns = vec!["Block".to_owned()];
    columns.extend(names.iter().map(|name| format!("#{}, %", text(name))));
    let cell = |r: usize, b: usize| match (before[r][b], after[r][b]) {
        (Some(before), Some(after)) => format!("{} → {}", percent(before), percent(after)),
        _ => "–".into(),
    };
    let rows =
        (0..all.len()).map(|b| std::iter::once(b.to_string()).chain((0..names.len()).map(|r| cell(r, b))).collect());
    numbers(out, "Error by matrix and block", &columns, rows)?;
    out.push_str("</section>\n");
    Ok(())
}

fn sensitivities(noted: &Noted, out: &mut String) -> Result {
    section(out, "sense", "Sensitivity by block")?;
    out.push_str(
        "<p>How much the answers suffer from a small error at each block: at the tokens of a picture, and at those of an answer. \
         Where the lines lie far apart, the two kinds of token should not weigh alike in rounding: the observation that the \
         MBQ paper begins with.</p>\n<figure>\n",
    );
    legend(out, ["at pictures’ tokens", "at answers’ tokens"], "; dashed: the MLP’s output, else the attention’s")?;
    let s = &noted.sensitivities;
    let all = [
        Line { class: "s0", values: s.iter().map(|b| b.attn.vision).collect() },
        Line { class: "s1", values: s.iter().map(|b| b.attn.answer).collect() },
        Line { class: "s0 dash", values: s.iter().map(|b| b.mlp.vision).collect() },
        Line { class: "s1 dash", values: s.iter().map(|b| b.mlp.answer).collect() },
    ];
    lines(
        out,
        &all,
        "Sensitivity at vision and answer tokens by block; the table below has its numbers",
        "mean |gradient|",
    )?;
    out.push_str(
        "<figcaption>Mean absolute gradient of the loss on the calibration’s answers, per token and channel (logarithmic). \
         After the last block nothing reads a picture’s tokens: it has no point.</figcaption>\n</figure>\n",
    );
    let columns = ["Block", "#attention: pictures", "#answers", "#weight r", "#MLP: pictures", "#answers", "#weight r"];
    let row = |i: usize| {
        let (b, r) = (&s[i], noted.ratios.get(i));
        let weight =
            |pick: fn(&crate::calibrate::mbq::Ratios) -> f64| r.map_or("–".into(), |r| format!("{:.3}", pick(r)));
        let mut cells = vec![i.to_string()];
        cells.extend([b.attn.vision, b.attn.answer].map(|v| format!("{v:.2e}")));
        cells.push(weight(|r| r.attn));
        cells.extend([b.mlp.vision, b.mlp.answer].map(|v| format!("{v:.2e}")));
        cells.push(weight(|r| r.mlp));
        cells
    };
    numbers(out, "Sensitivity by block", &columns.map(String::from), (0..s.len()).map(row))?;
    out.push_str("</section>\n");
    Ok(())
}

fn scales(noted: &Noted, out: &mut String) -> Result {
    section(out, "scales", "Scales that were found")?;
    out.push_str(
        "<p>For each group of matrices, how strongly channels with large inputs were scaled up before rounding: 0 is not at \
         all, 1 as much as the inputs themselves.</p>\n",
    );
    let groups: Vec<&str> = noted
        .blocks
        .iter()
        .map(|b| b.iter().map(|f| f.group.as_str()).collect::<Vec<_>>())
        .max_by_key(Vec::len)
        .unwrap_or_default();
    let mut columns = vec!["Block".to_owned()];
    columns.extend(groups.iter().map(|group| format!("#{}", text(group))));
    let row = |(i, found): (usize, &Vec<super::noted::NotedScales>)| {
        let cell = |group: &&str| {
            let found = found.iter().find(|f| f.group == **group);
            let number = |v: Option<f64>| v.map(|v| format!("{v:.2}"));
            match found.map(|f| (number(f.exponent), number(f.ratio))) {
                Some((Some(exponent), Some(ratio))) => format!("{exponent} (r {ratio})"),
                Some((Some(exponent), None)) => exponent,
                _ => "–".into(),
            }
        };
        std::iter::once(i.to_string()).chain(groups.iter().map(cell)).collect()
    };
    numbers(out, "Exponents by block and group", &columns, noted.blocks.iter().enumerate().map(row))?;
    out.push_str("</section>\n");
    Ok(())
}
