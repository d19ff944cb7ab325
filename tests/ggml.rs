//! The ggml wrapper against facts that do not come from ggml: the block layouts of the GGUF
//! specification and the `half` crate.

use mbq_convert::ggml::{GgmlError, GgmlType, dequantize, quantize_rows, validate};
use rayon::prelude::*;

/// Deterministic values in [-1, 1): a multiplicative congruential sequence.
fn noise(n: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32) / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

#[test]
fn names_ids_and_sizes() {
    // (id, block, bytes) of the GGUF specification and llama.cpp's documentation of the types.
    let known = [
        ("f32", 0, 1, 4),
        ("f16", 1, 1, 2),
        ("bf16", 30, 1, 2),
        ("q4_0", 2, 32, 18),
        ("q8_0", 8, 32, 34),
        ("q2_k", 10, 256, 84),
        ("q3_k", 11, 256, 110),
        ("q4_k", 12, 256, 144),
        ("q5_k", 13, 256, 176),
        ("q6_k", 14, 256, 210),
        ("iq3_xxs", 18, 256, 98),
        ("iq3_s", 21, 256, 110),
        ("iq4_xs", 23, 256, 136),
        ("mbq3", 192, 128, 52),
    ];
    for (name, id, block, bytes) in known {
        let ty: GgmlType = name.parse().unwrap();
        assert_eq!((ty.id(), ty.block_size(), ty.type_size()), (id, block, bytes), "{name}");
        assert_eq!(GgmlType::from_id(id), Some(ty));
    }
    for &ty in GgmlType::ALL {
        assert!(ty.ggml_name().eq_ignore_ascii_case(ty.name()), "{ty:?} is {} to ggml", ty.ggml_name());
    }
    assert!("q9_z".parse::<GgmlType>().is_err());
}

#[test]
fn halves_are_those_of_the_half_crate() {
    let w = noise(512);
    let f16: Vec<u8> = w.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    let bf16: Vec<u8> = w.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    assert_eq!(quantize_rows(GgmlType::F16, &w, 256, None).unwrap(), f16);
    assert_eq!(quantize_rows(GgmlType::BF16, &w, 256, None).unwrap(), bf16);
    let back: Vec<f32> = w.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
    assert_eq!(dequantize(GgmlType::BF16, &bf16).unwrap(), back);
}

#[test]
fn q8_0_by_hand() {
    let w = noise(64);
    let bytes = quantize_rows(GgmlType::Q8_0, &w, 64, None).unwrap();
    for (block, w) in bytes.chunks(34).zip(w.chunks(32)) {
        let max = w.iter().fold(0f32, |m, x| m.max(x.abs()));
        let d = max / 127.0;
        assert_eq!(block[..2], half::f16::from_f32(d).to_le_bytes());
        for (&q, &x) in block[2..].iter().zip(w) {
            assert_eq!(q as i8, (x / d).round() as i8);
        }
    }
}

#[test]
fn every_quantiser_comes_close_and_threads_agree() {
    let w = noise(64 * 1024);
    let power: f32 = w.iter().map(|x| x * x).sum();
    // Relative squared error of a good uniform quantiser of b bits on uniform noise is 4^-b; each type
    // gets four times that of its own bits, rounded down to the bits that codes have.
    let cases = [
        (GgmlType::Q2_K, 2),
        (GgmlType::Q3_K, 3),
        (GgmlType::MBQ3, 3),
        (GgmlType::IQ3_XXS, 3),
        (GgmlType::IQ3_S, 3),
        (GgmlType::Q4_0, 4),
        (GgmlType::Q4_K, 4),
        (GgmlType::IQ4_XS, 4),
        (GgmlType::Q5_K, 5),
        (GgmlType::Q6_K, 6),
        (GgmlType::Q8_0, 8),
    ];
    for (ty, bits) in cases {
        let whole = quantize_rows(ty, &w, 1024, None).unwrap();
        let parts: Vec<u8> =
            w.par_chunks(1024).flat_map_iter(|row| quantize_rows(ty, row, 1024, None).unwrap()).collect();
        assert_eq!(whole, parts, "{ty}: rows quantised in parallel differ");
        validate(ty, &whole).unwrap();
        let back = dequantize(ty, &whole).unwrap();
        let error: f32 = back.iter().zip(&w).map(|(a, b)| (a - b) * (a - b)).sum();
        let bound = 4.0 * 0.25f32.powi(bits);
        assert!(error / power < bound, "{ty}: relative error {} >= {bound}", error / power);
    }
}

#[test]
fn bad_input_is_refused() {
    let w = noise(512);
    let row = quantize_rows(GgmlType::Q4_K, &w, 128, None).unwrap_err();
    assert!(row.to_string().contains("rows of 128 weights do not fit q4_k"), "{row}");
    assert!(matches!(quantize_rows(GgmlType::F16, &w, 100, None), Err(GgmlError::RowCount { .. })));
    assert!(matches!(quantize_rows(GgmlType::IQ2_XS, &w, 256, None), Err(GgmlError::NeedsImatrix { .. })));
    assert!(matches!(quantize_rows(GgmlType::I32, &w, 256, None), Err(GgmlError::NotWritable { .. })));
    assert!(matches!(quantize_rows(GgmlType::Q4_K, &w, 256, Some(&w[..3])), Err(GgmlError::Imatrix { .. })));
    let mut nan = w.clone();
    nan[300] = f32::NAN;
    let error = quantize_rows(GgmlType::IQ3_S, &nan, 256, None).unwrap_err();
    assert!(error.to_string().contains("weight 300 (row 1) is NaN"), "{error}");
    assert!(matches!(dequantize(GgmlType::Q8_0, &[0; 33]), Err(GgmlError::ByteCount { .. })));
    assert!(matches!(dequantize(GgmlType::I32, &[0; 32]), Err(GgmlError::NotReadable { .. })));
    let infinite = half::f16::INFINITY.to_le_bytes();
    assert!(matches!(validate(GgmlType::F16, &infinite), Err(GgmlError::Invalid { .. })));
}

#[test]
fn unaligned_blocks_decode_alike() {
    let bytes = quantize_rows(GgmlType::Q6_K, &noise(256), 256, None).unwrap();
    let mut shifted = vec![0u8];
    shifted.extend(&bytes);
    assert_eq!(dequantize(GgmlType::Q6_K, &shifted[1..]).unwrap(), dequantize(GgmlType::Q6_K, &bytes).unwrap());
}
