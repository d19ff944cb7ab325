//! The card of a family's model, from the front matter that its checkpoints have to what the hub's own library reads.
use super::{program, text};
use mbq_convert::front::FrontMatter;
use std::path::Path;
use std::process::Command;

/// Front matter and what a card keeps of it.
pub type Kept = &'static [(&'static str, &'static [&'static str])];

/// Converts `checkpoint` with `front` as its card's front matter under the name that the program gives it, writes the card
/// and checks the folder: with `card --check`, and with huggingface_hub where python3 has it.
pub fn carded(checkpoint: &Path, front: &str, kept: Kept) {
    std::fs::write(checkpoint.join("README.md"), format!("---\n{front}\n---\n# A model\n")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let checkpoint = checkpoint.to_str().unwrap();
        let args = args.iter().map(|a| if *a == "CHECKPOINT" { checkpoint } else { a });
        let done = program().args(args).current_dir(folder.path()).output().unwrap();
        assert!(done.status.success(), "{}{}", text(&done.stdout), text(&done.stderr));
    };
    run(&["CHECKPOINT", "--type", "q8_0", "--method", "rtn", "--quiet"]);
    let names = super::listing(folder.path());
    let model = names.iter().find(|n| n.ends_with("Q8_0.gguf") && !n.starts_with("mmproj")).unwrap();
    run(&["card", model, "--base-model", "org/a-model", "--quantized-by", "me"]);
    run(&["card", "--check", "."]);
    let card = std::fs::read_to_string(folder.path().join("README.md")).unwrap();
    let read = FrontMatter::parse(&card).unwrap().unwrap();
    let own: Kept = &[
        ("base_model", &["org/a-model"]),
        ("base_model_relation", &["quantized"]),
        ("pipeline_tag", &["image-text-to-text"]),
        ("library_name", &["gguf"]),
        ("quantized_by", &["me"]),
    ];
    for (key, values) in own.iter().chain(kept) {
        assert_eq!(read.get(key), *values, "{key}: {card}");
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/card_check.py");
    let done = match Command::new("python3").arg(script).arg(folder.path()).output() {
        Ok(done) => done,
        Err(e) => return eprintln!("skipped: python3: {e}"),
    };
    let said = text(&done.stderr);
    match done.status.success() {
        false if said.starts_with("skipped:") => eprint!("{said}"),
        passed => assert!(passed, "{}{said}\n{card}", text(&done.stdout)),
    }
}
