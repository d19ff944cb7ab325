//! The plot of divergence against size as SVG, coloured by the page's style.

use std::fmt::Write;

use super::html::text;
use super::stats::Interval;

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

struct Frame {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    x: (f64, f64),
    /// Decades.
    y: (f64, f64),
}

impl Frame {
    fn at_x(&self, v: f64) -> f64 {
        self.left + (v - self.x.0) / (self.x.1 - self.x.0) * (self.right - self.left)
    }

    fn at_y(&self, v: f64) -> f64 {
        self.bottom - (v.max(FLOOR).log10() - self.y.0) / (self.y.1 - self.y.0) * (self.bottom - self.top)
    }
}

/// Writes the plot with the given size in pixels; `class` picks it by the width of the page.
pub fn scatter(out: &mut String, points: &[Point], width: f64, height: f64, class: &str) -> std::fmt::Result {
    let frame = frame(points, width, height);
    writeln!(
        out,
        "<svg class=\"{class}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"Scatter plot of mean KL divergence \
         against file size; the table below has its numbers\">"
    )?;
    axes(out, &frame, height)?;
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

fn frame(points: &[Point], width: f64, height: f64) -> Frame {
    let shown = |v: f64| v.max(FLOOR).log10();
    let fold =
        |f: &dyn Fn(&Point) -> f64, start: f64, pick: fn(f64, f64) -> f64| points.iter().map(f).fold(start, pick);
    let low = fold(&|p| shown(p.y.low), f64::INFINITY, f64::min).floor();
    let high = fold(&|p| shown(p.y.high), f64::NEG_INFINITY, f64::max).ceil();
    let (x0, x1) = (fold(&|p| p.x, f64::INFINITY, f64::min), fold(&|p| p.x, 0.0, f64::max));
    let margin = ((x1 - x0) * 0.08).max(x1 * 0.02);
    Frame {
        left: 58.0,
        right: width - 22.0,
        top: 32.0,
        bottom: height - 52.0,
        x: ((x0 - margin).max(0.0), x1 + margin),
        y: (low, if high > low { high } else { low + 1.0 }),
    }
}

fn axes(out: &mut String, f: &Frame, height: f64) -> std::fmt::Result {
    let mut decade = f.y.0;
    while decade <= f.y.1 + 0.5 {
        let y = f.bottom - (decade - f.y.0) / (f.y.1 - f.y.0) * (f.bottom - f.top);
        let power = decade as i32;
        let name = match power {
            p if 10f64.powi(p) <= FLOOR => "≤ 10⁻⁶".to_owned(),
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
    let step = nice((f.x.1 - f.x.0) / ((f.right - f.left) / 90.0));
    let mut tick = (f.x.0 / step).ceil() * step;
    while tick <= f.x.1 {
        let x = f.at_x(tick);
        let name = if step < 1.0 { format!("{tick:.1}") } else { format!("{tick:.0}") };
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
        "<text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">file size, MB</text>\
         <text class=\"axis\" x=\"{:.1}\" y=\"14\">KL, nats per token</text>",
        (f.left + f.right) / 2.0,
        height - 12.0,
        10.0
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
