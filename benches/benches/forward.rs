//! Frames between two light front ends through a worker, over real sockets: the back end on one core, both front ends on
//! another.
//!
//! `cargo bench -p benches --bench forward`
#![forbid(unsafe_code)]
#![allow(missing_docs)]

use benches::backend::{Backend, serve};
use benches::pair::Pair;
use benches::{FRONTEND_CPU, pin};
use criterion::{BenchmarkId, Criterion, Throughput};
use dataplane::light::LightConfig;

fn forward(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("forward");
    group.throughput(Throughput::Elements(1));
    for len in [64, 512, 1500] {
        let backend = Backend::vhostd().expect("a back end");
        let [a, b] = backend.sockets();
        let mut pair = Pair::connect([&a, &b], &LightConfig::default(), len).expect("front ends");
        group.bench_function(BenchmarkId::new("split", len), |bencher| {
            bencher.iter_custom(|frames| pair.deliver(frames));
        });
    }
    group.finish();
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if let [_, flag, dir] = &args[..]
        && flag == "--vhostd"
    {
        return serve(dir.as_ref()).expect("serving");
    }
    pin(FRONTEND_CPU);
    let mut criterion = Criterion::default().configure_from_args();
    forward(&mut criterion);
    criterion.final_summary();
}
