//! The switch's table: looking up and refreshing addresses, with 10, 1 000 and 100 000 of them known.
//!
//! `cargo bench -p benches --bench switch`
#![forbid(unsafe_code)]
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dataplane::fdb::Fdb;
use wire::Mac;

const BURST: u64 = 64;

/// The `n`th station, in an order that no cache guesses.
fn station(n: u64, known: u64) -> Mac {
    Mac::from_u64(0x0200_0000_0000 | (n.wrapping_mul(2_654_435_761) % known))
}

fn switch(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("switch");
    group.throughput(Throughput::Elements(BURST));
    for known in [10, 1_000, 100_000] {
        let fdb = Fdb::new();
        for n in 0..known {
            fdb.learn(Mac::from_u64(0x0200_0000_0000 | n), 1, 0, u32::MAX);
        }
        let mut n = 0;
        group.bench_function(BenchmarkId::new("look up", known), |bencher| {
            bencher.iter(|| {
                n += BURST;
                (n..n + BURST).filter(|n| fdb.lookup(station(*n, known)).is_some()).count()
            });
        });
        group.bench_function(BenchmarkId::new("refresh", known), |bencher| {
            bencher.iter(|| {
                n += BURST;
                for n in n..n + BURST {
                    fdb.learn(station(n, known), 1, 1, u32::MAX);
                }
            });
        });
    }
    group.finish();
}

criterion_group!(benches, switch);
criterion_main!(benches);
