//! The ggml wrapper against facts that do not come from ggml: the block layouts of the GGUF
//! specification, the `half` crate, and a header taken apart by hand.

use mbq_convert::ggml::{GgmlError, GgmlType, Gguf, GgufFile, Value, dequantize, quantize_rows, validate};
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

fn example() -> Gguf {
    let mut gguf = Gguf::new();
    gguf.set_str("general.architecture", "qwen2").unwrap();
    gguf.set_u32("qwen2.block_count", 3).unwrap();
    gguf.set_f32("qwen2.epsilon", 1e-6).unwrap();
    gguf.set_bool("add_bos", true).unwrap();
    gguf.set_str_array("tokens", &["a", "é", ""]).unwrap();
    gguf.set_i32_array("types", &[1, -2]).unwrap();
    gguf.set_f32_array("empty", &[]).unwrap();
    gguf.add_tensor("a.weight", GgmlType::MBQ3, &[128, 3]).unwrap();
    gguf.add_tensor("b.weight", GgmlType::F32, &[5]).unwrap();
    gguf.add_tensor("c.weight", GgmlType::Q8_0, &[32, 2, 2]).unwrap();
    gguf
}

#[test]
fn header_bytes_follow_the_specification() {
    let meta = example().meta();
    let u32_at = |at: usize| u32::from_le_bytes(meta[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(meta[at..at + 8].try_into().unwrap());
    assert_eq!(&meta[..4], b"GGUF");
    assert_eq!((u32_at(4), u64_at(8), u64_at(16)), (3, 3, 7));
    // First key: length, text, type string (8), length, text.
    let key = b"general.architecture";
    assert_eq!(u64_at(24), key.len() as u64);
    assert_eq!(&meta[32..52], key);
    assert_eq!((u32_at(52), u64_at(56)), (8, 5));
    assert_eq!(&meta[64..69], b"qwen2");
    assert_eq!(meta.len() % 32, 0);
    // The entry of b.weight: name, 1 dimension of 5, type 0, offset 3 * 52 rounded up to 32.
    let name = b"b.weight";
    let at = meta.windows(8).position(|w| w == name).unwrap() + 8;
    assert_eq!((u32_at(at), u64_at(at + 4), u32_at(at + 12), u64_at(at + 16)), (1, 5, 0, 160));
}

#[test]
fn a_written_file_reads_back() {
    let gguf = example();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut file = Vec::new();
    gguf.write_meta(&mut file).unwrap();
    assert_eq!(file.len() as u64, gguf.data_offset());
    file.resize(file.len() + 160 + 32 + 136, 0);
    std::fs::write(&path, &file).unwrap();

    let read = GgufFile::open(&path).unwrap();
    assert_eq!(read.version, 3);
    assert_eq!(read.data_offset, gguf.data_offset());
    assert_eq!(read.metadata["general.architecture"].as_str(), Some("qwen2"));
    assert_eq!(read.metadata["qwen2.block_count"].as_u64(), Some(3));
    assert_eq!(read.metadata["qwen2.epsilon"].as_f64(), Some(f64::from(1e-6f32)));
    assert_eq!(read.metadata["add_bos"], Value::Bool(true));
    let tokens: Vec<_> = read.metadata["tokens"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert_eq!(tokens, ["a", "é", ""]);
    assert_eq!(read.metadata["types"], Value::Array(vec![Value::I64(1), Value::I64(-2)]));
    assert_eq!(read.metadata["empty"], Value::Array(vec![]));
    let c = read.tensor("c.weight").unwrap();
    assert_eq!((c.ty(), c.shape.as_slice(), c.size), (Some(GgmlType::Q8_0), &[32, 2, 2][..], 136));
    assert_eq!(c.offset - read.data_offset, gguf.tensor_offset("c.weight").unwrap());
    assert_eq!(read.tensor("a.weight").unwrap().ty(), Some(GgmlType::MBQ3));

    // Truncated data and a broken header are errors that name the file.
    for cut in [file.len() - 1, 40, 3, 0] {
        std::fs::write(&path, &file[..cut]).unwrap();
        let error = GgufFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("model.gguf"), "{error}");
    }
}

#[test]
fn bad_header_entries_are_refused() {
    let mut gguf = example();
    let error = |r: Result<&mut Gguf, GgmlError>| r.err().expect("refused").to_string();
    assert!(error(gguf.add_tensor("a.weight", GgmlType::F32, &[1])).contains("listed twice"));
    assert!(error(gguf.add_tensor(&"x".repeat(64), GgmlType::F32, &[1])).contains("1 to 63 bytes"));
    assert!(error(gguf.add_tensor("d", GgmlType::MBQ3, &[64])).contains("do not fit mbq3"));
    assert!(error(gguf.add_tensor("d", GgmlType::F32, &[1, 1, 1, 1, 1])).contains("dimensions"));
    assert!(error(gguf.add_tensor("d", GgmlType::F32, &[usize::MAX, 2])).contains("too many"));
    assert!(error(gguf.set_str("key", "a\0b")).contains("NUL"));
    assert!(error(gguf.set_str("", "a")).contains("empty"));
    assert!(error(gguf.set_u32("general.alignment", 3)).contains("alignment"));
}
