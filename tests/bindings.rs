//! The checked-in bindings are those that bindgen makes from the patched headers.
//!
//! Needs libclang, so it runs with `--features bindgen` only.
#![cfg(feature = "bindgen")]

#[test]
fn checked_in_bindings_are_current() {
    for name in mbq_convert_bindings() {
        let fresh = std::fs::read_to_string(format!("{}/bindings/{name}", env!("OUT_DIR"))).unwrap();
        let kept = std::fs::read_to_string(format!("{}/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(
            fresh == kept,
            "{name} is not what bindgen makes now: MBQ_UPDATE_BINDINGS=1 cargo check --features bindgen"
        );
    }
}

/// Every file that build/bindings.rs generates.
fn mbq_convert_bindings() -> Vec<String> {
    let root = std::path::Path::new(env!("OUT_DIR")).join("bindings");
    let mut found = Vec::new();
    for module in std::fs::read_dir(root.join("src")).unwrap() {
        let module = module.unwrap().file_name().into_string().unwrap();
        found.push(format!("src/{module}/sys.rs"));
    }
    assert!(!found.is_empty());
    found
}
