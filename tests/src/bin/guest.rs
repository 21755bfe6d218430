//! Runs a program of this machine under another kernel: `guest PROGRAM [ARGUMENT...]`
//!
//! For what a test needs of the kernel and this machine's may not have: Open vSwitch's datapath, 802.1Q VLAN devices,
//! bonds, bridges that filter VLANs; devices with representors, of netdevsim, and a card with virtual functions, igb, if
//! tests/setup.sh could get them. The kernel is the test guest's, Debian's with the modules named in tests/guest/build.sh, which
//! load on demand. The program finds this machine's files at their places; what it writes is in the guest's memory and gone
//! with it. It is root, in the directory and with the arguments and settings that it was given, and with [`MARK`] in its
//! environment: under it nothing but these two may be missing.
//!
//! Made to be cargo's runner, so that any test binary runs in a guest, here the one `host` of crate `hostnet`:
//!
//! ```sh
//! cargo build --workspace --bins
//! cargo test -p hostnet --test host --config 'target."cfg(unix)".runner = "target/debug/guest"' -- bridge
//! ```
//!
//! `make test` does so with the tests that its variable IN_GUEST names. A guest is up after five seconds, and ten times
//! slower than this machine.
#![forbid(unsafe_code)]

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::qemu::{Guest, GuestConfig, IMAGE_DIR, MARK};

/// Of the guest, MiB. Only what it touches is taken.
const MEMORY: u32 = 2048;
const CPUS: u16 = 2;
/// For the program.
const TIMEOUT: Duration = Duration::from_secs(300);
/// Settings that the program may have use for begin so.
const SETTINGS: [&str; 5] = ["CARGO", "RUST", "VHOSTD", "INSTA", "PATH"];

/// This machine's files with memory above them as the guest's own, then the program. A file system that is moved over the root
/// is the root of namespaces made later, too, which one that was only changed to is not. Device nodes are the guest's.
const WITH_FILES_OF_HOST: &str = r#"set -e
modprobe -a overlay tun openvswitch bonding virtio_net igb igbvf vfio-pci uio_pci_generic
if [ -e "/host$IMAGE/netdevsim.ko" ]; then modprobe psample; insmod "/host$IMAGE/netdevsim.ko"; fi
mount -t tmpfs memory /tmp
mkdir /tmp/upper /tmp/work /tmp/root
mount -t overlay -o lowerdir=/host,upperdir=/tmp/upper,workdir=/tmp/work overlay /tmp/root
cd /tmp/root
mount -t tmpfs run run
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t devtmpfs dev dev
mkdir -p dev/shm
mount -t tmpfs shm dev/shm
mount --move . /
exec chroot . "#;

fn main() -> Result<ExitCode> {
    let program: Vec<_> = env::args().skip(1).collect();
    ensure!(!program.is_empty(), "usage: guest PROGRAM [ARGUMENT...]");
    let config = GuestConfig {
        memory_mib: MEMORY,
        cpus: CPUS,
        spare_nics: true,
        host_dir: Some(PathBuf::from("/")),
        ..GuestConfig::new("guest", Vec::new())
    };
    let guest = Guest::boot(&config)?;
    let job = guest.spawn(&format!("unshare -m sh -c {}", quoted(&script(&program)?)))?;
    let output = job.wait(TIMEOUT).with_context(|| job.output(TIMEOUT / 10).unwrap_or_default())?;
    print!("{}", output.stdout);
    if output.status != 0 {
        eprintln!("---- the guest's console ----\n{}----", guest.console()?);
    }
    Ok(ExitCode::from(u8::try_from(output.status).unwrap_or(u8::MAX)))
}

/// What the guest is told to do.
fn script(program: &[String]) -> Result<String> {
    let dir = env::current_dir()?;
    let dir = dir.to_str().context("this directory's name is not text")?;
    let settings = env::vars().filter(|(name, _)| SETTINGS.iter().any(|start| name.starts_with(start)));
    let settings = settings.map(|(name, value)| format!("{name}={value}"));
    // In full, or it would be busybox's.
    let enter = ["/bin/sh", "-c", "cd \"$0\" && exec /usr/bin/env -i \"$@\"", dir].map(str::to_owned);
    let mark = format!("{MARK}=1");
    let words = enter.into_iter().chain(settings).chain([mark]).chain(program.iter().cloned());
    let words: Vec<_> = words.map(|word| quoted(&word)).collect();
    Ok(format!("IMAGE={}\n{WITH_FILES_OF_HOST}{}", quoted(IMAGE_DIR), words.join(" ")))
}

/// One word of a shell's command line.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
