//! Pillow and transformers against ours, byte for byte; tests/reference/image_goldens.py made the digests.
use mbq_convert::image::{Rgb, anyres, anyres::Size, resize::Filter, resize::resize};
use sha2::{Digest, Sha256};

fn picture(width: usize, height: usize) -> Rgb {
    let mut data = Vec::new();
    for y in 0..height {
        for x in 0..width {
            for c in 0..3 {
                data.push(((x * x * 7 + y * y * 3 + x * y * 5 + c * 91 + (x / 9 + y / 7) % 2 * 120) % 256) as u8);
            }
        }
    }
    Rgb { width, height, data }
}

fn sha(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

fn goldens() -> serde_json::Value {
    serde_json::from_str(include_str!("golden/image.json")).unwrap()
}

#[test]
fn resampling_equals_pillow() {
    let goldens = goldens();
    let cases = goldens["resize"].as_array().unwrap();
    assert_eq!(cases.len(), 18);
    for case in cases {
        let n = |i: usize| case[i].as_u64().unwrap() as usize;
        let out = resize(&picture(n(0), n(1)), n(2), n(3), Filter::from_pil(n(4) as u64).unwrap());
        assert_eq!((out.width, out.height), (n(2), n(3)));
        assert_eq!(sha(&out.data), case[5].as_str().unwrap(), "{case}");
    }
}

#[test]
fn tiles_equal_transformers() {
    let pins: Vec<Size> =
        (1..=3).flat_map(|a| (1..=3).map(move |b| Size { height: 112 * a, width: 112 * b })).collect();
    let goldens = goldens();
    let cases = goldens["tiles"].as_array().unwrap();
    assert_eq!(cases.len(), 11);
    for case in cases {
        let n = |i: usize| case[i].as_u64().unwrap() as usize;
        let tiles = anyres::tiles(&picture(n(0), n(1)), &pins, 112, Filter::Bicubic).unwrap();
        assert_eq!(tiles.tiles.len(), n(2), "{case}");
        let bytes: Vec<u8> = tiles.tiles.iter().flat_map(|t| t.data.iter().copied()).collect();
        assert_eq!(sha(&bytes), case[3].as_str().unwrap(), "{case}");
    }
}
