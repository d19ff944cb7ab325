//! Plots as SVG, coloured by the page's style: points with intervals, lines over blocks, a map of cells.

use std::fmt::Write;

use super::text;
use crate::eval::stats::Interval;

/// A model in the plot.
pub struct Point<'a> {
    /// Empty for none.
    pub label: &'a str,
    /// 0: with a picture, 1: text only.
    pub series: usize,
    /// Megabytes.
    pub x: f64,
    /// Mean divergence.
    pub y: Interval,
}

/// Divergences below this are drawn at the foot of the plot: they are rounding.
const FLOOR: f64 = 1e-6;

/// What the axes are called, and how fine they are.
struct Axes {
    x: &'static str,
    y: &'static str,
    /// The least distance of x's ticks.
    step: f64,
    /// Smaller values are drawn at the foot.
    floor: f64,
}

struct Frame {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x: (f64, f64),
    /// Decades.
    y: (f64, f64),
    floor: f64,
}

impl Frame {
    /// Of `width` x `height` pixels, for these values; those of y are positive.
    fn new(x: (f64, f64), y: (f64, f64), floor: f64, width: f64, height: f64) -> Self {
        let decades = (y.0.max(floor).log10().floor(), y.1.max(floor).log10().ceil());
        let y = (decades.0, if decades.1 > decades.0 { decades.1 } else { decades.0 + 1.0 });
        Frame { left: 58.0, right: width - 22.0, top: 32.0, bottom: height - 52.0, x, y, floor }
    }

    fn at_x(&self, v: f64) -> f64 {
        self.left + (v - self.x.0) / (self.x.1 - self.x.0) * (self.right - self.left)
    }

    fn at_y(&self, v: f64) -> f64 {
        self.bottom - (v.max(self.floor).log10() - self.y.0) / (self.y.1 - self.y.0) * (self.bottom - self.top)
    }
}

/// The least and the largest of `values`.
fn bounds(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    (values.clone().fold(f64::INFINITY, f64::min), values.fold(f64::NEG_INFINITY, f64::max))
}

/// Writes the plot with the given size in pixels; `class` picks it by the width of the page.
pub fn scatter(out: &mut String, points: &[Point], width: f64, height: f64, class: &str) -> std::fmt::Result {
    let (x0, x1) = bounds(points.iter().map(|p| p.x));
    let margin = ((x1 - x0) * 0.08).max(x1 * 0.02);
    let y = bounds(points.iter().flat_map(|p| [p.y.low, p.y.high]));
    let frame = Frame::new(((x0 - margin).max(0.0), x1 + margin), y, FLOOR, width, height);
    writeln!(
        out,
        "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"Scatter plot of mean KL divergence \
         against file size; the table below has its numbers\">"
    )?;
    axes(out, &frame, height, &Axes { x: "file size, MB", y: "KL, nats per token", step: 0.0, floor: FLOOR })?;
    frontier(out, &frame, points)?;
    for p in points {
        let (x, low, high) = (frame.at_x(p.x), frame.at_y(p.y.low), frame.at_y(p.y.high));
        let y = frame.at_y(p.y.value);
        writeln!(
            out,
            "<line class=\"s{}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\" stroke-width=\"1.5\"/>",
            p.series
        )?;
        match p.series {
            0 => writeln!(out, "<circle class=\"s0\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\"/>")?,
            _ => writeln!(
                out,
                "<rect class=\"s1\" x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\"/>",
                x - 4.0,
                y - 4.0
            )?,
        }
    }
    labels(out, &frame, points)?;
    out.push_str("</svg>\n");
    Ok(())
}

/// A quantity by block, from block 0 on.
pub struct Line {
    /// `s0` or `s1`, and `dash`.
    pub class: &'static str,
    /// Positive numbers; others are left out.
    pub values: Vec<f64>,
}

/// Writes `lines` over the number of the block, wide and for a phone. `label` says what is seen, `y` what is measured.
pub fn lines(out: &mut String, lines: &[Line], label: &str, y: &'static str) -> std::fmt::Result {
    lines_of(out, lines, (label, y), (760.0, 340.0), "wide")?;
    lines_of(out, lines, (label, y), (360.0, 320.0), "phone")
}

fn lines_of(
    out: &mut String,
    lines: &[Line],
    (label, y): (&str, &'static str),
    (width, height): (f64, f64),
    class: &str,
) -> std::fmt::Result {
    let shown = |v: &f64| v.is_finite() && *v > 0.0;
    let (low, high) = bounds(lines.iter().flat_map(|l| l.values.iter().copied().filter(shown)));
    let last = lines.iter().map(|l| l.values.len()).max().unwrap_or(0).saturating_sub(1);
    if !low.is_finite() {
        return Ok(());
    }
    let frame = Frame::new((-0.4, last as f64 + 0.4), (low, high), low, width, height);
    writeln!(
        out,
        "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
        text(label)
    )?;
    axes(out, &frame, height, &Axes { x: "block", y, step: 1.0, floor: 0.0 })?;
    for line in lines {
        let points = line.values.iter().enumerate().filter(|(_, v)| shown(v));
        let at: Vec<(f64, f64)> = points.map(|(i, v)| (frame.at_x(i as f64), frame.at_y(*v))).collect();
        let path: Vec<String> = at.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        writeln!(out, "<polyline class=\"line {}\" points=\"{}\"/>", line.class, path.join(" "))?;
        for (x, y) in at {
            writeln!(out, "<circle class=\"{}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>", line.class)?;
        }
    }
    out.push_str("</svg>\n");
    Ok(())
}

/// Numbers by row and block, as colours: the darker, the larger, over decades.
pub struct Cells<'a> {
    pub rows: &'a [String],
    /// By row, then by block; none and what is not positive is left empty.
    pub values: &'a [Vec<Option<f64>>],
    /// What has no colour and what has all of it.
    pub range: (f64, f64),
}

/// Writes `cells`, wide and for a phone.
pub fn cells(out: &mut String, cells: &Cells, label: &str) -> std::fmt::Result {
    cells_of(out, cells, label, 760.0, "wide")?;
    cells_of(out, cells, label, 360.0, "phone")
}

fn cells_of(out: &mut String, cells: &Cells, label: &str, width: f64, class: &str) -> std::fmt::Result {
    const ROW: f64 = 24.0;
    let longest = cells.rows.iter().map(|r| r.chars().count()).max().unwrap_or(0);
    let (left, right) = (16.0 + 7.0 * longest as f64, width - 12.0);
    let columns = cells.values.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let column = (right - left) / columns as f64;
    let height = 12.0 + ROW * cells.rows.len() as f64 + 30.0;
    writeln!(
        out,
        "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">",
        text(label)
    )?;
    let (low, high) = (cells.range.0.log10(), cells.range.1.log10());
    for (r, (row, values)) in cells.rows.iter().zip(cells.values).enumerate() {
        let y = 12.0 + ROW * r as f64;
        writeln!(
            out,
            "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 8.0,
            y + 16.0,
            text(row)
        )?;
        for (c, value) in values.iter().enumerate() {
            let Some(value) = value.filter(|v| v.is_finite() && *v > 0.0) else { continue };
            let share = ((value.log10() - low) / (high - low).max(1e-9)).clamp(0.0, 1.0);
            writeln!(
                out,
                "<rect class=\"cell\" style=\"--v:{share:.3}\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\">\
                 <title>block {c}, {}: {value:.2e}</title></rect>",
                left + column * c as f64,
                (column - 1.0).max(0.5),
                ROW - 1.0,
                text(row)
            )?;
        }
    }
    let every = (28.0 / column).ceil().max(1.0) as usize;
    for c in (0..columns).step_by(every) {
        let x = left + column * (c as f64 + 0.5);
        writeln!(
            out,
            "<text class=\"axis\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{c}</text>",
            height - 12.0
        )?;
    }
    out.push_str("</svg>\n");
    Ok(())
}

fn axes(out: &mut String, f: &Frame, height: f64, axes: &Axes) -> std::fmt::Result {
    let mut decade = f.y.0;
    while decade <= f.y.1 + 0.5 {
        let y = f.bottom - (decade - f.y.0) / (f.y.1 - f.y.0) * (f.bottom - f.top);
        let power = decade as i32;
        let name = match power {
            p if 10f64.powi(p) <= axes.floor => format!("≤ 1e{p}"),
            -4..0 => format!("{:.*}", power.unsigned_abs() as usize, 10f64.powi(power)),
            0..3 => format!("{}", 10f64.powi(power)),
            p => format!("1e{p}"),
        };
        writeln!(
            out,
            "<line class=\"grid\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>",
            f.left,
            f.right,
            f.left - 8.0,
            y + 4.0
        )?;
        decade += 1.0;
    }
    let step = nice((f.x.1 - f.x.0) / ((f.right - f.left) / 90.0)).max(axes.step);
    let mut tick = (f.x.0 / step).ceil() * step;
    while tick <= f.x.1 {
        let x = f.at_x(tick);
        // Zero may come as -0.
        let name = if step < 1.0 { format!("{tick:.1}") } else { format!("{:.0}", tick + 0.0) };
        writeln!(
            out,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/><text class=\"axis\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            f.bottom,
            f.bottom + 5.0,
            f.bottom + 20.0
        )?;
        tick += step;
    }
    writeln!(
        out,
        "<text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text class=\"axis\" x=\"{:.1}\" y=\"14\">{}</text>",
        (f.left + f.right) / 2.0,
        height - 12.0,
        axes.x,
        10.0,
        axes.y
    )
}

/// The next of 1, 2, 5 times a power of ten.
fn nice(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= step * 0.999).unwrap_or(step)
}

/// Joins the models of the first series that none of them beats in size and divergence.
fn frontier(out: &mut String, f: &Frame, points: &[Point]) -> std::fmt::Result {
    let series = points.iter().map(|p| p.series).min().unwrap_or(0);
    let mut sorted: Vec<_> = points.iter().filter(|p| p.series == series).collect();
    sorted.sort_by(|a, b| a.x.total_cmp(&b.x).then(a.y.value.total_cmp(&b.y.value)));
    let mut best = f64::INFINITY;
    let mut line = String::new();
    for p in sorted {
        if p.y.value < best {
            best = p.y.value;
            write!(line, "{:.1},{:.1} ", f.at_x(p.x), f.at_y(p.y.value))?;
        }
    }
    writeln!(out, "<polyline class=\"front\" points=\"{}\"/>", line.trim())
}

/// Puts every label at the first free place around its point.
fn labels(out: &mut String, f: &Frame, points: &[Point]) -> std::fmt::Result {
    /// Half the height of a label, and room around a point.
    const HALF: f64 = 8.0;
    type Box4 = [f64; 4];
    let mut taken: Vec<Box4> = points
        .iter()
        .map(|p| {
            let (x, y) = (f.at_x(p.x), f.at_y(p.y.value));
            [x - 6.0, y - 6.0, x + 6.0, y + 6.0]
        })
        .collect();
    for p in points.iter().filter(|p| !p.label.is_empty()) {
        let (x, y) = (f.at_x(p.x), f.at_y(p.y.value));
        let wide = 7.2 * p.label.chars().count() as f64;
        let places = [(10.0, 0.0), (-10.0, 0.0), (10.0, -14.0), (-10.0, -14.0), (10.0, 14.0), (-10.0, 14.0)]
            .into_iter()
            .chain((2..9).flat_map(|k| {
                let d = 14.0 * f64::from(k);
                [(12.0, -d), (-12.0, -d), (12.0, d), (-12.0, d)]
            }));
        let fit = |(dx, dy): (f64, f64)| -> Box4 {
            let left = if dx > 0.0 { x + dx } else { x + dx - wide };
            [left, y + dy - HALF, left + wide, y + dy + HALF]
        };
        let free = |b: &Box4| {
            b[0] >= f.left
                && b[2] <= f.right + 18.0
                && b[1] >= f.top - 8.0
                && b[3] <= f.bottom
                && taken.iter().all(|t| b[2] <= t[0] || b[0] >= t[2] || b[3] <= t[1] || b[1] >= t[3])
        };
        let place = places.clone().find(|d| free(&fit(*d))).unwrap_or((10.0, 0.0));
        let spot = fit(place);
        if place.1.abs() > 20.0 {
            let near = if place.0 > 0.0 { spot[0] } else { spot[2] };
            writeln!(
                out,
                "<line class=\"lead-line\" x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{near:.1}\" y2=\"{:.1}\"/>",
                y + place.1
            )?;
        }
        let (at, anchor) = if place.0 > 0.0 { (spot[0], "start") } else { (spot[2], "end") };
        writeln!(
            out,
            "<text class=\"label\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
            y + place.1 + 4.0,
            text(p.label)
        )?;
        taken.push(spot);
    }
    Ok(())
}
