//! Front ends that others wrote: QEMU (its firmware drives the card) and DPDK's virtio-user, in both roles. Skipped where
//! they are not installed.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::*;
use vhost_user::{Endpoint, EndpointId, Limits, SessionState, SessionStatus, Sessions};

/// Emulated firmware on a busy machine takes its time.
const PATIENCE: Duration = Duration::from_secs(120);

/// A process that ends with its owner.
struct Process(Child);

impl Process {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// What it said, once it has ended.
    fn last_words(&mut self) -> String {
        let mut words = String::new();
        let _ = self.0.kill();
        if let (Some(out), Some(err)) = (&mut self.0.stdout, &mut self.0.stderr) {
            let _ = out.read_to_string(&mut words);
            let _ = err.read_to_string(&mut words);
        }
        words
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn installed(program: &str) -> bool {
    let there = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()));
    if !there {
        eprintln!("skipped: {program} is not installed");
    }
    there
}

fn qemu(path: &Path, we_listen: bool) -> Process {
    let options = if we_listen { "reconnect=1" } else { "server=on,wait=off" };
    Process::start(
        Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-machine", "pc", "-m", "64", "-nodefaults", "-display", "none"])
            .args(["-object", "memory-backend-memfd,id=memory,size=64M,share=on"])
            .args(["-numa", "node,memdev=memory", "-boot", "n"])
            .args(["-chardev", &format!("socket,id=socket,path={},{options}", path.display())])
            .args(["-netdev", "vhost-user,id=net,chardev=socket"])
            .args(["-device", "virtio-net-pci,netdev=net,vectors=0"]),
    )
}

fn testpmd(path: &Path, we_listen: bool, queues: u32) -> Process {
    let server = if we_listen { "" } else { ",server=1" };
    Process::start(
        Command::new("dpdk-testpmd")
            .args(["-l", "0-1", "--no-pci", "--no-huge", "-m", "128", "--no-telemetry", "--no-shconf"])
            .arg(format!("--file-prefix=vhost-user-test-{}", std::process::id()))
            .arg(format!("--vdev=net_virtio_user0,path={},queues={queues}{server}", path.display()))
            .args(["--", "-i", "--total-num-mbufs=4096", "--auto-start"])
            .arg(format!("--rxq={queues}"))
            .arg(format!("--txq={queues}")),
    )
}

/// Waits for a front end that comes all the way, sees it go, and waits for the next.
fn check(peer: &dyn Fn(&Path, bool) -> Process, rings: usize) {
    let _alone = alone();
    for we_listen in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("port");
        let sessions = Sessions::start(Limits::default(), Box::new(|_, _| {})).unwrap();
        let device = Recorder::default();
        let endpoint = if we_listen { Endpoint::listen(&path) } else { Endpoint::connect(&path) };
        let id = sessions.add(endpoint, Box::new(device.clone())).unwrap();
        let base = Holdings::now();
        for _ in 0..2 {
            let mut process = peer(&path, we_listen);
            let linked = |status: &SessionStatus| {
                let running = status.rings.iter().filter(|ring| ring.started && ring.enabled).count();
                status.state == SessionState::Linked && running >= rings
            };
            if !wait_for(&sessions, id, linked) {
                panic!("{:#?}\n{:?}\n{}", sessions.status(id), device.calls(), process.last_words());
            }
            let status = sessions.status(id).unwrap();
            assert!(status.memory_bytes >= 64 << 20);
            assert_eq!((status.nacks, status.rejected), (0, 0), "{status:#?}");
            drop(process);
            assert!(wait_for(&sessions, id, |status| status.peer.is_none()));
            if !we_listen {
                let _ = std::fs::remove_file(&path);
            }
            // The directory watch of a dialler is not a descriptor of its own.
            base.wait_for_return();
        }
    }
}

fn wait_for(sessions: &Sessions, id: EndpointId, condition: impl Fn(&SessionStatus) -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if condition(&sessions.status(id).unwrap()) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

#[test]
fn qemu_in_both_roles() {
    if installed("qemu-system-x86_64") {
        check(&qemu, 2);
    }
}

#[test]
fn dpdk_virtio_user_in_both_roles() {
    if installed("dpdk-testpmd") {
        check(&|path, we_listen| testpmd(path, we_listen, 1), 2);
        check(&|path, we_listen| testpmd(path, we_listen, 2), 4);
    }
}
