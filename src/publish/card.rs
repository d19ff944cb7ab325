//! README.md of a repository with models that this program wrote.
use super::check;
use super::quality::{Quality, Report};
use super::yaml::FrontMatterText;
use crate::ModelFileError;
use crate::digest::{FileDigest, file_name, hex};
use crate::gguf::{GgufError, GgufFile, ROTATION_KEY, ShardName, belongs};
use crate::inspect::{MemoryEstimate, RuntimeNeed};
use crate::record::{ConversionRecord, RecordError};
use crate::runtime::{RuntimeError, find_mmproj};
use serde_json::Value;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// What the files do not say.
#[derive(Debug, Clone, Default)]
pub struct CardOptions {
    /// `org/name` of the checkpoint, where the files do not know it.
    pub base_model: Option<String>,
    /// The publisher's name.
    pub quantized_by: Option<String>,
    /// eval's JSON.
    pub eval: Option<PathBuf>,
}

/// A card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelCard {
    /// Of README.md.
    pub text: String,
    /// What its author should add or know.
    pub notes: Vec<String>,
}

/// A model with everything that is told of it.
struct Published {
    file: GgufFile,
    digests: Vec<FileDigest>,
    record: ConversionRecord,
    mmproj: Option<(GgufFile, FileDigest)>,
    need: RuntimeNeed,
    quality: Option<Quality>,
}

impl Published {
    /// Reads the model at `path`, its record and its mmproj, which must be those that belong to it.
    fn read(path: &Path, report: Option<&Report>) -> Result<Self, ModelFileError> {
        let file = GgufFile::open(path)?;
        if file.is_projector() {
            return Err(ModelFileError::unfit(path, "is an mmproj; give the language model, it is found beside it"));
        }
        let found = ConversionRecord::beside(path)?;
        let missing =
            || RecordError::Missing { model: path.into(), record: file_name(&ConversionRecord::path_of(path)) };
        let (record_path, record) = found.ok_or_else(missing)?;
        let digests: Vec<FileDigest> = file.contents().iter().map(|(p, bytes)| FileDigest::of(p, bytes)).collect();
        let is_listed = |d: &FileDigest| record.files().any(|f| f.sha256 == d.sha256);
        if let Some(other) = digests.iter().find(|d| !is_listed(d)) {
            let problem = format!(
                "is not what the record {} describes: it lists no file with the SHA-256 {}; put the model's own record \
                 beside it, or convert again",
                record_path.display(),
                other.sha256
            );
            return Err(ModelFileError::unfit(path.with_file_name(&other.name), problem));
        }
        let mmproj = match find_mmproj(path) {
            Ok(found) => Some(GgufFile::open(&found)?),
            Err(RuntimeError::NoMmproj { .. }) if record.summary.mmproj.is_none() => None,
            Err(error) => return Err(error.into()),
        };
        if let Some(mmproj) = &mmproj
            && !belongs(&file.metadata, &mmproj.metadata)
        {
            return Err(GgufError::Pair { model: path.into(), mmproj: mmproj.path.clone() }.into());
        }
        let need = mmproj.iter().map(RuntimeNeed::of).fold(RuntimeNeed::of(&file), RuntimeNeed::and);
        let mmproj = mmproj.map(|m| {
            let digests: Vec<FileDigest> = m.contents().iter().map(|(p, bytes)| FileDigest::of(p, bytes)).collect();
            (m, digests)
        });
        let mmproj = mmproj.and_then(|(m, digests)| Some((m, digests.into_iter().next()?)));
        // Of a single file it is the file's; eval hashes the files of a split model together.
        let digest = match digests.as_slice() {
            [one] => one.sha256.clone(),
            _ => hex(&file.digest()),
        };
        let quality = report.map(|r| r.of(&digest)).transpose()?.flatten();
        Ok(Published { file, digests, record, mmproj, need, quality })
    }

    fn name(&self) -> String {
        file_name(&self.file.path)
    }

    fn mmproj_name(&self) -> Option<String> {
        self.mmproj.as_ref().map(|(m, _)| file_name(&m.path))
    }

    fn key(&self, key: &str) -> Option<&str> {
        self.file.metadata.str(&format!("general.{key}"))
    }

    fn list(&self, key: &str) -> Vec<String> {
        let list = self.file.metadata.get(&format!("general.{key}")).and_then(|v| v.as_array());
        list.iter().flat_map(|l| l.iter()).filter_map(|v| v.as_str().map(String::from)).collect()
    }

    /// `org/name` of what was quantised, as far as the files know it.
    fn base_model(&self) -> Option<String> {
        self.key("source.huggingface.repository").map(String::from)
    }

    fn bytes(&self) -> u64 {
        self.digests.iter().map(|d| d.bytes).sum()
    }
}

/// Makes a card of `models`, all of one checkpoint.
///
/// # Errors
/// A file that cannot be read, has no record or another model's, or no mmproj of its own; models of different checkpoints;
/// an evaluation of other files.
pub fn card(models: &[PathBuf], options: &CardOptions) -> Result<ModelCard, ModelFileError> {
    let report = options.eval.as_deref().map(Report::read).transpose()?;
    let models = models.iter().map(|path| Published::read(path, report.as_ref())).collect::<Result<Vec<_>, _>>()?;
    let Some(first) = models.first() else { return Err(ModelFileError::unfit("", "no model is given")) };
    let same = |m: &&Published| (m.base_model(), m.key("name")) != (first.base_model(), first.key("name"));
    if let Some(other) = models.iter().find(same) {
        let problem = format!("is of another checkpoint than {}; make a card for each", first.name());
        return Err(ModelFileError::unfit(&other.file.path, problem));
    }
    if let (Some(report), Some(path), true) = (&report, &options.eval, models.iter().all(|m| m.quality.is_none())) {
        let names = models.iter().map(Published::name).collect::<Vec<_>>().join(", ");
        let problem = format!("measured other files ({}) than {names}; run eval with these", report.candidates());
        return Err(ModelFileError::unfit(path, problem));
    }
    if let Some(id) = options.base_model.as_deref().filter(|id| !check::is_repository(id)) {
        return Err(ModelFileError::unfit(id, "is no id of a repository, org/name (--base-model)"));
    }
    let writer =
        Writer { base_model: options.base_model.clone().or_else(|| first.base_model()), models: &models, first };
    let mut notes = Vec::new();
    if writer.base_model.is_none() {
        notes.push("the files do not say of which repository the checkpoint is; --base-model org/name adds it".into());
    }
    if first.key("license").or(first.key("license.name")).is_none() {
        notes.push("the checkpoint's card named no licence; add `license:` to the front matter".into());
    }
    if report.is_none() {
        notes.push(
            "nothing is said of quality: measure it with `mbq-convert eval … --json FILE` and give --eval FILE".into(),
        );
    }
    if writer.calibration_source().is_some_and(|source| source != BUILT_IN) {
        notes.push("the calibration data's licence is not known to the program; state it under Provenance".into());
    }
    let front = writer.front_matter(options.quantized_by.as_deref());
    Ok(ModelCard { text: format!("{front}\n{}", writer.body(report.as_ref())), notes })
}

/// The calibration set's name in records.
const BUILT_IN: &str = "built-in";
/// Tags of the checkpoint's card that are not true of GGUF files.
const NOT_OURS: [&str; 9] = [
    "custom_code",
    "transformers",
    "safetensors",
    "pytorch",
    "onnx",
    "transformers.js",
    "text-generation-inference",
    "gguf",
    "llama.cpp",
];

/// Writes the parts of a card.
struct Writer<'m> {
    models: &'m [Published],
    first: &'m Published,
    base_model: Option<String>,
}

impl Writer<'_> {
    fn front_matter(&self, quantized_by: Option<&str>) -> String {
        let first = self.first;
        let mut front = FrontMatterText::new();
        if let Some(base) = &self.base_model {
            front.set("base_model", &[base]);
            front.set("base_model_relation", &["quantized"]);
        }
        let several = |key: &str| first.key(key).map(|v| v.split(',').map(str::trim).collect::<Vec<_>>());
        // Some checkpoints name a licence of their own and leave out the word that the hub wants with it.
        let unnamed = first.key("license.name").map_or(vec![], |_| vec!["other"]);
        front.set("license", &several("license").unwrap_or(unnamed));
        front.set("license_name", first.key("license.name").as_slice());
        front.set("license_link", self.license_link().as_slice());
        front.set("pipeline_tag", &[if first.mmproj.is_some() { "image-text-to-text" } else { "text-generation" }]);
        // A library of the hub's: what it makes of files in this format.
        front.set("library_name", &["gguf"]);
        front.list("language", &first.list("languages"));
        let mut tags: Vec<String> = ["gguf", "llama.cpp", "mbq-convert"].map(String::from).into();
        let methods = self.models.iter().map(|m| m.record.method.clone());
        let types = self.models.iter().map(|m| m.record.summary.model.file_type.clone());
        let carried = first.list("tags").into_iter().filter(|tag| !NOT_OURS.contains(&tag.as_str()));
        for tag in types.chain(methods.filter(|m| m != "rtn")).chain(carried) {
            if !tags.contains(&tag) {
                tags.push(tag);
            }
        }
        front.list("tags", &tags);
        front.set("quantized_by", quantized_by.as_slice());
        front.end()
    }

    /// A file of the checkpoint's repository is linked to there.
    fn license_link(&self) -> Option<String> {
        let link = self.first.key("license.link")?;
        match &self.base_model {
            Some(base) if !link.contains("://") => Some(format!("https://huggingface.co/{base}/blob/main/{link}")),
            _ => Some(link.into()),
        }
    }

    fn body(&self, report: Option<&Report>) -> String {
        let mut out = String::new();
        let name = self.first.key("name").map_or_else(|| ShardName::stem_of(&self.first.file.path), String::from);
        let base = match &self.base_model {
            Some(base) => format!("[{base}](https://huggingface.co/{base})"),
            None => name.clone(),
        };
        let _ = writeln!(out, "# {name}, GGUF\n\n{base}, quantised for llama.cpp with mbq-convert.\n");
        self.files(&mut out);
        match report {
            Some(report) => self.quality(report, &mut out),
            None => out.push_str("## Quality\nThe quality of these files has not been measured.\n\n"),
        }
        self.commands(&mut out);
        self.provenance(&mut out);
        self.limits(&mut out);
        out
    }

    fn files(&self, out: &mut String) {
        out.push_str("## Files\n| file | type | size | bits per weight | runs in |\n|---|---|---:|---:|---|\n");
        let size = |bytes: u64| match bytes {
            1_000_000_000.. => format!("{:.2} GB", bytes as f64 / 1e9),
            _ => format!("{:.1} MB", bytes as f64 / 1e6),
        };
        let mut rows: Vec<String> = Vec::new();
        for m in self.models {
            let (model, count) = (&m.record.summary.model, m.digests.len());
            let runs_in = if RuntimeNeed::of(&m.file).stock { "any llama.cpp" } else { "mbq-convert's llama.cpp" };
            let more = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
            let bits = m.file.bits_per_weight().map_or("?".into(), |b| format!("{b:.2}"));
            let (name, ty) = (m.name(), model.file_type.to_uppercase());
            rows.push(format!("| `{name}`{more} | {ty} | {} | {bits} | {runs_in} |", size(m.bytes())));
        }
        for (file, digest) in self.models.iter().filter_map(|m| m.mmproj.as_ref()) {
            let runs_in = if RuntimeNeed::of(file).stock { "any llama.cpp" } else { "mbq-convert's llama.cpp" };
            let bits = file.bits_per_weight().map_or("?".into(), |b| format!("{b:.2}"));
            let row = format!("| `{}` | vision | {} | {bits} | {runs_in} |", digest.name, size(digest.bytes));
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        rows.iter().for_each(|row| out.extend([row.as_str(), "\n"]));
        let first = self.first;
        if let Some(memory) = MemoryEstimate::new(&first.file, first.mmproj.as_ref().map(|(m, _)| m), None) {
            let _ = writeln!(
                out,
                "\nWith {} tokens of context `{}` takes {} of memory, and llama.cpp's buffers.",
                memory.context,
                first.name(),
                size(memory.total)
            );
        }
        out.push('\n');
    }

    fn quality(&self, report: &Report, out: &mut String) {
        let _ = writeln!(out, "## Quality\n{}\n", report.method());
        out.push_str("| file | answers about | KL divergence, nats per token | same first token | right answers |\n");
        out.push_str("|---|---|---|---|---|\n");
        for m in self.models {
            let Some(q) = &m.quality else {
                let _ = writeln!(out, "| `{}` | not measured | | | |", m.name());
                continue;
            };
            let about = if q.pictures { "pictures" } else { "texts" };
            let accuracy = q.accuracy.map_or("-".into(), |a| a.percent());
            let (kl, agreement) = (q.kl.nats(), q.agreement.percent());
            let _ = writeln!(out, "| `{}` | {about} | {kl} | {agreement} | {accuracy} |", m.name());
        }
        if let Some(accuracy) = report.reference_accuracy() {
            let _ = writeln!(out, "\nThe reference answers {} right.", accuracy.percent());
        }
        out.push('\n');
    }

    fn commands(&self, out: &mut String) {
        out.push_str("## Run it\n");
        let (ours, stock): (Vec<&Published>, Vec<&Published>) = self.models.iter().partition(|m| !m.need.stock);
        if let Some(m) = ours.first() {
            self.commands_of_ours(m, out);
        }
        if let Some(m) = stock.first() {
            commands_of_stock(m, out);
        }
    }

    fn commands_of_ours(&self, m: &Published, out: &mut String) {
        let name = m.name();
        let (picture, mmproj) = match m.mmproj_name() {
            Some(mmproj) => (" --image picture.jpg", format!(" --mmproj {mmproj}")),
            None => ("", String::new()),
        };
        let reasons = m.need.reasons.join(", ");
        let _ = writeln!(
            out,
            "### With mbq-convert's llama.cpp\n`{name}` needs it ({reasons}): other builds of llama.cpp, and Ollama and LM Studio, \
             which have their own, refuse the file.\n\n```\nmbq-convert chat {name}{picture} -p \"What is this?\"\n\n\
             mbq-convert runtime install llama\nllama/llama-mtmd-cli -m {name}{mmproj} --jinja{picture} -p \"What is this?\"\n```\n"
        );
    }

    /// Where the calibration's pairs came from.
    fn calibration_source(&self) -> Option<&str> {
        self.first.record.calibration.as_ref()?["settings"]["source"].as_str()
    }

    fn provenance(&self, out: &mut String) {
        let record = &self.first.record;
        out.push_str("## Provenance\n");
        let origin = record.origin.as_ref();
        let source = self.base_model.clone().unwrap_or_else(|| file_name(Path::new(&record.source)));
        let revision = origin.and_then(|o| o.revision.as_ref()).map_or(String::new(), |r| format!(", revision `{r}`"));
        let _ = writeln!(out, "- Checkpoint: {source}{revision}");
        for f in origin.iter().flat_map(|o| &o.files) {
            let digest = f.sha256.as_ref().map_or(String::new(), |d| format!(", SHA-256 `{d}`"));
            let _ = writeln!(out, "  - `{}`, {} bytes{digest}", f.name, f.bytes);
        }
        for m in self.models {
            let _ = writeln!(out, "- `{}`: {}, method `{}`", m.name(), m.record.converter, m.record.method);
            calibration(m.record.calibration.as_ref(), out);
        }
        out.push_str("\n| SHA-256 | file |\n|---|---|\n");
        let mut seen: Vec<&FileDigest> = Vec::new();
        let files = self.models.iter().flat_map(|m| m.digests.iter().chain(m.mmproj.iter().map(|(_, d)| d)));
        for digest in files {
            if !seen.contains(&digest) {
                let _ = writeln!(out, "| `{}` | `{}` |", digest.sha256, digest.name);
                seen.push(digest);
            }
        }
        out.push('\n');
    }

    fn limits(&self, out: &mut String) {
        out.push_str("## Limits\n");
        out.push_str("- Rounding changes answers; what the checkpoint does wrong, these files do too.\n");
        if self.models.iter().any(|m| m.need.stock && m.mmproj.is_some()) {
            out.push_str(
                "- mbq-convert's llama.cpp is held to transformers in how it prepares pictures; other builds may scale or cut them \
                 in another way, and then answer otherwise.\n",
            );
        }
        let rotated = self.models.iter().find(|m| m.file.metadata.get(ROTATION_KEY).is_some());
        if let Some((m, mmproj)) = rotated.and_then(|m| Some((m, m.mmproj_name()?))) {
            let name = m.name();
            let _ = writeln!(
                out,
                "- `{name}` is in a rotated basis: only `{mmproj}` goes with it, no other mmproj of the checkpoint."
            );
        }
        for m in self.models.iter().filter(|m| !m.record.summary.model.fallbacks.is_empty()) {
            let (name, model) = (m.name(), &m.record.summary.model);
            let count = model.fallbacks.len();
            let _ = writeln!(
                out,
                "- In `{name}` {count} of {} tensors have another type than asked for, whose blocks fit their rows.",
                model.tensors
            );
        }
        if let Some(licence) = self.first.key("license.name").or(self.first.key("license")) {
            let _ = writeln!(out, "- The checkpoint's licence ({licence}) holds for these files.");
        }
    }
}

/// What the weights were calibrated on.
fn calibration(record: Option<&Value>, out: &mut String) {
    let Some(record) = record else {
        out.push_str("  - rounded to nearest, without calibration\n");
        return;
    };
    let source = record["settings"]["source"].as_str().unwrap_or("?");
    let (samples, tokens) = (&record["settings"]["samples"], &record["tokens"]);
    let own = record["own_answers"].as_object().is_some_and(|turns| !turns.is_empty());
    let own = if own { " and what the checkpoint itself answers about them" } else { "" };
    let digest = record["data_sha256"].as_str().unwrap_or("?");
    let (source, licence) = match source {
        BUILT_IN => ("mbq-convert's built-in set of drawn pictures".into(), "MIT licence"),
        path => (format!("`{}`", file_name(Path::new(path))), "licence: not known to the program"),
    };
    let _ = writeln!(
        out,
        "  - calibrated on {samples} pictures with texts{own} ({tokens} tokens) of {source}, SHA-256 of what was read `{digest}`, {licence}"
    );
}

fn commands_of_stock(m: &Published, out: &mut String) {
    let name = m.name();
    let (picture, mmproj) = match m.mmproj_name() {
        Some(mmproj) => (" --image picture.jpg", format!(" --mmproj {mmproj}")),
        None => ("", String::new()),
    };
    let tool = if m.mmproj.is_some() { "llama-mtmd-cli" } else { "llama-cli" };
    let _ = writeln!(
        out,
        "### With any llama.cpp\n```\n{tool} -m {name}{mmproj} --jinja{picture} -p \"What is this?\"\nllama-server -m {name}{mmproj} \
         --jinja\n```\n"
    );
    let (one, merged) = match m.digests.len() {
        1 => (name.clone(), String::new()),
        _ => {
            let whole = format!("{}.gguf", ShardName::stem_of(&m.file.path));
            let merge = format!(" They want one file: `llama-gguf-split --merge {name} {whole}`.");
            (whole, merge)
        }
    };
    let from = m.mmproj_name().map_or(String::new(), |mmproj| format!("FROM ./{mmproj}\n"));
    let _ = writeln!(
        out,
        "### With Ollama or LM Studio\nNeither was tried with these files.{merged} Ollama: `ollama create NAME -f Modelfile` with this \
         Modelfile, for the families whose projector it takes from GGUF files:\n\n```\nFROM ./{one}\n{from}```\n\nLM Studio: the files \
         together in a folder `PUBLISHER/NAME` of its models folder.\n"
    );
}
