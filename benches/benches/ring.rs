//! One burst of 64 frames from a TX ring into an RX ring, on one core with warm caches: vhostd's rings against
//! virtio-queue's iterator. Both copy every frame once; virtio-queue looks at no header.
//!
//! `cargo bench -p benches --bench ring`
#![forbid(unsafe_code)]
#![allow(missing_docs)]

use benches::side::Side;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vring::driver::GUEST_BASE;
use vring::{BURST_MAX, Frames, RxRing, TxRing};

const BUFFER: usize = 2048;

/// The same ring for virtio-queue.
fn queue(side: &Side) -> (GuestMemoryMmap, Queue) {
    let file = FileOffset::new(std::fs::File::from(side.fd()), 0);
    let region = MmapRegion::from_file(file, side.memory.len()).expect("mapping");
    let region = GuestRegionMmap::new(region, GuestAddress(GUEST_BASE)).expect("region");
    let memory = GuestMemoryMmap::from_regions(vec![region]).expect("memory");
    let mut queue = Queue::new(side.ring.size()).expect("queue");
    let [desc, avail, used] = side.ring.area_offsets().map(|at| GUEST_BASE + at as u64);
    queue.set_desc_table_address(Some(desc as u32), Some((desc >> 32) as u32));
    queue.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
    queue.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
    queue.set_ready(true);
    assert!(queue.is_valid(&memory), "the reference takes the ring");
    (memory, queue)
}
fn ours(a: &mut Side, b: &mut Side) -> impl FnMut() {
    let mut tx = TxRing::start(a.setup(), &a.mapped()).expect("TX ring");
    let mut rx = RxRing::start(b.setup(), &b.mapped()).expect("RX ring");
    let mut frames = Frames::default();
    move || {
        let burst = tx.dequeue(&mut frames).expect("burst");
        let done = rx.enqueue(&burst.burst, u64::MAX).expect("delivery");
        assert_eq!(done.frames as usize, BURST_MAX);
        burst.complete();
        a.ring.recycle();
        b.ring.recycle();
    }
}

fn reference(a: &mut Side, b: &mut Side) -> impl FnMut() {
    let ((from, mut tx), (to, mut rx)) = (queue(a), queue(b));
    let mut bytes = [0; BUFFER];
    move || {
        for _ in 0..BURST_MAX {
            let mut chain = tx.iter(&from).expect("TX ring").next().expect("a frame");
            let out = chain.next().expect("a buffer");
            let len = out.len() as usize;
            from.read_slice(&mut bytes[..len], out.addr()).expect("bytes");
            let head = chain.head_index();
            let mut chain = rx.iter(&to).expect("RX ring").next().expect("a buffer");
            let buffer = chain.next().expect("a buffer");
            to.write_slice(&bytes[..len], buffer.addr()).expect("bytes");
            rx.add_used(&to, chain.head_index(), len as u32).expect("used");
            tx.add_used(&from, head, 0).expect("used");
        }
        a.ring.recycle();
        b.ring.recycle();
    }
}

fn ring(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring");
    group.throughput(Throughput::Elements(BURST_MAX as u64));
    for len in [64u32, 512, 1500] {
        let sides = || (Side::new(len + 12, false, 0), Side::new(BUFFER as u32, true, 0));
        group.bench_function(BenchmarkId::new("vhostd", len), |bencher| {
            let (mut a, mut b) = sides();
            bencher.iter(ours(&mut a, &mut b));
        });
        group.bench_function(BenchmarkId::new("virtio-queue", len), |bencher| {
            let (mut a, mut b) = sides();
            bencher.iter(reference(&mut a, &mut b));
        });
    }
    group.finish();
}

criterion_group!(benches, ring);
criterion_main!(benches);
