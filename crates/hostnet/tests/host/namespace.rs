//! A network namespace for each test: the test binary runs itself again in one.

use std::process::{Command, Output};

use hostnet::HostNet;

const INSIDE: &str = "HOSTNET_TEST_NAMESPACE";

/// Runs `body` in a namespace made for the test `name` (its path within this binary), with its privileges: as root
/// of the host, or else as root of an unprivileged user namespace. Skips, loudly, where neither can have TAPs.
pub(crate) fn run<F: Future<Output = ()>>(name: &str, body: impl FnOnce(HostNet) -> F) {
    let flags = if rustix::process::geteuid().is_root() { "-nm" } else { "-Urnm" };
    run_with(name, flags, body);
}

/// The same with other flags to `unshare`.
pub(crate) fn run_with<F: Future<Output = ()>>(name: &str, flags: &str, body: impl FnOnce(HostNet) -> F) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(async { body(HostNet::open().unwrap()).await });
    }
    let usable = output("unshare", &[flags, "sh", "-c", "exec 3<>/dev/net/tun"]);
    if !usable.status.success() {
        let why = String::from_utf8_lossy(&usable.stderr).into_owned();
        return eprintln!("SKIPPED {name}: this user can have no namespace with TAPs: {why}");
    }
    let test = std::env::current_exe().unwrap();
    let mut child = Command::new("unshare");
    child.arg(flags).arg(test).args(["--exact", name, "--nocapture"]).env(INSIDE, "1");
    let result = child.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&result.stdout), String::from_utf8_lossy(&result.stderr));
    assert!(result.status.success(), "in its namespace:\n{stdout}{stderr}");
    assert!(stdout.contains("1 passed"), "no test is named {name}");
}

/// Runs a program that has to succeed, arguments split at spaces; returns what it prints.
pub(crate) fn sh(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let result = output(words[0], &words[1..]);
    assert!(result.status.success(), "{line}: {}", String::from_utf8_lossy(&result.stderr));
    String::from_utf8(result.stdout).unwrap()
}

fn output(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"))
}
