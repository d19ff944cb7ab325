//! What an evaluation found, as numbers (serialised for machines) and as tables on a screen.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::cache;
use super::data::{Question, Questions};
use super::record::{self, Answered, Measures};
use super::run::Setup;
use super::stats::{self, Cluster, Interval};
use crate::digest::hex;
use crate::gguf::GgufFile;
use crate::runtime::engine::{Runtime, Times};

/// A finished evaluation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub version: String,
    pub runtime: String,
    pub threads: i32,
    pub gpu_layers: i32,
    pub data: DataInfo,
    pub reference: ModelInfo,
    pub mmproj: Option<ModelInfo>,
    pub reference_accuracy: Option<Accuracy>,
    pub reference_speed: Speed,
    pub candidates: Vec<Candidate>,
    /// Every pair of candidates, in the order given.
    pub pairs: Vec<Comparison>,
    pub cost: CostInfo,
    pub questions: Vec<QuestionResult>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DataInfo {
    pub path: String,
    pub sha256: String,
    pub questions: usize,
    pub with_picture: usize,
    pub text_only: usize,
    pub max_tokens: usize,
    pub bootstrap_resamples: usize,
    pub seed: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelInfo {
    pub name: String,
    pub sha256: String,
    pub file_bytes: u64,
    pub weights: u64,
    /// Over all tensors; absent where the file holds a type this version does not know.
    pub bits_per_weight: Option<f64>,
    /// Over the matrices of the blocks.
    pub block_bits_per_weight: Option<f64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Speed {
    #[serde(deserialize_with = "stats::number")]
    pub prefill_tokens_per_second: f64,
    #[serde(deserialize_with = "stats::number")]
    pub decode_tokens_per_second: f64,
    pub times: Times,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Candidate {
    pub model: ModelInfo,
    /// Its projector, where that is not the reference's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mmproj: Option<ModelInfo>,
    pub picture: Option<Split>,
    pub text: Option<Split>,
    pub accuracy: Option<Accuracy>,
    pub speed: Speed,
}

/// Questions with a picture, or those without.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Split {
    pub questions: usize,
    /// On the reference's own greedy answers; absent where all questions are raw prompts.
    pub greedy: Option<Fidelity>,
    pub given: Option<Fidelity>,
}

/// Distance from the reference over the positions of one sort of answer. Divergences are in nats.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fidelity {
    pub positions: usize,
    pub kl_mean: Interval,
    #[serde(deserialize_with = "stats::number")]
    pub kl_median: f64,
    #[serde(deserialize_with = "stats::number")]
    pub kl_p99: f64,
    #[serde(deserialize_with = "stats::number")]
    pub kl_max: f64,
    /// Share of positions where both put the same token first.
    pub agreement: Interval,
    #[serde(deserialize_with = "stats::number")]
    pub perplexity: f64,
    #[serde(deserialize_with = "stats::number")]
    pub perplexity_reference: f64,
    pub perplexity_ratio: Interval,
}

/// Exact matches of greedy answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Accuracy {
    pub all: Interval,
    pub correct: usize,
    pub questions: usize,
    /// Correct and asked, by kind.
    pub kinds: BTreeMap<String, (usize, usize)>,
}

/// Two candidates against each other on the same questions.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Comparison {
    pub a: usize,
    pub b: usize,
    /// Questions that only the one got right.
    pub only_a: usize,
    pub only_b: usize,
    pub mcnemar_p: f64,
    /// Mean over questions of a's mean divergence less b's (greedy answers; given ones of raw prompts).
    pub kl_difference: Interval,
    pub sign_flip_p: f64,
    /// The p-values after Holm's correction over all pairs.
    pub mcnemar_holm: f64,
    pub sign_flip_holm: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CostInfo {
    /// Seconds of this run; parts taken from the cache cost nothing.
    pub wall_seconds: f64,
    pub prepare_seconds: f64,
    pub encode_seconds: f64,
    pub peak_memory_bytes: Option<u64>,
    pub cache_bytes: u64,
    /// Largest error of a cached log-probability, and what that can add to a divergence of equal models.
    pub cache_log_prob_error: f64,
    pub cache_kl_bound: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QuestionResult {
    pub id: String,
    pub kind: String,
    pub image: Option<String>,
    pub question: String,
    pub expected: String,
    pub reference: Answer,
    /// In the order of the candidates.
    pub candidates: Vec<Answer>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    pub text: String,
    pub correct: Option<bool>,
    /// Mean divergence on the greedy answer (the given one of a raw prompt).
    pub kl: Option<f64>,
}

/// A candidate's raw results.
pub struct Measured<'a> {
    pub header: &'a GgufFile,
    /// Where it is not the reference's.
    pub mmproj: Option<(&'a GgufFile, &'a str)>,
    pub digest: &'a str,
    pub times: Times,
    pub outcomes: Vec<Answered>,
}

/// What this run spent.
pub struct Cost {
    pub wall: f64,
    pub prepare: f64,
    pub encode: f64,
    pub reference: Times,
    pub cache_bytes: u64,
}

#[allow(clippy::too_many_arguments)]
pub(super) fn build(
    setup: &Setup,
    runtime: &Runtime,
    reference: (&GgufFile, &str),
    mmproj: Option<(&GgufFile, &str)>,
    questions: &Questions,
    list: &[&Question],
    models: &[Measured],
    cost: &Cost,
) -> Report {
    let with_picture = list.iter().filter(|q| q.image.is_some()).count();
    let boot = Bootstrap { resamples: setup.resamples, seed: setup.seed };
    let reference_answers: Vec<&str> =
        models.first().map(|m| m.outcomes.iter().map(|o| o.reference.as_str()).collect()).unwrap_or_default();
    Report {
        version: env!("CARGO_PKG_VERSION").into(),
        runtime: runtime.describe(),
        threads: setup.compute.threads,
        gpu_layers: setup.compute.gpu_layers,
        data: DataInfo {
            path: setup.data.display().to_string(),
            sha256: hex(&questions.digest),
            questions: list.len(),
            with_picture,
            text_only: list.len() - with_picture,
            max_tokens: setup.max_tokens,
            bootstrap_resamples: setup.resamples,
            seed: setup.seed,
        },
        reference: info(reference.0, reference.1),
        mmproj: mmproj.map(|(h, d)| info(h, d)),
        reference_accuracy: accuracy(list, &reference_answers, &boot),
        reference_speed: speed(&cost.reference),
        candidates: models.iter().map(|m| candidate(list, m, &boot)).collect(),
        pairs: pairs(list, models, &boot),
        cost: CostInfo {
            wall_seconds: cost.wall,
            prepare_seconds: cost.prepare,
            encode_seconds: cost.encode,
            peak_memory_bytes: peak_memory(),
            cache_bytes: cost.cache_bytes,
            cache_log_prob_error: cache::LOG_PROB_ERROR,
            cache_kl_bound: cache::SELF_KL_BOUND,
        },
        questions: list.iter().enumerate().map(|(i, q)| question(q, i, models)).collect(),
    }
}

fn info(header: &GgufFile, digest: &str) -> ModelInfo {
    ModelInfo {
        name: header.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        sha256: digest.into(),
        file_bytes: header.file_size(),
        weights: header.weights(),
        bits_per_weight: header.bits_per_weight(),
        block_bits_per_weight: header.block_bits_per_weight(),
    }
}

fn speed(times: &Times) -> Speed {
    Speed {
        prefill_tokens_per_second: times.prefill_tokens as f64 / times.prefill,
        decode_tokens_per_second: times.decode_tokens as f64 / times.decode,
        times: *times,
    }
}

struct Bootstrap {
    resamples: usize,
    seed: u64,
}

impl Bootstrap {
    fn interval(&self, clusters: &[Cluster]) -> Interval {
        stats::bootstrap(clusters, self.resamples, self.seed)
    }
}

fn candidate(list: &[&Question], model: &Measured, boot: &Bootstrap) -> Candidate {
    let split = |picture: bool| {
        let chosen: Vec<&Answered> =
            list.iter().zip(&model.outcomes).filter(|(q, _)| q.image.is_some() == picture).map(|(_, o)| o).collect();
        let side = |s: usize| fidelity(&chosen.iter().map(|o| &o.measures[s]).collect::<Vec<_>>(), boot);
        (!chosen.is_empty()).then(|| Split { questions: chosen.len(), greedy: side(0), given: side(1) })
    };
    let answers: Vec<&str> = model.outcomes.iter().map(|o| o.answer.as_str()).collect();
    Candidate {
        model: info(model.header, model.digest),
        mmproj: model.mmproj.map(|(h, d)| info(h, d)),
        picture: split(true),
        text: split(false),
        accuracy: accuracy(list, &answers, boot),
        speed: speed(&model.times),
    }
}

fn fidelity(answers: &[&Measures], boot: &Bootstrap) -> Option<Fidelity> {
    let answers: Vec<_> = answers.iter().filter(|m| !m.kl.is_empty()).collect();
    if answers.is_empty() {
        return None;
    }
    let cluster = |sum: f64, m: &Measures| Cluster { sum, count: m.kl.len() as f64 };
    let clusters =
        |value: &dyn Fn(&Measures) -> f64| -> Vec<Cluster> { answers.iter().map(|m| cluster(value(m), m)).collect() };
    let mut kl: Vec<f64> = answers.iter().flat_map(|m| m.kl.iter().copied()).collect();
    kl.sort_by(f64::total_cmp);
    let sum = |v: &[f64]| v.iter().sum::<f64>();
    let positions = kl.len();
    let total = |value: &dyn Fn(&Measures) -> f64| answers.iter().map(|m| value(m)).sum::<f64>() / positions as f64;
    let ratio = boot.interval(&clusters(&|m| sum(&m.nll) - sum(&m.nll_reference)));
    Some(Fidelity {
        positions,
        kl_mean: boot.interval(&clusters(&|m| sum(&m.kl))),
        kl_median: stats::quantile(&kl, 0.5),
        kl_p99: stats::quantile(&kl, 0.99),
        kl_max: stats::quantile(&kl, 1.0),
        agreement: boot.interval(&clusters(&|m| m.agree.iter().filter(|a| **a).count() as f64)),
        perplexity: total(&|m| sum(&m.nll)).exp(),
        perplexity_reference: total(&|m| sum(&m.nll_reference)).exp(),
        perplexity_ratio: Interval { value: ratio.value.exp(), low: ratio.low.exp(), high: ratio.high.exp() },
    })
}

fn accuracy(list: &[&Question], answers: &[&str], boot: &Bootstrap) -> Option<Accuracy> {
    let mut kinds = BTreeMap::<String, (usize, usize)>::new();
    let mut clusters = Vec::new();
    for (question, answer) in list.iter().zip(answers) {
        let Some(correct) = record::correct(question, answer) else { continue };
        let kind = kinds.entry(question.kind.clone()).or_default();
        kind.0 += usize::from(correct);
        kind.1 += 1;
        clusters.push(Cluster { sum: f64::from(u8::from(correct)), count: 1.0 });
    }
    let correct = kinds.values().map(|k| k.0).sum();
    (!clusters.is_empty()).then(|| Accuracy {
        all: boot.interval(&clusters),
        correct,
        questions: clusters.len(),
        kinds,
    })
}

/// Mean divergence of one question.
fn question_kl(outcome: &Answered) -> Option<f64> {
    outcome.measures.iter().map(|m| &m.kl).find(|kl| !kl.is_empty()).map(|kl| stats::mean(kl))
}

fn pairs(list: &[&Question], models: &[Measured], boot: &Bootstrap) -> Vec<Comparison> {
    const ROUNDS: usize = 20_000;
    let mut pairs = Vec::new();
    for a in 0..models.len() {
        for b in a + 1..models.len() {
            let (mut only_a, mut only_b) = (0, 0);
            let mut differences = Vec::new();
            for ((question, x), y) in list.iter().zip(&models[a].outcomes).zip(&models[b].outcomes) {
                match (record::correct(question, &x.answer), record::correct(question, &y.answer)) {
                    (Some(true), Some(false)) => only_a += 1,
                    (Some(false), Some(true)) => only_b += 1,
                    _ => {}
                }
                if let (Some(x), Some(y)) = (question_kl(x), question_kl(y)) {
                    differences.push(x - y);
                }
            }
            let clusters: Vec<_> = differences.iter().map(|d| Cluster { sum: *d, count: 1.0 }).collect();
            pairs.push(Comparison {
                a,
                b,
                only_a,
                only_b,
                mcnemar_p: stats::mcnemar(only_a, only_b),
                kl_difference: boot.interval(&clusters),
                sign_flip_p: stats::sign_flip(&differences, ROUNDS, boot.seed),
                mcnemar_holm: 1.0,
                sign_flip_holm: 1.0,
            });
        }
    }
    let mcnemar = stats::holm(&pairs.iter().map(|p| p.mcnemar_p).collect::<Vec<_>>());
    let sign_flip = stats::holm(&pairs.iter().map(|p| p.sign_flip_p).collect::<Vec<_>>());
    for ((pair, m), s) in pairs.iter_mut().zip(mcnemar).zip(sign_flip) {
        pair.mcnemar_holm = m;
        pair.sign_flip_holm = s;
    }
    pairs
}

fn question(q: &Question, index: usize, models: &[Measured]) -> QuestionResult {
    let answer =
        |o: &Answered| Answer { text: o.answer.clone(), correct: record::correct(q, &o.answer), kl: question_kl(o) };
    let reference = models.first().map_or("", |m| m.outcomes[index].reference.as_str());
    QuestionResult {
        id: q.id.clone(),
        kind: q.kind.clone(),
        image: q.image.as_ref().map(|p| p.display().to_string()),
        question: q.text.clone(),
        expected: q.answer.clone(),
        reference: Answer { text: reference.into(), correct: record::correct(q, reference), kl: None },
        candidates: models.iter().map(|m| answer(&m.outcomes[index])).collect(),
    }
}

/// Most memory this process held so far, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|k| k * 1024)
}

impl Report {
    /// Seconds of encoding, prefill, scoring and decoding in this report (of all runs that filled the cache).
    pub fn compute_seconds(&self) -> f64 {
        let own = |s: &Speed| s.times.prefill + s.times.score + s.times.decode;
        self.cost.encode_seconds
            + own(&self.reference_speed)
            + self.candidates.iter().map(|c| own(&c.speed)).sum::<f64>()
    }

    /// The tables for a screen.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // invariant: writing to a String cannot fail.
        let _ = self.write_table(&mut out);
        out
    }

    fn write_table(&self, out: &mut String) -> std::fmt::Result {
        let d = &self.data;
        writeln!(out, "{} questions ({} with a picture, {} text only)", d.questions, d.with_picture, d.text_only)?;
        writeln!(out, "reference {}: {}", self.reference.name, size_text(&self.reference))?;
        if let Some(a) = &self.reference_accuracy {
            writeln!(out, "  accuracy {}", accuracy_text(a))?;
        }
        writeln!(out, "  {}", speed_text(&self.reference_speed))?;
        let wide = self.candidates.iter().map(|c| c.model.name.chars().count()).max().unwrap_or(0).max(9);
        self.write_divergences(out, wide)?;
        writeln!(out, "\n{:wide$}  {:>9}  {:>28}  {:>9} {:>9}", "", "MB", "accuracy %", "prefill/s", "decode/s")?;
        for c in &self.candidates {
            writeln!(
                out,
                "{:wide$}  {:>9.1}  {:>28}  {:>9.1} {:>9.1}",
                c.model.name,
                c.model.file_bytes as f64 / 1e6,
                c.accuracy.as_ref().map_or("-".into(), accuracy_text),
                c.speed.prefill_tokens_per_second,
                c.speed.decode_tokens_per_second,
            )?;
        }
        self.write_kinds(out, wide)?;
        self.write_pairs(out)?;
        self.write_cost(out)
    }

    fn write_divergences(&self, out: &mut String, wide: usize) -> std::fmt::Result {
        type Pick = fn(&Candidate) -> Option<&Split>;
        let picks: [(&str, Pick); 2] =
            [("questions with a picture", |c| c.picture.as_ref()), ("text-only questions", |c| c.text.as_ref())];
        type Side = fn(&Split) -> Option<&Fidelity>;
        let sides: [(&str, Side); 2] =
            [("the reference's greedy answers", |s| s.greedy.as_ref()), ("the given answers", |s| s.given.as_ref())];
        for ((title, pick), (what, side)) in picks.iter().flat_map(|pick| sides.iter().map(move |side| (pick, side))) {
            let row = |c| pick(c).and_then(side).map(|f| (c, f));
            let rows: Vec<_> = self.candidates.iter().filter_map(row).collect();
            let Some((_, first)) = rows.first() else { continue };
            writeln!(out, "\n{title}, on {what} ({} positions)", first.positions)?;
            writeln!(
                out,
                "{:wide$}  {:>5} {:>5}  {:>9} {:>21}  {:>9} {:>9} {:>9}  {:>7}  {:>9}",
                "", "bpw", "block", "KL mean", "95 %", "median", "p99", "max", "agree %", "ppl ratio"
            )?;
            for (c, f) in rows {
                writeln!(
                    out,
                    "{:wide$}  {:>5} {:>5}  {:>9} {:>21}  {:>9} {:>9} {:>9}  {:>7.2}  {:>9.4}",
                    c.model.name,
                    bits(c.model.bits_per_weight),
                    bits(c.model.block_bits_per_weight),
                    kl(f.kl_mean.value),
                    format!("[{}, {}]", kl(f.kl_mean.low), kl(f.kl_mean.high)),
                    kl(f.kl_median),
                    kl(f.kl_p99),
                    kl(f.kl_max),
                    100.0 * f.agreement.value,
                    f.perplexity_ratio.value,
                )?;
            }
        }
        Ok(())
    }

    fn write_cost(&self, out: &mut String) -> std::fmt::Result {
        let cost = &self.cost;
        let (wall, compute) = (cost.wall_seconds, self.compute_seconds());
        write!(out, "\n{wall:.1} s; encoding, prefill, scoring and decoding {compute:.1} s")?;
        if let Some(peak) = cost.peak_memory_bytes {
            write!(out, "; peak memory {:.0} MB", peak as f64 / 1e6)?;
        }
        writeln!(
            out,
            "; cache {:.0} MB (log-probabilities within {:.1e}, adds at most {:.1e} to the KL of equal models)",
            cost.cache_bytes as f64 / 1e6,
            cost.cache_log_prob_error,
            cost.cache_kl_bound
        )
    }

    fn write_kinds(&self, out: &mut String, wide: usize) -> std::fmt::Result {
        let Some(reference) = self.reference_accuracy.as_ref().filter(|a| a.kinds.len() > 1) else { return Ok(()) };
        write!(out, "\n{:wide$}", "accuracy % by kind")?;
        for (kind, (_, asked)) in &reference.kinds {
            write!(out, "  {:>12}", format!("{kind} ({asked})"))?;
        }
        let mut row = |name: &str, a: &Accuracy| {
            write!(out, "\n{name:wide$}")?;
            a.kinds.values().try_for_each(|(right, asked)| {
                write!(out, "  {:>12.1}", 100.0 * *right as f64 / (*asked).max(1) as f64)
            })
        };
        row("reference", reference)?;
        for c in &self.candidates {
            if let Some(a) = &c.accuracy {
                row(&c.model.name, a)?;
            }
        }
        writeln!(out)
    }

    fn write_pairs(&self, out: &mut String) -> std::fmt::Result {
        if self.pairs.is_empty() {
            return Ok(());
        }
        writeln!(out, "\npaired tests (p after Holm's correction over all {} pairs)", self.pairs.len())?;
        let neighbours = self.candidates.len() > 3;
        for p in self.pairs.iter().filter(|p| !neighbours || p.b == p.a + 1) {
            let (a, b) = (&self.candidates[p.a].model.name, &self.candidates[p.b].model.name);
            writeln!(
                out,
                "  {a} | {b}: KL {:+.5} [{:+.5}, {:+.5}] p {}; right alone {} | {} p {}",
                p.kl_difference.value,
                p.kl_difference.low,
                p.kl_difference.high,
                probability(p.sign_flip_holm),
                p.only_a,
                p.only_b,
                probability(p.mcnemar_holm)
            )?;
        }
        if neighbours {
            writeln!(out, "  (neighbours in the order given; --json has all)")?;
        }
        Ok(())
    }
}

/// A divergence with the digits it deserves.
pub fn kl(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        v if v < 1e-4 => format!("{v:.1e}"),
        v if v < 0.1 => format!("{v:.5}"),
        v => format!("{v:.4}"),
    }
}

pub(super) fn bits(value: Option<f64>) -> String {
    value.map_or("-".into(), |v| format!("{v:.2}"))
}

pub(super) fn probability(p: f64) -> String {
    if p < 1e-3 { format!("{p:.0e}") } else { format!("{p:.3}") }
}

pub(super) fn accuracy_text(a: &Accuracy) -> String {
    format!(
        "{:.1} [{:.1}, {:.1}] ({}/{})",
        100.0 * a.all.value,
        100.0 * a.all.low,
        100.0 * a.all.high,
        a.correct,
        a.questions
    )
}

fn size_text(m: &ModelInfo) -> String {
    format!("{:.1} MB, {} bits per weight", m.file_bytes as f64 / 1e6, bits(m.bits_per_weight))
}

fn speed_text(s: &Speed) -> String {
    format!("prefill {:.1} tokens/s, decode {:.1} tokens/s", s.prefill_tokens_per_second, s.decode_tokens_per_second)
}
