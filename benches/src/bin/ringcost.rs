//! Quick look at one core's cost.
#![forbid(unsafe_code)]
use std::sync::Arc;
use vring::driver::{Buffer, DriverMemory, DriverRing};
use vring::{Frames, GuestMemory, RingSetup, RxRing, TxRing, features};

fn setup(ring: &DriverRing) -> RingSetup {
    let [d, a, u] = ring.user_addrs();
    RingSetup { size: ring.size(), desc_user_addr: d, avail_user_addr: a, used_user_addr: u, base: 0, features: 1 << features::VERSION_1 | 1 << features::MRG_RXBUF, kick: None, call: None, err: None, enabled: true }
}

fn main() {
    let len: u32 = std::env::args().nth(1).map_or(64, |a| a.parse().expect("length"));
    let rounds: u32 = std::env::args().nth(2).map_or(200_000, |a| a.parse().expect("rounds"));
    let make = || {
        let m = DriverMemory::new(4 << 20).expect("m");
        let g = Arc::new(GuestMemory::map(&[(m.region(), m.fd().try_clone_to_owned().expect("fd"))]).expect("map"));
        let r = DriverRing::new(&m, 0, 256, false);
        (m, g, r)
    };
    let (_ma, ga, mut ra) = make();
    let (_mb, gb, mut rb) = make();
    ra.fill_each(|i| Buffer { offset: 65536 + usize::from(i) * 2048, len: 12 + len, writable: false });
    rb.fill_each(|i| Buffer { offset: 65536 + usize::from(i) * 2048, len: 2048, writable: true });
    let mut tx = TxRing::start(setup(&ra), &ga).expect("tx");
    let mut rx = RxRing::start(setup(&rb), &gb).expect("rx");
    ra.publish();
    rb.publish();
    let mut frames = Frames::default();
    let mut best = u64::MAX;
    for _ in 0..10 {
        let start = sys::clock::cycles();
        for _ in 0..rounds / 10 {
            let burst = tx.dequeue(&mut frames).expect("burst");
            let done = rx.enqueue(&burst.burst, u64::MAX).expect("enqueue");
            assert!(done.frames == 64);
            burst.complete();
            ra.recycle();
            rb.recycle();
        }
        best = best.min((sys::clock::cycles() - start) * 10 / u64::from(rounds));
    }
    println!("{len} B: {:.1} cycles a frame", best as f64 / 64.0);
}
