//! Quantised weights: the MBQ3 block, and the scales that calibration folds into neighbouring tensors.
pub mod fold;
pub mod mbq3;
