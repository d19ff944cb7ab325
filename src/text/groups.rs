//! What enters each linear of a block, who produces it, and which linears are quantised together.
use super::{LinearName, Trace};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// The linears that share an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Group {
    /// q, k, v, behind the attention's norm.
    Qkv,
    /// o, behind v: only where v has as many outputs as o has inputs, or with scales shared by the query heads of a value
    /// head.
    O,
    /// gate and up, behind the MLP's norm.
    GateUp,
    /// down, behind up.
    Down,
}

/// What makes a group's input, so that its rows can be divided by what the group's columns are multiplied by. This holds
/// for every architecture: norms of q and k, rotation, masks and norms behind a part stand on the far side of the
/// group's linears, and both activations multiply up's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Producer {
    /// The gain of the attention's norm.
    AttnNorm,
    /// The gain of the MLP's norm.
    MlpNorm,
    /// Rows and bias of a linear.
    Linear(LinearName),
}

impl Group {
    /// In the order of the forward pass.
    pub const ALL: [Group; 4] = [Group::Qkv, Group::O, Group::GateUp, Group::Down];

    pub fn linears(self) -> &'static [LinearName] {
        match self {
            Group::Qkv => &[LinearName::Q, LinearName::K, LinearName::V],
            Group::O => &[LinearName::O],
            Group::GateUp => &[LinearName::Gate, LinearName::Up],
            Group::Down => &[LinearName::Down],
        }
    }

    pub fn producer(self) -> Producer {
        match self {
            Group::Qkv => Producer::AttnNorm,
            Group::O => Producer::Linear(LinearName::V),
            Group::GateUp => Producer::MlpNorm,
            Group::Down => Producer::Linear(LinearName::Up),
        }
    }

    /// The linear that writes to the residual stream, where the group has one.
    pub fn writer(self) -> Option<LinearName> {
        match self {
            Group::O => Some(LinearName::O),
            Group::Down => Some(LinearName::Down),
            Group::Qkv | Group::GateUp => None,
        }
    }

    /// The group of a linear.
    pub fn of(name: LinearName) -> Group {
        match name {
            LinearName::Q | LinearName::K | LinearName::V => Group::Qkv,
            LinearName::O => Group::O,
            LinearName::Gate | LinearName::Up => Group::GateUp,
            LinearName::Down => Group::Down,
        }
    }
}

impl Trace {
    /// What enters the linears of `group`, `[tokens, …]`.
    pub fn input(&self, group: Group) -> &Tensor {
        match group {
            Group::Qkv => &self.attn_in,
            Group::O => &self.o_in,
            Group::GateUp => &self.mlp_in,
            Group::Down => &self.down_in,
        }
    }
}
