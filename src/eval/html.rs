//! The report as one page without outside resources: readable light and dark, wide and on a phone, and by a screen
//! reader (every number of the plots stands in a table too).

use std::fmt::Write;
use std::path::Path;

use super::report::{self, Accuracy, Candidate, Fidelity, Report, Split};
use super::stats::Interval;
use crate::image::load_rgb;
use crate::page::plot::{self, Point};
use crate::page::{self, TABLE_END, open_table, section, text};

/// How many questions the page shows with picture and answers.
const EXAMPLES: usize = 6;
/// Longest side of an embedded picture.
const THUMBNAIL: u32 = 220;

/// The page.
pub fn page(report: &Report) -> String {
    let mut out = String::new();
    // invariant: writing to a String cannot fail.
    let _ = write_page(report, &mut out);
    out
}

fn write_page(r: &Report, out: &mut String) -> std::fmt::Result {
    let names = short_names(r);
    page::open(out, &format!("{} quantised: what it cost", stem(&r.reference.name)))?;
    header(r, out)?;
    out.push_str("<main>\n");
    if !r.candidates.is_empty() {
        plots(r, &names, out)?;
        accuracies(r, &names, out)?;
        fidelities(r, &names, out)?;
        kinds(r, &names, out)?;
        pairs(r, &names, out)?;
        examples(r, &names, out)?;
    }
    method(r, out)?;
    out.push_str(page::END);
    Ok(())
}

fn header(r: &Report, out: &mut String) -> std::fmt::Result {
    let d = &r.data;
    writeln!(
        out,
        "<header>\n<p class=\"eyebrow\">mbq-convert eval</p>\n<h1>{} quantised: what it cost</h1>",
        text(&stem(&r.reference.name))
    )?;
    let subject = match (d.with_picture, d.text_only) {
        (p, 0) => format!("{p} questions about pictures"),
        (0, t) => format!("{t} questions without pictures"),
        (p, t) => format!("{p} questions about pictures and {t} without"),
    };
    let models = match r.candidates.len() {
        1 => "One model".into(),
        n => format!("{n} models"),
    };
    writeln!(
        out,
        "<p class=\"lead\">{models} against <b>{}</b> on {subject}, every token of every answer compared over the \
         whole vocabulary.</p>",
        text(&r.reference.name)
    )?;
    out.push_str("<dl class=\"facts\">\n");
    let mut fact = |name: &str, value: String| writeln!(out, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    fact(
        "Reference",
        format!(
            "{:.1} MB · {} bits per weight",
            r.reference.file_bytes as f64 / 1e6,
            report::bits(r.reference.bits_per_weight)
        ),
    )?;
    if let Some(a) = &r.reference_accuracy {
        fact("Reference accuracy", format!("{:.1} % ({} of {})", 100.0 * a.all.value, a.correct, a.questions))?;
    }
    if let Some(f) = r.candidates.first().and_then(|c| main_split(c)).and_then(main_fidelity) {
        fact("Positions compared", f.positions.to_string())?;
    }
    out.push_str("</dl>\n</header>\n");
    Ok(())
}

/// The picture questions where there are any, else the text ones.
pub(crate) fn main_split(c: &Candidate) -> Option<&Split> {
    c.picture.as_ref().or(c.text.as_ref())
}

/// On the reference's own answers where it has some, else on the given ones.
pub(crate) fn main_fidelity(s: &Split) -> Option<&Fidelity> {
    s.greedy.as_ref().or(s.given.as_ref())
}

/// The plot of divergence against size.
pub(crate) fn plots(r: &Report, names: &[String], out: &mut String) -> std::fmt::Result {
    let mut points = Vec::new();
    for (c, name) in r.candidates.iter().zip(names) {
        for (series, split) in [(0, &c.picture), (1, &c.text)] {
            if let Some(f) = split.as_ref().and_then(main_fidelity) {
                // Only the first series is labelled where both share their x.
                let label = if series == 0 || c.picture.is_none() { name.as_str() } else { "" };
                points.push(Point { label, series, x: c.model.file_bytes as f64 / 1e6, y: f.kl_mean });
            }
        }
    }
    section(out, "plot", "Divergence against size")?;
    out.push_str("<figure>\n");
    let both = points.iter().any(|p| p.series == 0) && points.iter().any(|p| p.series == 1);
    if both {
        out.push_str(
            "<p class=\"legend\"><span class=\"key s0\" aria-hidden=\"true\"></span>with a picture \
             <span class=\"key s1\" aria-hidden=\"true\"></span>text only</p>\n",
        );
    }
    plot::scatter(out, &points, 760.0, 440.0, "wide")?;
    plot::scatter(out, &points, 360.0, 420.0, "phone")?;
    out.push_str(
        "<figcaption>Mean KL divergence from the reference in nats per token (logarithmic) against file size. Lower and \
         further left is better; the line joins the models that no other beats in both. Bars are 95 % bootstrap \
         intervals over questions.</figcaption>\n</figure>\n</section>\n",
    );
    Ok(())
}

/// The reference's accuracy and the candidates', each with its name and the class of its row.
fn each_accuracy<'a>(
    reference: &'a Accuracy,
    r: &'a Report,
    names: &'a [String],
) -> impl Iterator<Item = (&'a str, &'a Accuracy, &'static str)> {
    let candidates = r.candidates.iter().zip(names);
    let rows = candidates.filter_map(|(c, name)| Some((name.as_str(), c.accuracy.as_ref()?, "")));
    std::iter::once(("reference", reference, "ref")).chain(rows)
}

/// Right answers, where the questions have some.
pub(crate) fn accuracies(r: &Report, names: &[String], out: &mut String) -> std::fmt::Result {
    let Some(reference) = &r.reference_accuracy else { return Ok(()) };
    out.push_str(
        "<section aria-labelledby=\"h-acc\">\n<h2 id=\"h-acc\">Right answers</h2>\n<p>Share of questions whose greedy answer \
         equals the given one, with its 95 % interval.</p>\n",
    );
    let columns = ["Model", "<span class=\"sr\">Bar</span>", "#%", "#95 %", "#Right"].map(String::from);
    open_table(out, "bars", "Accuracy of each model", "", &columns)?;
    for (name, a, class) in each_accuracy(reference, r, names) {
        let p = |v: f64| 100.0 * v;
        writeln!(
            out,
            "<tr class=\"{class}\"><th scope=\"row\">{}</th><td class=\"bar\"><span class=\"track\" aria-hidden=\"true\">\
             <span class=\"fill\" style=\"width:{:.2}%\"></span><span class=\"ci\" style=\"left:{:.2}%;width:{:.2}%\"></span>\
             </span></td><td class=\"n\">{:.1}</td><td class=\"n dim\">{:.1} – {:.1}</td><td class=\"n dim\">{}/{}</td></tr>",
            text(name),
            p(a.all.value),
            p(a.all.low),
            p(a.all.high - a.all.low),
            p(a.all.value),
            p(a.all.low),
            p(a.all.high),
            a.correct,
            a.questions
        )?;
    }
    writeln!(out, "{TABLE_END}</section>")
}

fn fidelities(r: &Report, names: &[String], out: &mut String) -> std::fmt::Result {
    out.push_str("<section aria-labelledby=\"h-num\">\n<h2 id=\"h-num\">The numbers</h2>\n");
    type PickFigure = fn(&Candidate) -> Option<&Split>;
    let picks: [(&str, PickFigure); 2] =
        [("with a picture", |c| c.picture.as_ref()), ("text only", |c| c.text.as_ref())];
    for (title, pick) in picks {
        for (what, greedy) in [("the reference’s own answers", true), ("the given answers", false)] {
            let rows: Vec<_> = r
                .candidates
                .iter()
                .zip(names)
                .filter_map(|(c, n)| {
                    pick(c).and_then(|s| if greedy { s.greedy.as_ref() } else { s.given.as_ref() }).map(|f| (c, n, f))
                })
                .collect();
            if let Some((_, _, first)) = rows.first() {
                let caption = format!("Questions {title}, on {what}: {} positions", first.positions);
                table(out, &caption, &rows)?;
            }
        }
    }
    out.push_str(
        "<p class=\"note\">Bits per weight: over all tensors, and over the matrices of the blocks alone. Agreement: positions \
         where model and reference put the same token first. Perplexity ratio: the model’s perplexity on these tokens \
         over the reference’s.</p>\n</section>\n",
    );
    Ok(())
}

fn table(out: &mut String, caption: &str, rows: &[(&Candidate, &String, &Fidelity)]) -> std::fmt::Result {
    let columns = [
        "Model",
        "#MB",
        "#Bits",
        "#in blocks",
        "#KL mean",
        "#95 %",
        "#median",
        "#p99",
        "#max",
        "#Agree %",
        "#95 %",
        "#Ppl ratio",
        "#prefill/s",
        "#decode/s",
    ];
    open_table(out, "", caption, caption, &columns.map(String::from))?;
    for (c, name, f) in rows {
        let range = |i: &Interval, show: &dyn Fn(f64) -> String| format!("{} – {}", show(i.low), show(i.high));
        let percent = |v: f64| format!("{:.1}", 100.0 * v);
        writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td class=\"n\">{:.1}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
             <td class=\"n strong\">{}</td><td class=\"n dim\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
             <td class=\"n\">{}</td><td class=\"n strong\">{}</td><td class=\"n dim\">{}</td><td class=\"n\">{:.4}</td>\
             <td class=\"n\">{:.0}</td><td class=\"n\">{:.1}</td></tr>",
            text(name),
            c.model.file_bytes as f64 / 1e6,
            report::bits(c.model.bits_per_weight),
            report::bits(c.model.block_bits_per_weight),
            report::kl(f.kl_mean.value),
            range(&f.kl_mean, &report::kl),
            report::kl(f.kl_median),
            report::kl(f.kl_p99),
            report::kl(f.kl_max),
            percent(f.agreement.value),
            range(&f.agreement, &percent),
            f.perplexity_ratio.value,
            c.speed.prefill_tokens_per_second,
            c.speed.decode_tokens_per_second,
        )?;
    }
    out.push_str(TABLE_END);
    Ok(())
}

fn kinds(r: &Report, names: &[String], out: &mut String) -> std::fmt::Result {
    let Some(reference) = r.reference_accuracy.as_ref().filter(|a| a.kinds.len() > 1) else { return Ok(()) };
    out.push_str("<section aria-labelledby=\"h-kind\">\n<h2 id=\"h-kind\">By kind of question</h2>\n");
    let mut columns = vec!["Model".to_owned()];
    for (kind, (_, asked)) in &reference.kinds {
        columns.push(format!("#{} <span class=\"dim\">({asked})</span>", text(kind)));
    }
    open_table(out, "", "Accuracy by kind", "Right answers in %, and how many were asked", &columns)?;
    for (name, a, class) in each_accuracy(reference, r, names) {
        write!(out, "<tr class=\"{class}\"><th scope=\"row\">{}</th>", text(name))?;
        for (right, asked) in a.kinds.values() {
            let share = *right as f64 / (*asked).max(1) as f64;
            write!(out, "<td class=\"n heat\" style=\"--v:{share:.3}\">{:.1}</td>", 100.0 * share)?;
        }
        out.push_str("</tr>\n");
    }
    writeln!(out, "{TABLE_END}</section>")
}

fn pairs(r: &Report, names: &[String], out: &mut String) -> std::fmt::Result {
    if r.pairs.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "<section aria-labelledby=\"h-pair\">\n<h2 id=\"h-pair\">Which differences are real</h2>\n<p>Both models of a pair answered \
         the same questions. Divergence: paired sign-flip test of the mean difference by question. Accuracy: McNemar’s \
         exact test on the questions only one got right. The p-values are corrected (Holm) for all {} pairs.</p>\n\
         <details{}><summary>All {0} pairs</summary>\n",
        r.pairs.len(),
        if r.pairs.len() <= 10 { " open" } else { "" }
    )?;
    let columns = ["Model A", "Model B", "#KL of A less B", "#95 %", "#p", "#right only A", "#only B", "#p"];
    open_table(out, "", "Paired tests", "", &columns.map(String::from))?;
    for p in &r.pairs {
        let class = |v: f64| if v < 0.05 { "n strong" } else { "n dim" };
        writeln!(
            out,
            "<tr><th scope=\"row\">{}</th><td>{}</td><td class=\"n\">{}</td><td class=\"n dim\">{} – {}</td><td class=\"{}\">{}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"{}\">{}</td></tr>",
            text(&names[p.a]),
            text(&names[p.b]),
            signed(p.kl_difference.value),
            signed(p.kl_difference.low),
            signed(p.kl_difference.high),
            class(p.sign_flip_holm),
            report::probability(p.sign_flip_holm),
            p.only_a,
            p.only_b,
            class(p.mcnemar_holm),
            report::probability(p.mcnemar_holm),
        )?;
    }
    writeln!(out, "{TABLE_END}</details>\n</section>")
}

/// Questions that the reference got right and most candidates did not, with picture and answers.
fn examples(r: &Report, names: &[String], out: &mut String) -> std::fmt::Result {
    let mut broken: Vec<_> = r
        .questions
        .iter()
        .filter(|q| q.reference.correct == Some(true))
        .map(|q| {
            let wrong = q.candidates.iter().filter(|a| a.correct == Some(false)).count();
            (wrong, q.candidates.iter().filter_map(|a| a.kl).sum::<f64>(), q)
        })
        .filter(|(wrong, ..)| *wrong > 0)
        .collect();
    if broken.is_empty() {
        return Ok(());
    }
    broken.sort_by(|a, b| b.0.cmp(&a.0).then(b.1.total_cmp(&a.1)));
    out.push_str(
        "<section aria-labelledby=\"h-ex\">\n<h2 id=\"h-ex\">Where they break</h2>\n<p>Questions that the reference answers \
         rightly and most others do not.</p>\n<div class=\"cards\">\n",
    );
    for (_, _, q) in broken.into_iter().take(EXAMPLES) {
        out.push_str("<article class=\"card\">\n");
        if let Some(url) =
            q.image.as_deref().and_then(|p| load_rgb(Path::new(p)).ok()).and_then(|p| page::thumbnail(p, THUMBNAIL))
        {
            writeln!(out, "<img src=\"{url}\" alt=\"The picture of this question\" loading=\"lazy\">")?;
        }
        writeln!(out, "<div><h3>{}</h3>\n<p>Expected <b>{}</b></p>\n<ul>", text(&q.question), text(&q.expected))?;
        for (answer, name) in q.candidates.iter().zip(names) {
            let (class, mark, word) =
                if answer.correct == Some(true) { ("ok", "✓", "right") } else { ("no", "✗", "wrong") };
            writeln!(
                out,
                "<li><span class=\"{class}\" aria-hidden=\"true\">{mark}</span><span class=\"sr\">{word}: </span>\
                 <span class=\"who\">{}</span> {}</li>",
                text(name),
                text(clip(&answer.text))
            )?;
        }
        out.push_str("</ul></div>\n</article>\n");
    }
    out.push_str("</div>\n</section>\n");
    Ok(())
}

fn method(r: &Report, out: &mut String) -> std::fmt::Result {
    let (d, c) = (&r.data, &r.cost);
    writeln!(
        out,
        "<section aria-labelledby=\"h-how\">\n<h2 id=\"h-how\">How it was measured</h2>\n<p>Each picture is embedded once and shared \
         by all models. The reference answers greedily (at most {} tokens); then all models run teacher-forced on the \
         same tokens through the same runtime. The reference’s log-probabilities are kept in 16 bits, each within \
         {:.1e} nats, which adds at most {:.1e} to the divergence of equal models. Intervals: {} bootstrap draws of whole \
         questions, seed {}.</p>\n<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Files and settings\"><table class=\"plain\">\n<tbody>",
        d.max_tokens, c.cache_log_prob_error, c.cache_kl_bound, d.bootstrap_resamples, d.seed
    )?;
    let mut row =
        |name: &str, value: &str| writeln!(out, "<tr><th scope=\"row\">{name}</th><td>{}</td></tr>", text(value));
    row("Version", &format!("mbq-convert {}", r.version))?;
    row("Runtime", &r.runtime)?;
    row("Compute", &format!("{} threads{}", r.threads, if r.gpu_layers == 0 { ", no GPU" } else { "" }))?;
    row(
        "Time",
        &format!(
            "{:.1} s in this run; encoding, prefill, scoring and decoding {:.1} s",
            c.wall_seconds,
            r.compute_seconds()
        ),
    )?;
    if let Some(peak) = c.peak_memory_bytes {
        row("Peak memory", &format!("{:.0} MB", peak as f64 / 1e6))?;
    }
    row("Questions", &format!("{} · sha256 {}", d.path, d.sha256))?;
    row("Reference", &format!("{} · sha256 {}", r.reference.name, r.reference.sha256))?;
    if let Some(m) = &r.mmproj {
        row("Projector", &format!("{} · sha256 {}", m.name, m.sha256))?;
    }
    for c in &r.candidates {
        row("Model", &format!("{} · sha256 {}", c.model.name, c.model.sha256))?;
        if let Some(m) = &c.mmproj {
            row("Its projector", &format!("{} · sha256 {}", m.name, m.sha256))?;
        }
    }
    out.push_str("</tbody></table></div>\n</section>\n");
    Ok(())
}

fn signed(v: f64) -> String {
    let digits = report::kl(v.abs());
    if v < 0.0 { format!("−{digits}") } else { format!("+{digits}") }
}

fn stem(name: &str) -> String {
    name.strip_suffix(".gguf").unwrap_or(name).to_owned()
}

/// Names without what all have in common at the front.
pub(crate) fn short_names(r: &Report) -> Vec<String> {
    let stems: Vec<String> = r.candidates.iter().map(|c| stem(&c.model.name)).collect();
    let Some(first) = stems.first().filter(|_| stems.len() > 1) else { return stems };
    let cut = (0..first.len())
        .filter(|i| matches!(first.as_bytes()[*i], b'-' | b'_' | b'.'))
        .map(|i| i + 1)
        .filter(|i| stems.iter().all(|s| s.len() > *i && s.as_bytes()[..*i] == first.as_bytes()[..*i]))
        .max()
        .unwrap_or(0);
    // A cut behind an ASCII byte is a character boundary.
    stems.iter().map(|s| s[cut..].to_owned()).collect()
}

fn clip(answer: &str) -> &str {
    match answer.char_indices().nth(90) {
        Some((at, _)) => &answer[..at],
        None => answer,
    }
}
