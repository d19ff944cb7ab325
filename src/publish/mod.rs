//! What a model needs to be published: a card (README.md) for the hub, and a look at the folder before it is uploaded.
mod card;
mod check;
mod name;
mod quality;
mod yaml;

pub use card::{CardOptions, ModelCard, card};
pub use check::{Checked, Problem, check};
pub use name::GgufName;
