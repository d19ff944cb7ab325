//! Dependencies: licences and sources are those that deny.toml allows, and docs/reliability.md gives a reason for each
//! direct one. Vulnerabilities are `cargo deny`'s, which asks a database that a test should not need.
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

fn read(name: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// What `cargo metadata` tells: of all platforms, nothing is downloaded.
fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let done = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

/// The texts of a list in deny.toml.
fn allowed(section: &str, key: &str) -> BTreeSet<String> {
    let text = read("deny.toml");
    let section = text.split(&format!("[{section}]")).nth(1).unwrap();
    let list = section.split(&format!("\n{key} = [")).nth(1).unwrap().split(']').next().unwrap();
    list.split('"').skip(1).step_by(2).map(String::from).collect()
}

/// Whether an SPDX expression (or cargo's older `A/B`) can be kept with these licences alone.
fn may_be_used(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let held = either(&words, &mut at, allowed);
    held && at == words.len()
}

fn either(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut held = both(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        held |= both(words, at, allowed);
    }
    held
}

fn both(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let mut held = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        held &= one(words, at, allowed);
    }
    held
}

fn one(words: &[&str], at: &mut usize, allowed: &BTreeSet<String>) -> bool {
    let word = words.get(*at).copied().unwrap_or_default();
    *at += 1;
    if word == "(" {
        let held = either(words, at, allowed);
        *at += 1;
        return held;
    }
    if words.get(*at) == Some(&"WITH") {
        *at += 2;
        return allowed.contains(&format!("{word} WITH {}", words.get(*at - 1).copied().unwrap_or_default()));
    }
    allowed.contains(word)
}

#[test]
fn licences_and_sources_are_allowed() {
    let (licences, registries) = (allowed("licenses", "allow"), allowed("sources", "allow-registry"));
    assert!(licences.len() > 5 && registries.len() == 1, "{licences:?} {registries:?}");
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100);
    for package in packages {
        let (name, licence) = (&package["name"], package["license"].as_str().unwrap_or_default());
        assert!(may_be_used(licence, &licences), "{name} is under {licence:?}, which deny.toml does not allow");
        if name != env!("CARGO_PKG_NAME") {
            let source = package["source"].as_str().unwrap_or("a folder");
            let registry = source.strip_prefix("registry+").unwrap_or(source);
            assert!(registries.contains(registry), "{name} comes from {source}");
        }
    }
}

#[test]
fn expressions() {
    let allowed: BTreeSet<String> = ["MIT", "ISC"].map(String::from).into();
    for (expression, held) in [
        ("MIT", true),
        ("GPL-3.0-only", false),
        ("GPL-3.0-only OR MIT", true),
        ("Apache-2.0/MIT", true),
        ("MIT AND GPL-3.0-only", false),
        ("MIT AND ISC", true),
        ("(Apache-2.0 OR MIT) AND ISC", true),
        ("(Apache-2.0 OR MIT) AND Zlib", false),
        ("MIT WITH Strings-attached", false),
        ("", false),
    ] {
        assert_eq!(may_be_used(expression, &allowed), held, "{expression}");
    }
}

/// The table in docs/reliability.md has a line for every direct dependency, and for no other.
#[test]
fn direct_dependencies_have_a_reason() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let own = packages.iter().find(|package| package["name"] == env!("CARGO_PKG_NAME")).unwrap();
    let direct: BTreeSet<&str> =
        own["dependencies"].as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    let page = read("docs/reliability.md");
    let table = page.split("| dependency |").nth(1).expect("a table of dependencies");
    let lines = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let named = |line: &str| -> Vec<String> {
        let cell = line.split('|').nth(1).unwrap();
        cell.split('`').skip(1).step_by(2).map(String::from).collect()
    };
    let reasons: Vec<String> = lines.flat_map(named).collect();
    let listed: BTreeSet<&str> = reasons.iter().map(String::as_str).collect();
    assert_eq!(direct, listed);
    assert_eq!(reasons.len(), listed.len(), "a dependency is listed twice");
}
