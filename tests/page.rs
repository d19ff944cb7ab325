//! The chat page's modules that need no browser: reading of the stream, requests, Markdown. `node --test` runs them.
mod common;

use common::root;
use std::process::Command;

#[test]
fn modules_of_the_page() {
    let version = Command::new("node").arg("--version").output();
    let major = version.ok().and_then(|v| String::from_utf8(v.stdout).ok()).and_then(|v| {
        let major = v.trim().strip_prefix('v')?.split('.').next()?.to_owned();
        major.parse::<u32>().ok()
    });
    if major.is_none_or(|major| major < 20) {
        eprintln!("skipped: the page's modules are tested by node 20 or newer, which is not here");
        return;
    }
    let files: Vec<_> = ["markdown", "protocol"].map(|name| root().join(format!("tests/page/{name}.test.mjs"))).into();
    let done = Command::new("node").arg("--test").args(files).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{said}{}", String::from_utf8_lossy(&done.stderr));
    // A run that found no test would pass as well.
    assert!(said.contains("pass 30"), "{said}");
}
