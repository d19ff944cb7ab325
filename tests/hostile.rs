//! The fuzz targets' parsers (`tests/fuzz`) on inputs that are broken in ways that do not change from run to run: every one
//! ends in a value or in an error in words, soon, and within a gibibyte. `docs/notes/fuzzing.md` tells of the long runs.
#![allow(unsafe_code)] // an allocator that counts
#[path = "fuzz/parsers.rs"]
mod parsers;

use mbq_convert::bounded::Allocator;
use mbq_convert::random::Rng;
use parsers::{PARSERS, Parser};
use std::alloc::{GlobalAlloc, Layout};
use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Memory that an input may take, bytes.
const MOST: usize = 1 << 30;
/// For one input.
const LONGEST: Duration = Duration::from_secs(10);

/// The program's allocator, counting.
struct Counting;
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the program's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(HELD.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise is the allocator's.
        unsafe { Allocator.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(HELD.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promise is the allocator's.
        unsafe { Allocator.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is the allocator's.
        unsafe { Allocator.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Parsers that take milliseconds for an input.
const COSTLY: [&str; 4] = ["checkpoint", "tokenizer", "template", "gguf"];

/// By parser, the inputs to begin with.
fn seeds() -> BTreeMap<String, Vec<Vec<u8>>> {
    let mut archive = zip::ZipArchive::new(Cursor::new(include_bytes!("fuzz/seeds.zip"))).unwrap();
    let mut seeds: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i).unwrap();
        let (mut bytes, name) = (Vec::new(), entry.name().unwrap().into_owned());
        entry.read_to_end(&mut bytes).unwrap();
        seeds.entry(name.split('/').next().unwrap().into()).or_default().push(bytes);
    }
    seeds
}

/// Numbers at the ends of their types, as texts have them.
const NUMBERS: [&str; 10] = [
    "0",
    "-1",
    "1e400",
    "4294967295",
    "2147483648",
    "18446744073709551615",
    "18446744073709551616",
    "1e-320",
    "0.5",
    "99999999",
];

/// Breaks `input` in one place.
fn mutate(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Rng) {
    let at = random.below(input.len() + 1);
    let end = at + random.below((input.len() - at).min(64) + 1);
    match random.below(10) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
        // A length, little-endian or big-endian.
        2 => {
            let value = [0, 1, 0x7fff_ffff, 0xffff_ffff, 1 << 40, 1 << 60, u64::MAX >> 1, u64::MAX][random.below(8)];
            let bytes = if random.below(4) == 0 { value.to_be_bytes() } else { value.to_le_bytes() };
            let n = [1, 2, 4, 8][random.below(4)].min(input.len() - at);
            input[at..at + n].copy_from_slice(&bytes[..n]);
        }
        3 => input.truncate(at),
        4 => drop(input.drain(at..end)),
        5 => {
            let part = input[at..end].to_vec();
            input.splice(at..at, part.repeat(1 + random.below(8)));
        }
        // The next number of a text.
        6 => {
            let is_digit = |b: &u8| b.is_ascii_digit();
            if let Some(start) = input[at..].iter().position(is_digit).map(|n| at + n) {
                let n = input[start..].iter().take_while(|b| is_digit(b)).count();
                input.splice(start..start + n, NUMBERS[random.below(NUMBERS.len())].bytes());
            }
        }
        7 => drop(input.splice(at..at, [b'[', b'{', b'(', 0xff][random.below(4)..][..1].repeat(random.below(300)))),
        8 => {
            let other = &others[random.below(others.len())];
            let from = random.below(other.len() + 1);
            input.truncate(at);
            input.extend(&other[from..]);
        }
        _ if end < input.len() => input.swap(at, end),
        _ => input.push(random.next_u64() as u8),
    }
}

/// Held by a test from its beginning: the allocator counts for the whole program.
static ALONE: Mutex<()> = Mutex::new(());

/// What the long runs found, `PARSER-*`: the repository's, or those of the folder in `MBQ_FUZZ_FOUND`.
#[test]
fn what_was_found_stays_mended() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let found = std::env::var("MBQ_FUZZ_FOUND")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/found").into());
    let mut paths: Vec<_> = std::fs::read_dir(found).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty());
    for path in paths {
        let file = path.file_name().unwrap().to_string_lossy();
        let name = file.split('-').next().unwrap();
        let parser = PARSERS.iter().find(|parser| parser.name == name).unwrap();
        let (input, start) = (std::fs::read(&path).unwrap(), Instant::now());
        parse(parser, &input);
        println!("{file}: {:?}, {} MiB", start.elapsed(), PEAK.load(Relaxed) >> 20);
    }
}

/// Parses `input`, and tells whether it is sound.
fn parse(parser: &Parser, input: &[u8]) -> bool {
    let (start, before) = (Instant::now(), HELD.load(Relaxed));
    PEAK.store(before, Relaxed);
    let outcome = catch_unwind(|| (parser.parse)(input));
    let (time, memory) = (start.elapsed(), PEAK.load(Relaxed).saturating_sub(before));
    if outcome.is_err() || time > LONGEST || memory > MOST {
        let path = format!("{}/hostile-{}", env!("CARGO_TARGET_TMPDIR"), parser.name);
        std::fs::write(&path, input).unwrap();
        panic!("{}: {outcome:?} after {time:?} with {} MiB: {path}", parser.name, memory >> 20);
    }
    outcome.is_ok_and(|outcome| outcome.is_ok())
}

/// An input that takes more than a gibibyte, or panics, does not pass.
fn faults_are_noticed() {
    let takes = |_: &[u8]| {
        drop(std::hint::black_box(Vec::<u8>::with_capacity(MOST + 1)));
        Ok(())
    };
    for parse_fault in [takes, |_: &[u8]| panic!("on purpose")] {
        let parser = Parser { name: "fault", parse: parse_fault, max_len: 0 };
        assert!(catch_unwind(|| parse(&parser, b"")).is_err());
    }
}

#[test]
fn every_input_ends_in_a_value_or_an_error() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    faults_are_noticed();
    let seeds = seeds();
    for parser in &PARSERS {
        let (own, mut random) = (&seeds[parser.name], Rng::new(23));
        let start = Instant::now();
        let sound = own.iter().filter(|seed| parse(parser, seed)).count();
        assert!(sound > 0, "{}: all of its seeds are refused", parser.name);
        // A checkpoint, a vocabulary or a template is a hundred times the work of the others.
        let (inputs, mut passed) = (if COSTLY.contains(&parser.name) { 500 } else { 2000 }, 0);
        for i in 0..inputs {
            let mut input = own[i % own.len()].clone();
            (0..=random.below(3)).for_each(|_| mutate(&mut input, own, &mut random));
            input.truncate(parser.max_len);
            passed += usize::from(parse(parser, &input));
        }
        println!(
            "{:13} {sound} of {} seeds, {passed} of {inputs} mutants pass: {:?}",
            parser.name,
            own.len(),
            start.elapsed()
        );
    }
}
