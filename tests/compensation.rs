//! Rounding with feedback against a plain restatement in numpy, and what its parts promise.
use candle_core::{DType, Device, Tensor};
use mbq_convert::calibrate::feedback::{factor, round, round_rows};
use mbq_convert::ggml::{dequantize, quantize_rows};
use mbq_convert::quant::levels::{Fit, Format, Halfs, Levels, Multiples, Simple};
use mbq_convert::random::Rng;

const ALL: [Simple; 6] = Simple::ALL;

fn pack(format: Simple, levels: Levels, codes: &[u8], out: &mut Vec<u8>) {
    let halfs = Halfs { d: levels.d, m: levels.m };
    Format::Simple(format).pack(halfs, &[Multiples::default()], codes, out);
}

/// Weights of many sizes, some groups far from zero.
fn weights(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n)
        .map(|i| 10f32.powi((i / 128 % 7) as i32 - 4) * (uniform() + if i / 128 % 5 == 0 { 2.0 } else { 0.0 }))
        .collect()
}

/// What `pack` writes is what ggml reads: the very values that `Levels::value` gives, for both fits.
#[test]
fn ggml_reads_the_levels_bit_for_bit() {
    for format in ALL {
        for fit in [Fit::Plain, Fit::Search] {
            let (mut bytes, mut values) = (Vec::new(), Vec::new());
            for (i, w) in weights(128 * 35, 1).chunks(format.group()).enumerate() {
                let importance: Vec<f64> = (0..w.len()).map(|j| ((i * 31 + j * 17) % 13) as f64).collect();
                let levels = format.fit(w, &importance, fit);
                let codes: Vec<u8> = w.iter().map(|&w| format.nearest(levels, w)).collect();
                values.extend(codes.iter().map(|&c| levels.value(c)));
                pack(format, levels, &codes, &mut bytes);
            }
            let read = dequantize(format.ty(), &bytes).unwrap();
            let bits = |v: &[f32]| v.iter().map(|v| (v + 0.0).to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&read), bits(&values), "{format:?} {fit:?}");
        }
    }
}

/// The plain levels are those of ggml's own quantiser.
#[test]
fn plain_levels_are_ggmls() {
    for format in ALL {
        let w = weights(128 * 35, 2);
        let theirs = quantize_rows(format.ty(), &w, 128, None).unwrap();
        let mut ours = Vec::new();
        for w in w.chunks(format.group()) {
            let levels = format.fit(w, &[], Fit::Plain);
            let codes: Vec<u8> = w.iter().map(|&w| format.nearest(levels, w)).collect();
            pack(format, levels, &codes, &mut ours);
        }
        // Where the codes begin in a block.
        let head = if matches!(format, Simple::Mbq3 | Simple::Q4_1 | Simple::Q5_1) { 4 } else { 2 };
        let size = format.ty().type_size();
        for (a, b) in ours.chunks(size).zip(theirs.chunks(size)) {
            assert_eq!(a[..head], b[..head], "{format:?}");
        }
    }
}

/// The search never loses to the plain levels, and wins by a lot where one weight is far out.
#[test]
fn search_lessens_the_weighted_error() {
    for format in ALL {
        let mut gain = 0.0;
        for w in weights(128 * 70, 3).chunks_mut(format.group()) {
            w[5] *= 6.0;
            let importance: Vec<f64> = (0..w.len()).map(|j| if j == 5 { 0.01 } else { 1.0 }).collect();
            let error = |fit| {
                let l = format.fit(w, &importance, fit);
                let e = |(&w, h): (&f32, &f64)| f64::from(w - l.value(format.nearest(l, w))).powi(2) * h;
                w.iter().zip(&importance).map(e).sum::<f64>()
            };
            let (plain, search) = (error(Fit::Plain), error(Fit::Search));
            assert!(search <= plain, "{format:?}: {search} > {plain}");
            gain += f64::from(search < 0.9 * plain);
        }
        assert!(gain > 10.0, "{format:?}: {gain}");
    }
}

/// Blocks that determine no levels: equal weights, zeros, no importance. The values must stay finite and close.
#[test]
fn degenerate_blocks_keep_their_values() {
    for format in ALL {
        for value in [0.0, 0.3, -0.3, 1e-9] {
            let w = vec![value; format.group()];
            for importance in [0.0, 1.0] {
                let levels = format.fit(&w, &vec![importance; w.len()], Fit::Search);
                let got = levels.value(format.nearest(levels, value));
                // The paper's grid cannot hold equal weights away from zero; the search can, if errors count.
                let bound = if format == Simple::Mbq3 && importance == 0.0 { value.abs() } else { value.abs() * 0.15 };
                assert!((got - value).abs() <= bound + 1e-5, "{format:?} {value} {importance}: {got}");
            }
        }
    }
}

/// Inputs that are correlated and of very different sizes, and their second moments; one channel is dead.
fn moments(n: usize, seed: u64) -> Tensor {
    let raw = weights(3 * n * n, seed);
    let x: Vec<f32> = (0..3 * n * n)
        .map(|i| {
            let (t, c) = (i / n, i % n);
            let size = [1.0, 0.2, 5.0, 0.05][c % 4];
            if c == 17 {
                0.0
            } else {
                size * (raw[i].signum() + 2.0 * raw[t * n + c / 3].signum() + (t * c % 7) as f32 / 7.0)
            }
        })
        .collect();
    let x = Tensor::from_vec(x, (3 * n, n), &Device::Cpu).unwrap();
    x.t().unwrap().matmul(&x).unwrap()
}

fn matrix(rows: usize, n: usize, seed: u64) -> Tensor {
    let data: Vec<f32> = weights(rows * n, seed)
        .iter()
        .enumerate()
        .map(|(i, w)| w.signum() * (i * 37 % 101) as f32 / 800.0 + 0.01)
        .collect();
    Tensor::from_vec(data, (rows, n), &Device::Cpu).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn codes_are_the_references() {
    let golden: serde_json::Value = serde_json::from_str(include_str!("golden/feedback.json")).unwrap();
    let size = |key: &str| golden[key].as_u64().unwrap() as usize;
    let number = |key: &str| golden[key].as_f64().unwrap();
    let floats = |key: &str| -> Vec<f32> {
        let hex = golden[key].as_str().unwrap();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect();
        bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let (rows, n, lower) = (size("rows"), size("cols"), floats("h"));
    let h: Vec<f32> =
        (0..n * n).map(|i| (i / n, i % n)).map(|(i, j)| lower[i.max(j) * (i.max(j) + 1) / 2 + i.min(j)]).collect();
    let h = Tensor::from_vec(h, (n, n), &Device::Cpu).unwrap();
    let w = Tensor::from_vec(floats("w"), (rows, n), &Device::Cpu).unwrap();
    let factor = factor(&h, number("damping")).unwrap();
    let rounded = round(&w, &factor, Format::Simple(Simple::Mbq3), Fit::Plain).unwrap();
    let codes: String = rounded
        .bytes()
        .unwrap()
        .chunks(52)
        .flat_map(|b| mbq_convert::quant::mbq3::Mbq3Block::unpack(b.try_into().unwrap()).codes)
        .map(|c| (b'0' + c) as char)
        .collect();
    // The reference's decisions all stand clear of a tie by a ten-thousandth of a step; sums of 256 terms in f32 are
    // off by about a millionth of one.
    assert!(number("margin") >= 1e-4);
    assert_eq!(codes, golden["codes"].as_str().unwrap());
    let error = factor.error(&w, &rounded.weight(&Device::Cpu).unwrap()).unwrap();
    // Squares of differences in f32, summed over 2560 weights.
    assert!((error / number("error") - 1.0).abs() < 1e-4, "{error}, theirs {}", number("error"));
    assert!(error < 0.9 * number("error_nearest"));
}

/// Whatever the type and the fit: ggml reads from the bytes what the feedback assumed, and the output's error is below
/// that of rounding to nearest.
#[test]
fn bytes_hold_what_the_feedback_assumed() {
    let (rows, n) = (20, 384);
    let (h, w) = (moments(n, 5), matrix(rows, n, 6));
    let factor = factor(&h, 0.01).unwrap();
    for format in ALL.map(Format::Simple) {
        let plain = dequantize(format.ty(), &quantize_rows(format.ty(), &values(&w), n, None).unwrap()).unwrap();
        let plain = Tensor::from_vec(plain, (rows, n), &Device::Cpu).unwrap();
        for fit in [Fit::Plain, Fit::Search] {
            let rounded = round(&w, &factor, format, fit).unwrap();
            let read = dequantize(format.ty(), &rounded.bytes().unwrap()).unwrap();
            let bits = |v: &[f32]| v.iter().map(|v| (v + 0.0).to_bits()).collect::<Vec<_>>();
            let weight = rounded.weight(&Device::Cpu).unwrap();
            assert_eq!(bits(&read), bits(&values(&weight)), "{format:?} {fit:?}");
            let (ours, nearest) = (factor.error(&w, &weight).unwrap(), factor.error(&w, &plain).unwrap());
            assert!(ours < 0.8 * nearest, "{format:?} {fit:?}: {ours} of {nearest}");
        }
    }
}

/// `error` and `solve` against products with H itself.
#[test]
fn factor_is_h() {
    let (rows, n) = (7, 300);
    let (h, b) = (moments(n, 7), matrix(rows, n, 8));
    let factor = factor(&h, 0.02).unwrap();
    let h = h.to_dtype(DType::F64).unwrap();
    let mut dense: Vec<f64> = h.flatten_all().unwrap().to_vec1().unwrap();
    let mean = (0..n).map(|i| dense[i * n + i]).sum::<f64>() / n as f64;
    (0..n).for_each(|i| dense[i * n + i] += if i == 17 { mean } else { 0.02 * mean });
    let dense = Tensor::from_vec(dense, (n, n), &Device::Cpu).unwrap();
    let b64 = b.to_dtype(DType::F64).unwrap();
    let direct = (b64.matmul(&dense).unwrap() * &b64).unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    let error = factor.error(&b, &b.zeros_like().unwrap()).unwrap();
    // M is rounded to f32.
    assert!((error / direct - 1.0).abs() < 1e-5, "{error} {direct}");
    let x = factor.solve(&b).unwrap().to_dtype(DType::F64).unwrap();
    let back =
        (x.matmul(&dense).unwrap() - &b64).unwrap().sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    let square = b64.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap();
    // The condition of H here is about 1e4; f32 has 6e-8.
    assert!((back / square).sqrt() < 1e-3, "{}", (back / square).sqrt());
}

#[test]
fn what_cannot_be_used_is_refused() {
    let (h, w) = (moments(128, 9), matrix(2, 128, 10));
    let factor = |h: &Tensor| factor(h, 0.01);
    assert!(factor(&(h.clone() * f64::NAN).unwrap()).is_err());
    let good = factor(&h).unwrap();
    assert!(round(&matrix(2, 256, 1), &good, Format::Simple(Simple::Q8_0), Fit::Plain).is_err());
    assert!(
        round(&(w.clone() * 1e9).unwrap(), &good, Format::Simple(Simple::Mbq3), Fit::Plain).unwrap().bytes().is_err()
    );
    // No activity at all: every channel counts alike.
    let dead = factor(&h.zeros_like().unwrap()).unwrap();
    assert!(round(&w, &dead, Format::Simple(Simple::Mbq3), Fit::Plain).is_ok());
}

/// What is added to H's diagonal: a share of its mean, but where few channels hold nearly all of the activity a share
/// of what the others have.
#[test]
fn damping_is_measured_by_ordinary_channels() {
    let added = |diagonal: &[f32]| -> Vec<f64> {
        let n = diagonal.len();
        let mut h = vec![0f32; n * n];
        diagonal.iter().enumerate().for_each(|(i, &d)| h[i * n + i] = d);
        let h = Tensor::from_vec(h, (n, n), &Device::Cpu).unwrap();
        factor(&h, 0.01).unwrap().added().to_vec()
    };
    assert_eq!(added(&[1.0, 2.0, 3.0, 2.0]), [0.02; 4]);
    let mut outlier = vec![1.0; 200];
    outlier[7] = 1e6;
    assert_eq!(added(&outlier), [0.1; 200]);
}

/// Weights and moments for feedback over rows: `[rows, n]` weights, H of inputs, F of outputs.
fn two_sided(rows: usize, n: usize) -> (Tensor, Tensor, Tensor) {
    let normal = |count: usize, width: usize, seed: u64| {
        let mut dice = Rng::new(seed);
        let mut sum = || (0..4).map(|_| dice.uniform()).sum::<f32>();
        Tensor::from_vec((0..count * width).map(|_| sum()).collect::<Vec<f32>>(), (count, width), &Device::Cpu).unwrap()
    };
    let moments = |width: usize, seed: u64| {
        let x = normal(2 * width, width, seed);
        // A common part in every channel.
        let common = x.sum_keepdim(1).unwrap().broadcast_as(x.shape()).unwrap();
        let x = (x + (common * 0.3).unwrap()).unwrap();
        x.t().unwrap().matmul(&x).unwrap()
    };
    (normal(rows, n, 31), moments(n, 32), moments(rows, 33))
}

fn float64(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Blocks of M are Schur complements': M_ab = S_ab S_bb^-1, S what is left of F once the blocks behind b are eliminated.
#[test]
fn block_unit_factors_are_schur_complements() {
    let (n, size) = (96, 32);
    let (_, _, f) = two_sided(n, 128);
    let factor = factor(&f, 0.05).unwrap();
    let m = float64(&factor.block_unit(size).unwrap());
    let mut s = float64(&f);
    factor.added().iter().enumerate().for_each(|(i, added)| s[i * n + i] += added);
    for start in (0..n).step_by(size).rev() {
        // X = S[.., b] S_bb^-1 by elimination, column by column: X S_bb = S[.., b].
        let block: Vec<usize> = (start..start + size).collect();
        let mut left: Vec<Vec<f64>> = block.iter().map(|&i| block.iter().map(|&j| s[j * n + i]).collect()).collect();
        let mut right: Vec<Vec<f64>> =
            block.iter().map(|&i| (0..start + size).map(|r| s[r * n + i]).collect()).collect();
        for p in 0..size {
            let pivot = left[p][p];
            left[p].iter_mut().chain(&mut right[p]).for_each(|v| *v /= pivot);
            for q in (0..size).filter(|&q| q != p) {
                let by = left[q][p];
                let (row, sums) = (left[p].clone(), right[p].clone());
                left[q].iter_mut().zip(&row).for_each(|(v, r)| *v -= by * r);
                right[q].iter_mut().zip(&sums).for_each(|(v, r)| *v -= by * r);
            }
        }
        for r in 0..start + size {
            for c in 0..size {
                let (got, want) = (m[r * n + start + c], right[c][r]);
                // M is kept in f32.
                assert!((got - want).abs() < 2e-5 * (1.0 + want.abs()), "{r} {}: {got}, {want}", start + c);
            }
        }
        // S - S_b S_bb^-1 S_b^T.
        let old = s.clone();
        for i in 0..start {
            for j in 0..start {
                let by: f64 = (0..size).map(|k| right[k][i] * old[j * n + start + k]).sum();
                s[i * n + j] -= by;
            }
        }
    }
}

/// `tr(F E H E^T)` of weights that are rounded so or so.
fn two_sided_error(w: &Tensor, v: &Tensor, h: &Tensor, f: &Tensor) -> f64 {
    let e = (w - v).unwrap().to_dtype(DType::F64).unwrap();
    let [h, f] = [h, f].map(|t| t.to_dtype(DType::F64).unwrap());
    let s = f.matmul(&e).unwrap().matmul(&h).unwrap();
    (s * e).unwrap().sum_all().unwrap().to_scalar().unwrap()
}

/// Rows that make up for each other cost less where outputs go together, and nothing changes where they do not.
#[test]
fn rows_make_up_for_each_other() {
    let (rows, n) = (160, 256);
    let (w, h, f) = two_sided(rows, n);
    let (inputs, outputs) = (factor(&h, 0.01).unwrap(), factor(&f, 0.01).unwrap());
    for format in [Format::Simple(Simple::Mbq3), Format::Simple(Simple::Q4_0), Format::Q3K] {
        let alone = round(&w, &inputs, format, Fit::Search).unwrap();
        let together = round_rows(&w, &inputs, &outputs, format, Fit::Search).unwrap();
        let cost = |coded: &mbq_convert::calibrate::feedback::Coded| {
            two_sided_error(&w, &coded.weight(&Device::Cpu).unwrap(), &h, &f)
        };
        let ratio = cost(&together) / cost(&alone);
        eprintln!("{}: {ratio:.3} of the cost of rows alone", format.ty());
        assert!(ratio < 0.5, "{format:?}: {ratio}");
        let diagonal = Tensor::from_vec(
            (0..rows * rows).map(|i| if i % (rows + 1) == 0 { 2.0f32 } else { 0.0 }).collect::<Vec<_>>(),
            (rows, rows),
            &Device::Cpu,
        );
        let apart = factor(&diagonal.unwrap(), 0.01).unwrap();
        let same = round_rows(&w, &inputs, &apart, format, Fit::Search).unwrap();
        assert!(same.bytes().unwrap() == alone.bytes().unwrap(), "{format:?}");
        let few = factor(&f.narrow(0, 0, 64).unwrap().narrow(1, 0, 64).unwrap().contiguous().unwrap(), 0.01).unwrap();
        assert!(round_rows(&w, &inputs, &few, format, Fit::Search).is_err());
    }
}
