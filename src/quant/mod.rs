//! Quantised weights: the MBQ3 block, types of evenly spaced levels, and the scales that calibration folds into
//! neighbouring tensors.
pub mod fold;
pub mod levels;
pub mod mbq3;
pub mod rotate;
