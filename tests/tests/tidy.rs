//! What the README says about the tree is so, and what holds for every source file holds.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::daemon::vhostd_path;

/// Lines in a file.
const LINES_MAX: usize = 700;
/// Where the keyword that this test looks for may be. (It may not be here either.)
const UNSAFE: &str = concat!("un", "safe");
const UNSAFE_CRATES: [&str; 2] = ["crates/vring", "crates/sys"];
/// What cargo, git and the fuzzer make.
const NOT_OURS: [&str; 5] = ["target", ".git", "corpus", "artifacts", "snapshots"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

/// All files below `dir` with one of these extensions.
fn files(dir: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if !NOT_OURS.contains(&name) {
                found.extend(files(&path, extensions));
            }
        } else if path.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted)) {
            found.push(path);
        }
    }
    found
}

/// The code spans of a line.
fn code_spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

#[test]
fn every_path_of_the_code_map_exists() {
    let readme = readme();
    let map = readme.split("## Code map").nth(1).unwrap().split("\n## ").next().unwrap();
    let mut seen = 0;
    for line in map.lines() {
        // In a row, a name without a directory is beside the one before it.
        let mut dir = root();
        for span in code_spans(line) {
            let path = [root().join(span), dir.join(span)].into_iter().find(|path| path.exists());
            let path = path.unwrap_or_else(|| panic!("{span} does not exist: {line}"));
            dir = path.parent().unwrap().to_owned();
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen} paths found in the code map");
}

#[test]
fn every_command_line_of_the_readme_is_one() {
    let readme = readme();
    let mut commands = Vec::new();
    let mut in_code = false;
    for line in readme.lines() {
        if line.starts_with("```") {
            in_code = !in_code;
        } else if in_code {
            commands.extend(line.split('#').next().unwrap().split(';').map(str::trim));
        } else {
            commands.extend(code_spans(line));
        }
    }
    commands.retain(|command| command.starts_with("vhostd "));
    assert!(commands.len() > 15, "{commands:?}");

    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("vif.json"), r#"{"kind":"libvirt"}"#).unwrap();
    let vhostd = vhostd_path().unwrap();
    for command in commands {
        let mut words: Vec<_> =
            command.trim_end_matches(['&', ' ']).split_ascii_whitespace().skip(1).collect();
        // These two would run; so would one that reads a document before it calls the daemon, and find it wrong.
        if matches!(words[0], "serve" | "demo") || words.contains(&"-f") {
            words.push("--help");
        }
        let output = Command::new(&vhostd)
            .args(["--api", "no-daemon.sock"])
            .args(&words)
            .current_dir(dir.path())
            .output()
            .unwrap();
        let wanted = if words.contains(&"--help") { 0 } else { DAEMON_UNREACHABLE };
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(wanted), "{command}: {errors}");
    }
}

/// The command line was understood, and nobody was there to obey.
const DAEMON_UNREACHABLE: i32 = 6;

#[test]
fn only_two_crates_may_do_what_the_compiler_cannot_check() {
    let root = root();
    for path in files(&root, &["rs"]) {
        let inside = path.strip_prefix(&root).unwrap();
        if UNSAFE_CRATES.iter().any(|krate| inside.starts_with(krate)) {
            continue;
        }
        for (line, number) in fs::read_to_string(&path).unwrap().lines().zip(1..) {
            let code = line.split("//").next().unwrap();
            let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            assert!(!words.any(|word| word == UNSAFE), "{}:{number}: {line}", inside.display());
        }
    }
}

#[test]
fn no_file_is_long() {
    let root = root();
    let files = files(&root, &["rs", "sh", "md", "toml"]);
    assert!(files.len() > 100, "{} files found", files.len());
    for path in files {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= LINES_MAX, "{}: {lines} lines", path.display());
    }
}
