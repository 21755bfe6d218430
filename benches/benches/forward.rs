//! Frames between two light front ends through a worker, over real sockets: the back end on one core, both front ends on
//! another.
//!
//! `cargo bench -p benches --bench forward`
#![forbid(unsafe_code)]
#![allow(missing_docs)]

use benches::backend::{Backend, Kind, Shape, serve_if_asked};
use benches::traffic::{Guests, Traffic};
use benches::{FRONTEND_CPU, pin};
use criterion::{BenchmarkId, Criterion, Throughput};
use dataplane::light::LightConfig;

fn forward(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("forward");
    group.throughput(Throughput::Elements(1));
    for len in [64, 512, 1500] {
        let shape = Shape { ports: 2, taps: 0, first_tap: 0, frame_max: len, huge_pages: false };
        let backend = Backend::start(Kind::Vhostd, &shape).expect("a back end");
        let guests = Guests::connect(&backend.sockets(), &LightConfig::default(), &Traffic::of(len));
        let mut guests = guests.expect("front ends");
        group.bench_function(BenchmarkId::new("split", len), |bencher| {
            bencher.iter_custom(|frames| guests.deliver(frames));
        });
    }
    group.finish();
}

fn main() {
    if let Some(served) = serve_if_asked() {
        return served.expect("serving");
    }
    pin(FRONTEND_CPU);
    let mut criterion = Criterion::default().configure_from_args();
    forward(&mut criterion);
    criterion.final_summary();
}
