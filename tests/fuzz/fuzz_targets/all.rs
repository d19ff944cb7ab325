//! All targets in one program, which holds the whole library: `MBQ_FUZZ_TARGET` names the one to run.
#![no_main]
#[path = "../parsers.rs"]
mod parsers;

use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;

/// The program's.
#[global_allocator]
static ALLOCATOR: mbq_convert::bounded::Allocator = mbq_convert::bounded::Allocator;

static CHOSEN: OnceLock<&'static parsers::Parser> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("MBQ_FUZZ_TARGET").unwrap_or_default();
        let found = parsers::PARSERS.iter().find(|parser| parser.name == name);
        let Some(parser) = found else {
            eprintln!("MBQ_FUZZ_TARGET must be one of these; with the longest input that is worth trying:");
            parsers::PARSERS.iter().for_each(|parser| println!("{} {}", parser.name, parser.max_len));
            std::process::exit(1);
        };
        let _ = CHOSEN.set(parser);
    },
    |data: &[u8]| {
        let _ = CHOSEN.get().map(|parser| (parser.parse)(data));
    }
);
