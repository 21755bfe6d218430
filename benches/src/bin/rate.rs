//! Quick look at the rate.
#![forbid(unsafe_code)]
use dataplane::light::{LightConfig, LightGuest};
use dataplane::{Config, Dataplane, Link, Poll, PortSpec};
use std::time::{Duration, Instant};

fn main() {
    let len: usize = std::env::args().nth(1).map_or(64, |a| a.parse().expect("length"));
    let dir = tempfile::tempdir().expect("dir");
    let plane = Dataplane::start(Config {
        cpus: vec![0],
        poll: Poll::Busy,
        ageing: Duration::from_secs(300),
        fdb_port_max: 256,
        on_event: Box::new(|_| {}),
    })
    .expect("start");
    let mut guests = Vec::new();
    for name in ["a", "b"] {
        let path = dir.path().join(name);
        let endpoint = vhost_user::Endpoint::listen(&path);
        plane
            .add_port(PortSpec {
                name: name.into(),
                network: "n".into(),
                mtu: 1500,
                link: Link::VhostUser { endpoint, mac: None, queue_pairs: 1 },
            })
            .expect("port");
        guests.push(LightGuest::connect(&path, &LightConfig::default()).expect("connect"));
    }
    let macs = [[2u8, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
    for (i, g) in guests.iter_mut().enumerate() {
        let mut f = vec![0u8; len];
        f[..6].copy_from_slice(&macs[1 - i]);
        f[6..12].copy_from_slice(&macs[i]);
        f[12] = 8;
        g.load(&[f]);
    }
    for _ in 0..4 {
        let start = Instant::now();
        let (mut sent, mut filled) = (0, 0);
        while start.elapsed() < Duration::from_secs(1) {
            for _ in 0..100 {
                for g in &mut guests {
                    let (s, f) = g.recycle();
                    sent += s;
                    filled += f;
                }
            }
        }
        let t = start.elapsed().as_secs_f64();
        println!(
            "{len} B: sent {:.1} M/s received {:.1} M/s",
            sent as f64 / t / 1e6,
            filled as f64 / t / 1e6
        );
    }
    for w in plane.workers() {
        println!("{w:?}");
    }
    for p in plane.ports() {
        println!("{} {:?}", p.name, p.counters);
    }
}
