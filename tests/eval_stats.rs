//! src/eval/stats.rs against numpy and scipy (tests/reference/eval_goldens.py).

use mbq_convert::eval::stats::*;
use serde_json::Value;

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/eval_stats.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn close(a: f64, b: f64, relative: f64, absolute: f64) {
    assert!((a - b).abs() <= absolute + relative * b.abs(), "{a} instead of {b}");
}

#[test]
fn kl_and_negative_log_likelihood() {
    let g = &golden()["kl"];
    let (mut log_p, mut log_q) = (Vec::new(), Vec::new());
    for i in 0..6 {
        let row = |v: &Value| numbers(&v[i]).iter().map(|x| *x as f32).collect::<Vec<_>>();
        log_softmax(&row(&g["p"]), &mut log_p);
        log_softmax(&row(&g["q"]), &mut log_q);
        // 40 terms of f64: rounding of some 1e-16 each, and KL itself is a difference of them.
        close(kl(&log_p, &log_q), g["kl"][i].as_f64().unwrap(), 1e-12, 1e-14);
        close(-log_q[7], g["nll_q_7"][i].as_f64().unwrap(), 1e-13, 1e-14);
    }
    assert_eq!(kl(&[f64::NEG_INFINITY, 0.0], &[-3.0, 0.0]), 0.0);
}

#[test]
fn order_statistics() {
    let g = &golden()["quantile"];
    let mut values = numbers(&g["values"]);
    values.sort_by(f64::total_cmp);
    for (q, expected) in numbers(&g["q"]).into_iter().zip(numbers(&g["expected"])) {
        close(quantile(&values, q), expected, 1e-15, 0.0);
    }
    assert!(quantile(&[], 0.5).is_nan());
    assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), 1);
}

#[test]
fn bootstrap_intervals() {
    let g = &golden()["bootstrap"];
    let clusters: Vec<Cluster> =
        numbers(&g["sum"]).into_iter().zip(numbers(&g["count"])).map(|(sum, count)| Cluster { sum, count }).collect();
    let n = |name: &str| g[name].as_f64().unwrap();
    let ours = bootstrap(&clusters, 500, 20260);
    close(ours.value, n("value"), 1e-14, 0.0);
    close(ours.low, n("low"), 1e-12, 0.0);
    close(ours.high, n("high"), 1e-12, 0.0);
    // Another generator: ends of 20000 draws scatter by less than 2 % of the interval's width.
    let many = bootstrap(&clusters, 20_000, 3);
    let width = n("scipy_high") - n("scipy_low");
    close(many.low, n("scipy_low"), 0.0, 0.02 * width);
    close(many.high, n("scipy_high"), 0.0, 0.02 * width);
}

#[test]
fn paired_tests() {
    let g = golden();
    for case in g["mcnemar"].as_array().unwrap() {
        let n = |name: &str| case[name].as_u64().unwrap() as usize;
        // 1000 logarithms summed: 1e-16 each, relative in the result.
        close(mcnemar(n("b"), n("c")), case["p"].as_f64().unwrap(), 1e-10, 0.0);
    }
    for case in g["sign_flip"].as_array().unwrap() {
        let p = sign_flip(&numbers(&case["d"]), 100_000, 5);
        let expected = case["p"].as_f64().unwrap();
        // Exact enumeration agrees to rounding; two samples of 1e5 and 2e5 patterns to five standard errors.
        let absolute = if case["exact"].as_bool().unwrap() { 1e-12 } else { 5.0 * (expected / 66_000.0).sqrt() };
        close(p, expected, 0.0, absolute);
    }
    for (ours, expected) in holm(&numbers(&g["holm"]["p"])).into_iter().zip(numbers(&g["holm"]["adjusted"])) {
        close(ours, expected, 1e-14, 0.0);
    }
}
