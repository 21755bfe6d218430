//! What the daemon says when it is asked for the impossible: in its answers, its log and its figures there is no address
//! of its own memory, and no name of a network that the matter does not concern.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for;
use e2e::hand::{BUFFERS, Hand, HandConfig, MEMORY, readable};
use e2e::peer::{MODERN, PROTOCOL, Peer, PeerConfig};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_user::{FrontEnd, FrontEndError, RingPlace};
use vring::{RegionSpec, features};

const SOON: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;
/// Where Linux has programs, heaps, libraries, stacks and mappings on x86-64 and AArch64.
const ADDRESSES: Range<u64> = 0x5500_0000_0000..0x8000_0000_0000;
/// What this front end claims to be its address: nobody's.
const CLAIMED: u64 = 0x1234_5000_0000;

/// Numbers in a text that may be addresses of this machine's processes, less those that the front end itself told.
fn addresses(text: &str, told: &[Range<u64>]) -> Vec<u64> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    words
        .flat_map(|word| {
            let hex = word.strip_prefix("0x").unwrap_or(word);
            [u64::from_str_radix(hex, 16).ok(), word.parse().ok()]
        })
        .flatten()
        .filter(|number| ADDRESSES.contains(number) && !told.iter().any(|range| range.contains(number)))
        .collect()
}

/// Everything that can be asked for and names no matter of its own.
const LOOKS: [&str; 10] = [
    "/v1/info",
    "/v1/plugs",
    "/v1/plugs/one",
    "/v1/networks",
    "/v1/stats",
    "/v1/drops",
    "/v1/workers",
    "/v1/fdb",
    "/v1/log",
    "/metrics",
];

/// Requests that must fail.
fn bad_requests(foreign: &Path, one: &str) -> Vec<(&'static str, String, String)> {
    let foreign = foreign.display();
    let listen = |path: &str| format!(r#"{{"spec":{{"socket":{{"role":"listen","path":"{path}"}}}}}}"#);
    let nested = "[".repeat(10_000);
    let mut bad: Vec<_> = [
        String::new(),
        "{".into(),
        nested,
        "{\"spec\":1e400}".into(),
        r#"{"spec":{}}"#.into(),
        r#"{"spec":{"mtu":18446744073709551616}}"#.into(),
        r#"{"spec":{"to":{"kind":"ovs","bridge":"br/int"}}}"#.into(),
        r#"{"spec":{"to":{"kind":"bridge","bridge":"lo"}}}"#.into(),
        r#"{"spec":{"to":{"kind":"tap","tap":"lo"}}}"#.into(),
        r#"{"spec":{"unknown":1}}"#.into(),
        format!("{{\"spec\":\"{}\"}}", "x".repeat(70_000)),
        listen("/nowhere/at/all.sock"),
        listen("relative.sock"),
        listen("/dev/null"),
        listen(&format!("{foreign}")),
    ]
    .into_iter()
    .map(|body| ("PUT", "/v1/plugs/bad".to_owned(), body))
    .collect();
    for (method, path) in [
        ("PUT", "/v1/plugs/..%2fbad"),
        ("PUT", "/v1/plugs/bad?wait=never"),
        ("GET", "/v1/plugs/bad"),
        ("DELETE", "/v1/plugs/bad?must_exist=true"),
        ("POST", "/v1/plugs"),
        ("GET", "/nowhere"),
        ("POST", "/v1/os-vif/plug"),
        ("PUT", "/v1/log"),
    ] {
        bad.push((
            method,
            path.into(),
            r#"{"vif":{"versioned_object.name":"VIFBogus"},"filter":"=;="}"#.into(),
        ));
    }
    // It stands, and never forwards.
    bad.push(("PUT", "/v1/plugs/one?wait=forwarding&timeout=50ms".into(), one.into()));
    bad
}

/// A request of a front end that must be refused.
type Refused = Box<dyn Fn(&mut FrontEnd) -> Result<(), FrontEndError>>;

/// Requests that the session must refuse.
fn bad_messages() -> Result<Vec<(String, Refused)>> {
    let file = Arc::new(memfd_create("guest", MemfdFlags::CLOEXEC)?);
    ftruncate(&file, 4 * MIB)?;
    let region =
        |guest_addr, size, user_addr, mmap_offset| RegionSpec { guest_addr, size, user_addr, mmap_offset };
    let good = region(0, 4 * MIB, CLAIMED, 0);
    let mut bad: Vec<(String, Refused)> = Vec::new();
    let tables = [
        ("overlapping", vec![good, good]),
        ("overlapping in user addresses", vec![good, region(8 * MIB, MIB, CLAIMED + MIB, 0)]),
        ("wrapping", vec![region(u64::MAX - MIB + 1, 2 * MIB, CLAIMED, 0)]),
        ("longer than its file", vec![region(0, 8 * MIB, CLAIMED, 0)]),
        ("beyond its file", vec![region(0, MIB, CLAIMED, 4 * MIB)]),
    ];
    for (what, regions) in tables {
        let file = file.clone();
        let give = move |front: &mut FrontEnd| {
            front.set_memory(&regions.iter().map(|region| (*region, file.as_fd())).collect::<Vec<_>>())
        };
        bad.push((format!("a table {what}"), Box::new(give)));
    }
    let (pipe, _) = rustix::pipe::pipe()?;
    bad.push(("a pipe".into(), Box::new(move |front| front.set_memory(&[(good, pipe.as_fd())]))));
    let give = move |front: &mut FrontEnd| front.set_memory(&[(good, file.as_fd())]);
    let half = region(2 * MIB, 2 * MIB, CLAIMED + 2 * MIB, 0);
    let remove = move |front: &mut FrontEnd| front.remove_memory(&half);
    let given = give.clone();
    bad.push((
        "a region that is none".into(),
        Box::new(move |front| given(front).and_then(|()| remove(front))),
    ));
    for area in 0..3 {
        for addr in [CLAIMED + 4 * MIB, CLAIMED + 4 * MIB - 16, CLAIMED + 1, 0, u64::MAX - 15] {
            let mut user_addrs = [CLAIMED, CLAIMED + 0x2000, CLAIMED + 0x3000];
            user_addrs[area] = addr;
            let place = RingPlace { size: 256, user_addrs, base: 0 };
            let given = give.clone();
            let start = move |front: &mut FrontEnd| {
                given(front)?;
                front.start_ring(0, place).map(drop)
            };
            bad.push((format!("area {area} at {addr:#x}"), Box::new(start)));
        }
    }
    let place = RingPlace { size: 3, user_addrs: [CLAIMED; 3], base: 0 };
    bad.push(("a ring of three".into(), Box::new(move |front| front.start_ring(0, place).map(drop))));
    bad.push(("an MTU".into(), Box::new(|front| front.set_mtu(65_536))));
    bad.push(("an address".into(), Box::new(|front| front.send_rarp([1, 0, 0, 0, 0, 0]))));
    bad.push(("features".into(), Box::new(|front| front.set_features(u64::MAX))));
    Ok(bad)
}

/// Versions, requests and lengths that do not exist.
fn nonsense(socket: &Path) -> Result<()> {
    for words in [[1, 7, 0], [9999, 9, 0], [1, 1, u32::MAX], [5, 1, 8], [12, 1, 4]] {
        let mut stream = UnixStream::connect(socket)?;
        stream.write_all(&words.map(u32::to_ne_bytes).concat())?;
        stream.shutdown(Shutdown::Write)?;
        // Until it is turned away.
        while stream.read(&mut [0; 64]).is_ok_and(|len| len != 0) {}
    }
    Ok(())
}

/// Rings that point nowhere, that make no sense, and that lie in memory that goes away. Returns what the guest told of
/// its own addresses.
fn bad_rings(socket: &Path, mut looked: impl FnMut(&str) -> Result<()>) -> Result<Vec<Range<u64>>> {
    let mut told = Vec::new();
    for what in ["unmapped buffer", "jumping index", "memory that goes away"] {
        let mut hand = Hand::connect(socket, &HandConfig { unsealed: true, ..HandConfig::default() })?;
        let region = hand.memory().region();
        told.push(region.user_addr..region.user_addr + region.size);
        match what {
            "unmapped buffer" => {
                hand.tx().ring.set_descriptor(0, readable(MEMORY + BUFFERS, 100));
                hand.tx().post(0);
                hand.tx().expect_used()?;
            }
            "jumping index" => {
                hand.tx().ring.publish_avail(0x8000);
                hand.tx().kick();
                hand.tx().expect_broken()?;
            }
            _ => {
                ftruncate(hand.memory().fd(), 0)?;
                hand.tx().kick();
                hand.tx().expect_broken()?;
            }
        }
        looked(what)?;
    }
    Ok(told)
}

#[test]
fn x05_answers_and_logs_have_no_addresses_and_no_foreign_names() -> Result<()> {
    let daemon = Daemon::start()?;
    daemon.http("PUT", "/v1/log", r#"{"filter":"trace"}"#)?;
    let path = |plug: &str| daemon.socket(plug).display().to_string();
    // Another network, with a guest that talks.
    daemon.run(&["plug", "secret", "--listen", &path("secret"), "--network", "elsewhere"])?;
    let mut other = Peer::connect(daemon.socket("secret"), PeerConfig::default())?;
    other.offer_all();
    daemon.wait_for_forwarding(&["secret"])?;
    let before = daemon.log()?.len();
    let mut said = String::new();

    let one =
        format!(r#"{{"spec":{{"network":"here","socket":{{"role":"listen","path":"{}"}}}}}}"#, path("one"));
    daemon.http("PUT", "/v1/plugs/one", &one)?;
    std::fs::write(daemon.socket("foreign"), "a file of somebody")?;
    for (method, path, body) in bad_requests(&daemon.socket("foreign"), &one) {
        let answer = daemon.http(method, &path, &body)?;
        ensure!(answer.contains("application/problem+json"), "{method} {path} {body:.100}: {answer}");
        said += &answer;
    }
    let mut figures = String::new();
    let mut look = |what: &str| -> Result<()> {
        for path in LOOKS {
            figures += &daemon.http("GET", path, "").context(what.to_owned())?;
        }
        Ok(())
    };
    for (what, refused) in bad_messages()? {
        // A new port each time: one that complains too much falls silent.
        daemon.http("DELETE", "/v1/plugs/one", "")?;
        let answer = daemon.http("PUT", "/v1/plugs/one", &one)?;
        ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
        let mut front = FrontEnd::connect(daemon.socket("one"))?;
        front.negotiate(MODERN | 1 << features::PROTOCOL_FEATURES, PROTOCOL)?;
        ensure!(refused(&mut front).is_err(), "{what}");
        look(&what)?;
    }
    nonsense(&daemon.socket("one"))?;
    let told = bad_rings(&daemon.socket("one"), &mut look)?;
    wait_for("the last word", SOON, || daemon.log().is_ok_and(|log| log.contains("truncated")))?;
    figures += &daemon.http("GET", "/v1/events", "")?;
    let log = daemon.log()?;

    // The daemon has words for all of it; they are about the matter.
    for wanted in
        ["is not aligned", "does not lie in one region", "overlap", "0x123450000001", "jumped from 0"]
    {
        ensure!(figures.contains(wanted) || log.contains(wanted), "nobody said {wanted:?}:\n{log}");
    }
    for text in [&said, &figures, &log] {
        let found = addresses(text, &told);
        ensure!(found.is_empty(), "addresses {found:#x?} in\n{text}");
    }
    for text in [&said, &log[before..]] {
        ensure!(!text.contains("secret") && !text.contains("elsewhere"), "{text}");
    }
    // What would have been found.
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", daemon.pid()))?;
    let start = maps.split('-').next().context("no mappings")?;
    ensure!(addresses(&format!("ring at 0x{start}."), &told).len() == 1, "{start} is no address?");
    Ok(())
}
