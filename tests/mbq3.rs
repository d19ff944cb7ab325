//! MBQ3 in Rust against ggml's C, bit for bit, and against goldens of the paper's quantiser in torch.
use std::path::Path;

use half::f16;
use mbq_convert::checkpoint::Checkpoint;
use mbq_convert::ggml::{self, GgmlType};
use mbq_convert::quant::mbq3::{self, BLOCK_BYTES, Base, GROUP, Grid, Mbq3Group};
use mbq_convert::random::Rng;
use sha2::{Digest, Sha256};

fn both_quantise_alike(weights: &[f32; GROUP], what: &str) {
    let c = ggml::quantize_rows(GgmlType::MBQ3, weights, GROUP, None).expect("finite weights");
    match mbq3::quantize(weights, Grid::Paper) {
        Ok(rust) => assert_eq!(rust, c, "{what}: {weights:?}"),
        // What Rust refuses, ggml must mark as invalid.
        Err(error) => assert!(ggml::validate(GgmlType::MBQ3, &c).is_err(), "{what}: {error}, ggml took it"),
    }
}

#[test]
fn rust_and_ggml_quantise_bit_for_bit() {
    let mut random = Rng::new(7);
    for n in 0..20_000 {
        let scale = 10f32.powi(n % 12 - 7);
        let shift = if n % 3 == 0 { 0.0 } else { 1.5 * random.uniform() };
        let mut weights: [f32; GROUP] = std::array::from_fn(|_| scale * (random.uniform() + shift));
        match n % 5 {
            // exact halves of a step of 1/8: ties everywhere
            1 => {
                weights.iter_mut().for_each(|w| *w = (random.next_u64() % 15) as f32 / 16.0 - 0.4375);
                (weights[0], weights[1]) = (-0.5, 0.375);
            }
            2 => weights[usize::try_from(random.next_u64() % 128).expect("an index")] *= 50.0,
            _ => {}
        }
        both_quantise_alike(&weights, "random");
    }
}

#[test]
fn rust_and_ggml_agree_on_extreme_groups() {
    let extremes = [
        [0.0, 0.0],
        [-0.0, -0.0],
        [-0.0, 0.0],
        [1e-45, -1e-45],
        [f32::MIN_POSITIVE, 0.0],
        [1e-6, -1e-6],
        [5e-6, -5e-6],
        [1e-5, 0.0],
        [65504.0, -65504.0],
        [65504.0 * 7.0, 0.0],
        [0.0, -65504.0],
        [70000.0, 69999.0],
        [1e30, 0.0],
        [f32::MAX, f32::MIN],
        [f32::MAX, f32::MAX],
        [0.3, 0.5],
        [-0.3, -0.5],
    ];
    for [a, b] in extremes {
        let weights: [f32; GROUP] = std::array::from_fn(|n| if n % 3 == 0 { a } else { b });
        both_quantise_alike(&weights, "extreme");
        let ramp: [f32; GROUP] = std::array::from_fn(|n| a + (b / 127.0 - a / 127.0) * n as f32);
        // rounding may carry the largest ramp past f32
        if ramp.iter().all(|w| w.is_finite()) {
            both_quantise_alike(&ramp, "ramp");
        }
    }
}

#[test]
fn rust_and_ggml_dequantise_bit_for_bit() {
    let mut random = Rng::new(8);
    let mut bytes = Vec::new();
    for n in 0..5000u32 {
        let mut block: [u8; BLOCK_BYTES] = std::array::from_fn(|_| random.next_u64() as u8);
        // all scales but NaN: subnormals, zeros, the largest and infinities among them
        let special = [0x0000u16, 0x8000, 0x0001, 0x83ff, 0x7bff, 0xfbff, 0x7c00, 0x0400];
        if n % 4 == 0 {
            let pick = |bits: u64| special[(bits % 8) as usize].to_le_bytes();
            block[..2].copy_from_slice(&pick(random.next_u64()));
            block[2..4].copy_from_slice(&pick(random.next_u64()));
        }
        bytes.extend(block);
    }
    let c = ggml::dequantize(GgmlType::MBQ3, &bytes).expect("whole blocks");
    let rust = mbq3::dequantize(&bytes).expect("whole blocks");
    assert_eq!(rust.len(), c.len());
    for (n, (a, b)) in rust.iter().zip(&c).enumerate() {
        assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "value {n}: {a} {b}");
    }
}

#[test]
fn ggml_refuses_scales_that_are_not_finite() {
    let good = mbq3::quantize(&[0.25; GROUP], Grid::Paper).expect("finite weights");
    ggml::validate(GgmlType::MBQ3, &good).expect("a good block");
    for bad in [f16::NAN, f16::INFINITY, f16::NEG_INFINITY] {
        for at in [0, 2] {
            let mut block = good.clone();
            block[at..at + 2].copy_from_slice(&bad.to_le_bytes());
            assert!(ggml::validate(GgmlType::MBQ3, &block).is_err(), "{bad} at byte {at}");
        }
    }
}

/// Codes, steps and zeros of every decoder linear of the tiny oracle models, hashed by
/// `tests/reference/mbq3_goldens.py`, a restatement of the authors' quantiser in torch.
#[test]
fn codes_of_the_oracle_models_match_torch() {
    let Some(shared) = std::env::var_os("MBQ_SHARED") else {
        println!("skipped: MBQ_SHARED does not name the folder with oracle/");
        return;
    };
    let goldens = include_str!("golden/mbq3-codes.json");
    let goldens: serde_json::Value = serde_json::from_str(goldens).expect("the golden file");
    let (mut zeros, mut exact) = (0u64, 0u64);
    let mut tensors = 0;
    for (model, entries) in goldens.as_object().expect("models") {
        let folder = Path::new(&shared).join("oracle").join(model).join("model");
        let checkpoint = Checkpoint::open(&folder).expect("an oracle model");
        for (name, golden) in entries.as_object().expect("tensors") {
            let shape = [0, 1].map(|n| golden["shape"][n].as_u64().expect("a size") as usize);
            let weights = checkpoint.f32(name, &shape).expect("a tensor");
            let hashes = &mut [Sha256::new(), Sha256::new(), Sha256::new()];
            for group in weights.as_chunks::<GROUP>().0 {
                let quantized = Mbq3Group::nearest(group, Grid::Paper);
                let Base::Zero(zero) = quantized.base else { panic!("the paper's grid has a zero") };
                let block = quantized.block();
                hashes[0].update(quantized.codes);
                hashes[1].update(block.d.to_le_bytes());
                hashes[2].update([zero]);
                for (code, value) in quantized.codes.iter().zip(block.values()) {
                    zeros += u64::from(*code == zero);
                    exact += u64::from(*code == zero && value == 0.0);
                }
            }
            for (key, hash) in ["codes", "steps", "zeros"].iter().zip(hashes) {
                let hex: String = hash.clone().finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(golden[key].as_str(), Some(hex.as_str()), "{key} of {model} {name}");
            }
            tensors += 1;
        }
    }
    assert_eq!(tensors, 4 * 7 * 2, "not every linear was compared");
    // Zero codes stay exactly 0 where d*zero is an fp16 number: always for zeros 1, 2 and 4, seldom for the others.
    let share = exact as f64 / zeros as f64;
    println!("{exact} of {zeros} zero codes stay exactly 0: {share:.4}");
    assert!((0.5..1.0).contains(&share), "{share}");
}
