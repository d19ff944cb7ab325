//! The program's own files, with their tests.
#![allow(dead_code)]
#[path = "../../src/quant/mbq3.rs"]
mod mbq3;
#[path = "../../src/random.rs"]
mod random;
