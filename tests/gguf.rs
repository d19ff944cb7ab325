//! Reading and writing GGUF headers, against a file laid out by hand and against ggml's own reader.
#![allow(unsafe_code)] // ggml's reader
use mbq_convert::ggml::{GgmlType, sys};
use mbq_convert::gguf::{Array, GgufFile, Header, Metadata, ReadError, Value};
use std::ffi::{CStr, CString};

/// A small GGUF file, byte by byte: one tensor of 32 Q8_0 weights.
fn sample(tokens: &[&str], cut: usize) -> Vec<u8> {
    let mut b = b"GGUF".to_vec();
    let text = |b: &mut Vec<u8>, s: &str| {
        b.extend((s.len() as u64).to_le_bytes());
        b.extend(s.as_bytes());
    };
    b.extend(3u32.to_le_bytes());
    b.extend(1u64.to_le_bytes());
    b.extend(3u64.to_le_bytes());
    text(&mut b, "general.architecture");
    b.extend(8u32.to_le_bytes());
    text(&mut b, "qwen2");
    text(&mut b, "qwen2.embedding_length");
    b.extend(4u32.to_le_bytes());
    b.extend(896u32.to_le_bytes());
    text(&mut b, "tokenizer.ggml.tokens");
    b.extend(9u32.to_le_bytes());
    b.extend(8u32.to_le_bytes());
    b.extend((tokens.len() as u64).to_le_bytes());
    for t in tokens {
        text(&mut b, t);
    }
    text(&mut b, "blk.0.attn_q.weight");
    b.extend(2u32.to_le_bytes());
    b.extend(32u64.to_le_bytes());
    b.extend(2u64.to_le_bytes());
    b.extend(8u32.to_le_bytes());
    b.extend(0u64.to_le_bytes());
    b.resize(b.len().next_multiple_of(32), 0);
    b.extend([0; 68]);
    b.truncate(b.len() - cut);
    b
}

fn read(bytes: &[u8]) -> Result<GgufFile, ReadError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    GgufFile::open(file.path())
}

#[test]
fn reads_and_measures() {
    let file = read(&sample(&["a", "b"], 0)).unwrap();
    assert_eq!(file.architecture(), "qwen2");
    assert_eq!(file.arch_u64("embedding_length"), Some(896));
    assert_eq!(file.weights(), 64);
    assert_eq!(file.bits_per_weight(), Some(8.5));
    assert_eq!(file.block_bits_per_weight(), Some(8.5));
    let tensor = file.tensor("blk.0.attn_q.weight").unwrap();
    assert_eq!((tensor.ty(), file.data(tensor)), (Some(GgmlType::Q8_0), &[0; 68][..]));
}

#[test]
fn every_cut_and_every_flipped_length_is_an_error_or_a_header_but_never_a_panic() {
    let good = sample(&["a", "b"], 0);
    for len in 0..good.len() {
        assert!(read(&good[..len]).is_err(), "cut to {len}");
    }
    for at in 0..good.len() - 68 {
        let mut bad = good.clone();
        bad[at] ^= 0x80;
        if let Ok(file) = read(&bad) {
            file.tensors.iter().for_each(|t| assert!(file.data(t).len() <= bad.len()));
        }
    }
    assert!(read(&sample(&["a"], 1)).unwrap_err().to_string().contains("cut off"));
    assert!(matches!(read(b"PK\x03\x04 a zip"), Err(ReadError::Magic { .. })));
}

#[test]
fn vocabularies_are_compared() {
    let [a, b, c] = [&["a", "b"][..], &["a", "c"], &["a"]].map(|t| read(&sample(t, 0)).unwrap());
    assert_eq!(a.vocabulary_difference(&a), None);
    assert!(a.vocabulary_difference(&b).unwrap().contains("tokens differs"));
    assert!(a.vocabulary_difference(&c).unwrap().contains("2 tokens against 1"));
}

fn example() -> Header {
    let mut metadata = Metadata::default();
    metadata.set("general.architecture", "qwen2").set("qwen2.block_count", 3u32).set("qwen2.epsilon", 1e-6f32);
    metadata.set("add_bos", true).set_array("tokens", Array::strings(&["a", "é", "", "nul\0"]));
    metadata.set_array("types", &[1i32, -2][..]).set_array("empty", &[0f32; 0][..]);
    metadata.set("u8", 200u8).set("i8", -3i8).set("u16", 65535u16).set("i16", -4i16).set("i32", -5i32);
    metadata.set("u64", u64::MAX).set("i64", i64::MIN).set("f64", 0.1f64);
    let mut header = Header::new(metadata);
    header.add_tensor("a.weight", GgmlType::MBQ3, &[128, 3]).unwrap();
    header.add_tensor("b.weight", GgmlType::F32, &[5]).unwrap();
    header.add_tensor("c.weight", GgmlType::Q8_0, &[32, 2, 2]).unwrap();
    header.add_tensor("d.weight", GgmlType::F16, &[4, 1]).unwrap();
    header
}

fn example_file() -> Vec<u8> {
    let mut bytes = example().encode();
    bytes.resize(bytes.len() + example().data_bytes() as usize, 0);
    bytes
}

#[test]
fn what_is_written_reads_back_to_the_last_byte() {
    let file = read(&example_file()).unwrap();
    assert_eq!(file.version, 3);
    assert_eq!(file.metadata, example().metadata);
    let tokens = file.metadata.get("tokens").and_then(Value::as_array).unwrap();
    let tokens: Vec<String> = tokens.iter().filter_map(|v| v.as_str().map(String::from)).collect();
    assert_eq!(tokens, ["a", "é", "", "nul\0"]);
    let mut again = Header::new(file.metadata.clone());
    for t in &file.tensors {
        again.add_tensor(&t.name, t.ty().unwrap(), &t.shape).unwrap();
    }
    assert_eq!(again.encode(), example().encode());
}

/// ggml reads the same values, shapes and offsets out of the file.
#[test]
fn ggml_reads_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, example_file()).unwrap();
    let ours = GgufFile::open(&path).unwrap();
    let c = |s: &str| CString::new(s).unwrap();
    // SAFETY: a live context between init and free; every getter is called for the type that was written.
    unsafe {
        let params = sys::gguf_init_params { no_alloc: true, ctx: std::ptr::null_mut() };
        let file = sys::gguf_init_from_file(c(path.to_str().unwrap()).as_ptr(), params);
        assert!(!file.is_null());
        let key = |name: &str| sys::gguf_find_key(file, c(name).as_ptr());
        assert_eq!(sys::gguf_get_n_kv(file) as usize, ours.metadata.iter().count());
        assert_eq!(CStr::from_ptr(sys::gguf_get_val_str(file, key("general.architecture"))).to_str(), Ok("qwen2"));
        let data = |name: &str| sys::gguf_get_val_data(file, key(name));
        assert_eq!(*data("qwen2.block_count").cast::<u32>(), 3);
        assert_eq!(*data("qwen2.epsilon").cast::<f32>(), 1e-6);
        assert_eq!(data("i16").cast::<i16>().read_unaligned(), -4);
        assert_eq!(data("u64").cast::<u64>().read_unaligned(), u64::MAX);
        assert_eq!(data("f64").cast::<f64>().read_unaligned(), 0.1);
        assert_eq!(sys::gguf_get_arr_n(file, key("tokens")), 4);
        assert_eq!(CStr::from_ptr(sys::gguf_get_arr_str(file, key("tokens"), 1)).to_str(), Ok("é"));
        let types = sys::gguf_get_arr_data(file, key("types")).cast::<i32>();
        assert_eq!((types.read_unaligned(), types.add(1).read_unaligned()), (1, -2));
        let start = sys::gguf_get_data_offset(file) as u64;
        assert_eq!(start, example().encode().len() as u64);
        for (i, t) in ours.tensors.iter().enumerate() {
            let id = i as i64;
            assert_eq!(CStr::from_ptr(sys::gguf_get_tensor_name(file, id)).to_str(), Ok(t.name.as_str()));
            assert_eq!(sys::gguf_get_tensor_type(file, id) as u32, t.type_id);
            assert_eq!(start + sys::gguf_get_tensor_offset(file, id) as u64, t.offset);
            assert_eq!(sys::gguf_get_tensor_size(file, id) as u64, t.size.unwrap());
            let ne = std::slice::from_raw_parts(sys::gguf_get_tensor_ne(file, id), 4);
            let shape: Vec<i64> = (0..4).map(|d| t.shape.get(d).map_or(1, |&n| n as i64)).collect();
            assert_eq!(ne, shape);
        }
        sys::gguf_free(file);
    }
}

#[test]
fn bad_entries_are_refused() {
    let mut header = example();
    let mut error = |name: &str, ty, shape: &[usize]| header.add_tensor(name, ty, shape).unwrap_err().to_string();
    assert!(error("a.weight", GgmlType::F32, &[1]).contains("listed twice"));
    assert!(error(&"x".repeat(64), GgmlType::F32, &[1]).contains("1 to 63 bytes"));
    assert!(error("e", GgmlType::MBQ3, &[64]).contains("do not fit mbq3"));
    assert!(error("e", GgmlType::F32, &[1, 1, 1, 1, 1]).contains("dimensions"));
    assert!(error("e", GgmlType::F32, &[1 << 40, 1 << 40]).contains("too many"));
    assert!(error("e", GgmlType::F32, &[0]).contains("zero"));
}
