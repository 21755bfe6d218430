//! How long a plug takes: of a vhost-user socket alone, and of one that is joined with a port of a live Open vSwitch; 256 of
//! these, and the time after `kill -9` until all of them are back. Needs root and Open vSwitch (`tests/setup.sh ovs`).
//!
//! `cargo build --release -p vhostd -p benches && target/release/plugs`
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use e2e::daemon::Daemon;
use e2e::ovs;

/// Plugs one after the other.
const SAMPLES: usize = 100;
/// Plugs by several callers.
const PLUGS: usize = 256;
const CALLERS: usize = 8;

/// A host with Open vSwitch.
struct Host {
    daemon: Daemon,
    // Outlives the daemon.
    _ovs: ovs::Ovs,
}

impl Host {
    fn start() -> Result<Self> {
        let ovs::Host { daemon, ovs } = ovs::Host::start()?;
        Ok(Self { daemon, _ovs: ovs })
    }

    fn plug(&self, name: &str, to: &str) -> Result<Duration> {
        let socket = self.daemon.socket(name);
        let body = format!(r#"{{"spec":{{"socket":{{"path":{socket:?},"role":"listen"}}{to}}}}}"#);
        let begun = Instant::now();
        let answer = self.daemon.http("PUT", &format!("/v1/plugs/{name}"), &body)?;
        ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
        Ok(begun.elapsed())
    }

    fn unplug(&self, name: &str) -> Result<()> {
        let answer = self.daemon.http("DELETE", &format!("/v1/plugs/{name}"), "")?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Ok(())
    }

    /// Median and 99th percentile of plugs one after the other, each unplugged before the next.
    fn times(&self, to: &str) -> Result<(Duration, Duration)> {
        let mut times = Vec::with_capacity(SAMPLES);
        for n in 0..SAMPLES {
            times.push(self.plug(&format!("one{n}"), to)?);
            self.unplug(&format!("one{n}"))?;
        }
        times.sort_unstable();
        Ok((times[SAMPLES / 2], times[SAMPLES * 99 / 100]))
    }

    fn is_ready(&self) -> Result<bool> {
        Ok(self.daemon.http("GET", "/readyz", "")?.starts_with("HTTP/1.1 200"))
    }
}

const INTO_OVS: &str = r#","to":{"kind":"ovs","bridge":"br0"}"#;

fn main() -> Result<()> {
    let mut host = Host::start()?;
    // The bridge stays for all of them.
    host.plug("first", INTO_OVS)?;
    for (what, to) in [("a vhost-user socket", ""), ("the same joined with Open vSwitch", INTO_OVS)] {
        let (median, late) = host.times(to)?;
        println!("{what:<36} {:7.1} ms, p99 {:.1} ms", millis(median), millis(late));
    }
    let (begun, next) = (Instant::now(), AtomicUsize::new(0));
    let caller = || loop {
        match next.fetch_add(1, Ordering::Relaxed) {
            n if n < PLUGS => drop(host.plug(&format!("many{n}"), INTO_OVS)?),
            _ => return Ok(()),
        }
    };
    std::thread::scope(|scope| -> Result<()> {
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(caller)).collect();
        callers.into_iter().try_for_each(|caller| caller.join().expect("a caller does not panic"))
    })?;
    println!("{:<36} {:7.1} ms", format!("{PLUGS} of them, {CALLERS} at a time"), millis(begun.elapsed()));
    let begun = Instant::now();
    host.daemon.kill_and_restart()?;
    while !host.is_ready()? {
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("{:<36} {:7.1} ms", "all of them back after kill -9", millis(begun.elapsed()));
    Ok(())
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
