//! The built llama.cpp, reached through its shared libraries.

#[allow(clippy::all, dead_code, non_camel_case_types, non_snake_case, non_upper_case_globals, missing_docs)]
pub(crate) mod sys;
