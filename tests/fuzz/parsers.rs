//! Every parser of outside input, each fed with bytes alone: what the fuzz targets (`tests/fuzz`) and the short slice of
//! them among the ordinary tests (`tests/hostile.rs`) call. An input ends in `Ok` or in an error in words; a panic is a fault.
use mbq_convert::calibrate::importance::Importance;
use mbq_convert::calibrate::pairs::List;
use mbq_convert::checkpoint::Checkpoint;
use mbq_convert::events::Silent;
use mbq_convert::front::vocabulary::Vocabulary;
use mbq_convert::front::{self, FoundModel, FrontMatter, Source};
use mbq_convert::ggml::{self, GgmlType};
use mbq_convert::gguf::{GgufFile, Metadata};
use mbq_convert::hub::Hub;
use mbq_convert::image::decode_rgb;
use mbq_convert::inspect::{InspectOptions, PictureTokens, inspect};
use mbq_convert::prompt::{ChatTemplate, Context, LineEnd, Message, Part, PictureText, gguf::MARK, gguf::adapt};
use mbq_convert::quant::mbq3::{self, BLOCK_BYTES, GROUP, Grid, Mbq3Block};
use mbq_convert::{eval::data::Questions, fuzzing, record::ConversionRecord, report};
use serde_json::json;
use std::fmt::Display;
use std::io::{Cursor, Write};
use std::path::Path;

pub type Outcome = Result<(), String>;

/// A parser, and the longest input that is worth trying.
pub struct Parser {
    pub name: &'static str,
    pub parse: fn(&[u8]) -> Outcome,
    pub max_len: usize,
}

const fn parser(name: &'static str, parse: fn(&[u8]) -> Outcome, max_len: usize) -> Parser {
    Parser { name, parse, max_len }
}

pub const PARSERS: [Parser; 19] = [
    parser("safetensors", safetensors, 8 << 10),
    parser("index", index, 4 << 10),
    parser("checkpoint", checkpoint, 64 << 10),
    parser("tokenizer", tokenizer, 32 << 10),
    parser("sentencepiece", sentencepiece, 32 << 10),
    parser("torch", torch, 8 << 10),
    parser("pickle", pickle, 4 << 10),
    parser("gguf", gguf, 16 << 10),
    parser("picture", picture, 16 << 10),
    parser("pairs", pairs, 8 << 10),
    parser("questions", questions, 8 << 10),
    parser("template", template, 8 << 10),
    parser("hub", hub, 8 << 10),
    parser("request", request, 16 << 10),
    parser("headers", headers, 1 << 10),
    parser("mbq3", mbq3, 4 << 10),
    parser("record", record, 16 << 10),
    parser("evaluation", evaluation, 16 << 10),
    parser("card", card, 4 << 10),
];

/// Between the files of an input that is several: no byte of JSON, YAML or Jinja.
pub const SEPARATOR: u8 = 0x1e;

fn words(error: impl Display) -> String {
    error.to_string()
}

/// A folder of this thread with `files` and nothing else; in memory where the system has such a place.
fn folder<T>(files: &[(&str, &[u8])], with: impl FnOnce(&Path) -> T) -> T {
    thread_local! {
        static FOLDER: tempfile::TempDir = {
            let memory = Path::new("/dev/shm");
            let place = if memory.is_dir() { memory.into() } else { std::env::temp_dir() };
            tempfile::Builder::new().prefix("mbq-fuzz-").tempdir_in(place).unwrap()
        };
    }
    FOLDER.with(|folder| {
        let dir = folder.path().join("model");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        files.iter().for_each(|(name, bytes)| std::fs::write(dir.join(name), bytes).unwrap());
        with(&dir)
    })
}

/// `data` as the files `names`, in this order; an empty one is not there.
fn several<'d, 'n>(data: &'d [u8], names: &[&'n str]) -> Vec<(&'n str, &'d [u8])> {
    let parts = data.splitn(names.len(), |b| *b == SEPARATOR);
    names.iter().copied().zip(parts).filter(|(_, part)| !part.is_empty()).collect()
}

/// The bytes of all tensors in a safetensors header, `most` at most.
fn data_bytes(header: &[u8], most: u64) -> u64 {
    let json: serde_json::Value = serde_json::from_slice(header).unwrap_or_default();
    let ends = json.as_object().into_iter().flatten().filter_map(|(_, entry)| entry["data_offsets"][1].as_u64());
    ends.filter(|end| *end <= most).max().unwrap_or(0)
}

/// A safetensors file with this header, without its data.
fn headed(header: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header].concat()
}

/// Appends zeros that take no room.
fn append_zeros(path: &Path, n: u64) {
    let file = std::fs::File::options().append(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() + n).unwrap();
}

/// Reads every tensor, too.
fn opened(dir: &Path) -> Outcome {
    let checkpoint = Checkpoint::open(dir).map_err(words)?;
    for name in checkpoint.names() {
        let shape = checkpoint.tensor(name).map_err(words)?.shape.to_vec();
        let _ = checkpoint.f32(name, &shape);
    }
    Ok(())
}

fn safetensors(data: &[u8]) -> Outcome {
    folder(&[("config.json", b"{}"), ("model.safetensors", data)], opened)
}

fn index(data: &[u8]) -> Outcome {
    let shard = |name: &str| {
        let header = json!({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).to_string();
        [headed(header.as_bytes()), vec![0; 8]].concat()
    };
    let files: [(&str, &[u8]); 4] = [
        ("config.json", b"{}"),
        ("model.safetensors.index.json", data),
        ("model-1.safetensors", &shard("a")),
        ("model-2.safetensors", &shard("b")),
    ];
    folder(&files, opened)
}

/// What [`checkpoint`] takes, in this order; the last is the header of the weights, which are zeros.
pub const CHECKPOINT: [&str; 9] = [
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "README.md",
    "model.safetensors",
];

/// A whole checkpoint through its family's front.
fn checkpoint(data: &[u8]) -> Outcome {
    let mut files = several(data, &CHECKPOINT);
    let header = files.pop_if(|(name, _)| *name == "model.safetensors").map_or(&b"{}"[..], |(_, header)| header);
    let weights = headed(header);
    files.push(("model.safetensors", &weights));
    folder(&files, |dir| {
        append_zeros(&dir.join("model.safetensors"), data_bytes(header, 1 << 30));
        let hub = Hub { endpoint: String::new(), cache: dir.join("cache"), token: None, offline: true };
        let found = FoundModel::find(dir, None, &hub, &Silent).map_err(words)?;
        let pair = found.pair().map_err(words)?;
        read(&pair.text)?;
        pair.mmproj.as_ref().map_or(Ok(()), read)?;
        pair.text.text_config().map(drop).map_err(words)
    })
}

/// The values of small tensors.
fn read(source: &Source) -> Outcome {
    for tensor in source.tensors.iter().filter(|t| t.elements() <= 1 << 14) {
        source.values.values(&tensor.name, 0..tensor.elements()).map_err(words)?;
        source.values.bytes(&tensor.name);
    }
    Ok(())
}

/// What [`tokenizer`] takes, in this order.
pub const TOKENIZER: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "processor_config.json",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
];

fn vocabulary(files: &[(&str, &[u8])], rows: usize) -> Outcome {
    let weights = headed(b"{}");
    let files = [&[("config.json", &b"{}"[..]), ("model.safetensors", &weights)], files].concat();
    folder(&files, |dir| {
        let checkpoint = Checkpoint::open(dir).map_err(words)?;
        let vocabulary = Vocabulary::read(&checkpoint, rows, PictureText::LLAVA, None).map_err(words)?;
        vocabulary.write(&mut Metadata::default());
        Ok(())
    })
}

fn tokenizer(data: &[u8]) -> Outcome {
    vocabulary(&several(data, &TOKENIZER), 320)
}

fn sentencepiece(data: &[u8]) -> Outcome {
    let config =
        br#"{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                      "pad_token": "<pad>", "legacy": false, "add_bos_token": true, "add_eos_token": false}"#;
    vocabulary(&[("tokenizer.model", data), ("tokenizer_config.json", config)], 2048)
}

fn torch(data: &[u8]) -> Outcome {
    folder(&[("config.json", b"{}"), ("pytorch_model.bin", data)], opened)
}

/// A pickle in an archive that is sound, with a storage of 64 bytes.
fn pickle(data: &[u8]) -> Outcome {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("archive/data.pkl", data), ("archive/data/0", &[0; 64])] {
        archive.start_file(name, stored).map_err(words)?;
        archive.write_all(bytes).map_err(words)?;
    }
    torch(&archive.finish().map_err(words)?.into_inner())
}

/// One file, or two shards: the second begins at the next `GGUF`. Behind both lie zeros for data.
fn gguf(data: &[u8]) -> Outcome {
    let second = (4..data.len()).find(|&at| data[at..].starts_with(b"GGUF"));
    let (first, rest) = data.split_at(second.unwrap_or(data.len()));
    let files = match second {
        None => vec![("m.gguf", first)],
        Some(_) => vec![("m-00001-of-00002.gguf", first), ("m-00002-of-00002.gguf", rest)],
    };
    folder(&files, |dir| {
        files.iter().for_each(|(name, _)| append_zeros(&dir.join(name), 1 << 20));
        model_file(&dir.join(files[0].0))
    })
}

fn model_file(path: &Path) -> Outcome {
    let file = GgufFile::open(path).map_err(words)?;
    let _ = (file.file_size(), file.weights(), file.bits_per_weight(), file.block_bits_per_weight());
    let _ = (PictureTokens::of(&file), file.vocabulary_difference(&file), Importance::read(path, &[]));
    let inspection = inspect(path, &InspectOptions { context: None, mmproj: None, verify: true }).map_err(words)?;
    drop(serde_json::to_string(&inspection));
    if file.is_projector() {
        return read(&front::gguf::open(path).map_err(words)?);
    }
    let pair = front::gguf::pair(path, None).map_err(words)?;
    read(&pair.text)?;
    pair.text.text_config().map(drop).map_err(words)
}

fn picture(data: &[u8]) -> Outcome {
    let picture = decode_rgb(Path::new("picture"), data).map_err(words)?;
    assert_eq!(picture.data.len(), 3 * picture.width * picture.height);
    Ok(())
}

/// One white pixel.
const PIXEL: &[u8] = b"GIF89a\x01\0\x01\0\x80\0\0\xff\xff\xff\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;";

fn pairs(data: &[u8]) -> Outcome {
    folder(&[("pairs.json", data), ("a.gif", PIXEL)], |dir| {
        let list = List::read(&dir.join("pairs.json"), None).map_err(words)?;
        list.draw(2, 1);
        for i in 0..list.len().min(64) {
            let conversation = list.conversation(i)?;
            conversation.pictures.iter().try_for_each(|picture| picture.load().map(drop))?;
        }
        Ok(())
    })
}

fn questions(data: &[u8]) -> Outcome {
    folder(&[("questions.jsonl", data), ("a.gif", PIXEL)], |dir| {
        Questions::read(&dir.join("questions.jsonl"), dir, None).map(drop).map_err(words)
    })
}

fn template(data: &[u8]) -> Outcome {
    let source = std::str::from_utf8(data).map_err(words)?;
    let variables = json!({"bos_token": "<s>", "eos_token": "</s>", "tools": null, "documents": null});
    let variables = variables.as_object().cloned().unwrap_or_default();
    let context = Context { variables, image: "<image>".into(), behind_image: "\n".into(), ..Context::default() };
    let template = ChatTemplate::new(source.into(), context).map_err(words)?;
    let turns =
        [Message::new("user", 1, "What is it?"), Message::new("assistant", 0, "A star."), Message::new("user", 0, "?")];
    let _ = template.conversation(&turns);
    adapt(&template, "<image>", LineEnd::Runtime);
    template.prompt(&turns[..1]).map(drop).map_err(words)
}

fn hub(data: &[u8]) -> Outcome {
    fuzzing::hub_answer(data)
}

/// A request's body up to the prompt.
fn request(data: &[u8]) -> Outcome {
    const TEMPLATE: &str = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>";
    let messages = folder(&[("a.gif", PIXEL)], |dir| fuzzing::chat_request(data, dir))?;
    assert!(
        messages.iter().flat_map(|m| &m.parts).all(|part| !matches!(part, Part::Text(text) if text.contains(MARK)))
    );
    let context = Context { strings: true, image: MARK.into(), ..Context::default() };
    let template = ChatTemplate::new(TEMPLATE.into(), context).map_err(words)?;
    template.prompt(&messages).map(drop).map_err(words)
}

fn headers(data: &[u8]) -> Outcome {
    fuzzing::headers(data)
}

/// Bytes as blocks, and as weights.
fn mbq3(data: &[u8]) -> Outcome {
    for block in data.as_chunks::<BLOCK_BYTES>().0 {
        assert_eq!(&Mbq3Block::unpack(block).pack(), block);
    }
    let weights: Vec<f32> = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    for grid in [Grid::Paper, Grid::Mended, Grid::Free] {
        let Ok(bytes) = mbq3::quantize(&weights[..weights.len() / GROUP * GROUP], grid) else { continue };
        ggml::validate(GgmlType::MBQ3, &bytes).map_err(words)?;
        let values = mbq3::dequantize(&bytes).map_err(words)?;
        assert_eq!(ggml::dequantize(GgmlType::MBQ3, &bytes).map_err(words)?, values);
    }
    let values = mbq3::dequantize(data).map_err(words)?;
    let finite = values.iter().all(|v| v.is_finite());
    let sound = ggml::validate(GgmlType::MBQ3, data).map_err(words);
    assert!(finite || sound.is_err(), "values that are no numbers in a block that is called sound");
    sound
}

/// A model of no tensors, which records and evaluations are about.
fn empty_model() -> Vec<u8> {
    let key = |name: &str, value: &str| {
        let text = |t: &str| [&(t.len() as u64).to_le_bytes(), t.as_bytes()].concat();
        [text(name), 8u32.to_le_bytes().to_vec(), text(value)].concat()
    };
    let keys = [key("general.architecture", "qwen2"), key("general.name", "m")].concat();
    let mut file = [&b"GGUF\x03\0\0\0"[..], &0u64.to_le_bytes(), &2u64.to_le_bytes(), &keys].concat();
    file.resize(file.len().next_multiple_of(32), 0);
    file
}

fn record(data: &[u8]) -> Outcome {
    page(data, None)
}

/// What `eval --json` writes, and [`SEPARATOR`], and the record.
fn evaluation(data: &[u8]) -> Outcome {
    let mut parts = data.splitn(2, |b| *b == SEPARATOR);
    let (evaluation, record) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    page(record, Some(evaluation))
}

/// The page about a model.
fn page(record: &[u8], evaluation: Option<&[u8]>) -> Outcome {
    let model = empty_model();
    let files = [("m.gguf", &model[..]), ("m.mbq.json", record), ("eval.json", evaluation.unwrap_or_default())];
    folder(&files, |dir| {
        let path = dir.join("m.gguf");
        let record = ConversionRecord::read(&dir.join("m.mbq.json")).map_err(words)?;
        record.encode();
        let eval = evaluation.map(|_| dir.join("eval.json"));
        report::page(&path, &report::ReportOptions { eval, no_pictures: false }).map(drop).map_err(words)
    })
}

fn card(data: &[u8]) -> Outcome {
    let front_matter = FrontMatter::parse(&String::from_utf8_lossy(data))?;
    folder(&[("README.md", data)], |dir| {
        let mut keys = Metadata::default();
        front::Card::read(dir)?.write(&mut keys);
        front_matter.map(drop).ok_or_else(|| "no front matter".into())
    })
}
