use std::process::ExitCode;

mod cli;

/// So that a chat template cannot take all memory.
#[global_allocator]
static ALLOCATOR: mbq_convert::bounded::Allocator = mbq_convert::bounded::Allocator;

fn main() -> ExitCode {
    cli::main()
}
