//! The one picture loader against Pillow 13; tests/reference/picture_goldens.py made files and pixels.
use mbq_convert::image::load_rgb;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/pictures/load")
}

fn base64(text: &str) -> Vec<u8> {
    let digit =
        |b: u8| b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".iter().position(|d| *d == b);
    let digits: Vec<usize> = text.bytes().filter_map(digit).collect();
    let mut out = Vec::new();
    for four in digits.chunks(4) {
        let bits = four.iter().enumerate().fold(0, |a, (i, d)| a | (*d as u32) << (18 - 6 * i));
        out.extend_from_slice(&bits.to_be_bytes()[1..four.len()]);
    }
    out
}

/// Largest difference from libjpeg-turbo's pixels, and the mean one, on these pictures of hard edges: without and with
/// chroma subsampling.
const JPEG: [(i32, f64); 2] = [(2, 0.05), (3, 0.4)];

#[test]
fn every_kind_of_file_is_read_as_pillow_reads_it() {
    let text = std::fs::read(folder().join("expected.json")).unwrap();
    let expected: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&text).unwrap();
    assert_eq!(expected.len(), 65);
    let mut wrong = Vec::new();
    for (name, want) in &expected {
        let got = load_rgb(&folder().join(name));
        let Some(want) = want.as_array() else {
            match got {
                Err(e) if e.to_string().contains(name) && e.to_string().contains("cut off") => {}
                other => wrong.push(format!("{name}: Pillow refuses it; here {other:?}")),
            }
            continue;
        };
        let got = match got {
            Ok(got) => got,
            Err(e) => {
                wrong.push(format!("{name}: {e}"));
                continue;
            }
        };
        let (width, height) = (want[0].as_u64().unwrap() as usize, want[1].as_u64().unwrap() as usize);
        if (got.width, got.height) != (width, height) {
            wrong.push(format!("{name}: {} x {}, not {width} x {height}", got.width, got.height));
            continue;
        }
        let pixels = base64(want[2].as_str().unwrap());
        assert_eq!(pixels.len(), got.data.len(), "{name}");
        let differences = got.data.iter().zip(&pixels).map(|(a, b)| (i32::from(*a) - i32::from(*b)).abs());
        let (most, sum) = differences.fold((0, 0), |(most, sum), d| (d.max(most), sum + d));
        let mean = f64::from(sum) / pixels.len() as f64;
        let subsampled = ["42", "restart", "xmp", "trailing", "exif-"].iter().any(|s| name.starts_with(s));
        let (may, may_mean) = match name.as_str() {
            "555.bmp" | "565.bmp" => (1, 0.5), // 5 bits to 8: rounded here, cut by Pillow
            _ if name.ends_with(".jpg") => JPEG[usize::from(subsampled)],
            _ => (0, 0.0),
        };
        eprintln!("{name}: at most {most}, mean {mean:.4}");
        if most > may || mean > may_mean {
            wrong.push(format!("{name}: differs by up to {most}, mean {mean:.4}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
