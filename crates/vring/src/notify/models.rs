//! Every order in which a teller and a waiter can run, on every memory order that the language allows: nobody sleeps while
//! there is something to take. And the same with one thing left out each time, which must be found.

use std::ops::Range;

use loom::cell::UnsafeCell;
use loom::sync::Notify;
use loom::sync::atomic::{AtomicU16, Ordering, fence};
use loom::thread;

use super::{Words, arm, disarm, passed, wanted};

/// What a twin leaves out.
#[derive(Clone, Copy, PartialEq)]
enum Broken {
    Nothing,
    TellersFence,
    WaitersFence,
    Release,
    /// The waiter looks first and wishes afterwards.
    Order,
    /// The first entry of a batch, which makes the others visible, is published before them.
    FirstFirst,
}

/// How entries are published and wishes are made.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// An index; a flag.
    Flags,
    /// An index; another index, which stays when nothing is wished.
    EventIndex,
    /// A flag in each entry, of a batch the first one last; one word that is a flag or a position.
    Packed,
}
use Layout::{EventIndex, Flags, Packed};

/// Entries, and how they are published: one after the other, or of a packed ring the first two at one go.
const ENTRIES: usize = 3;
const BATCHES: [&[Range<u16>]; 2] = [&[0..1, 1..2], &[0..2, 2..3]];

impl Layout {
    fn batches(self) -> &'static [Range<u16>] {
        BATCHES[usize::from(self == Packed)]
    }
}

/// In the word of a packed ring; a position otherwise.
const NOTHING: u16 = u16::MAX;

struct Ring {
    index: AtomicU16,
    /// Whether an entry is there, in a packed ring.
    there: [AtomicU16; ENTRIES],
    flags: AtomicU16,
    event: AtomicU16,
    /// What the entries say; accessing one that is not published is a race, which the checker finds.
    entries: [UnsafeCell<u16>; ENTRIES],
    /// The eventfd, in epoll: remembers that it was written.
    bell: Notify,
}

/// One side's view of it.
struct Side<'a> {
    ring: &'a Ring,
    layout: Layout,
    fence: bool,
}

impl Side<'_> {
    /// Publishes the entries of a batch; `order` is that of the store which makes them visible.
    fn publish(&self, batch: &Range<u16>, order: Ordering, first_first: bool) {
        if self.layout != Packed {
            return self.ring.index.store(batch.end, order);
        }
        let there = |entry: u16, order| self.ring.there[usize::from(entry)].store(1, order);
        if first_first {
            there(batch.start, order);
        }
        (batch.start + 1..batch.end).for_each(|entry| there(entry, Ordering::Relaxed));
        if !first_first {
            there(batch.start, order);
        }
    }
}

impl Words for Side<'_> {
    fn is_there(&self, at: u16) -> bool {
        match self.layout {
            Packed => self.ring.there[usize::from(at)].load(Ordering::Acquire) == 1,
            Flags | EventIndex => self.ring.index.load(Ordering::Acquire) != at,
        }
    }

    fn wish(&self, at: u16) {
        match self.layout {
            Flags => self.ring.flags.store(0, Ordering::Relaxed),
            EventIndex | Packed => self.ring.event.store(at, Ordering::Relaxed),
        }
    }

    fn wish_nothing(&self) {
        match self.layout {
            Flags => self.ring.flags.store(1, Ordering::Relaxed),
            EventIndex => {}
            Packed => self.ring.event.store(NOTHING, Ordering::Relaxed),
        }
    }

    fn is_wished(&self, old: u16, new: u16) -> bool {
        match self.layout {
            Flags => self.ring.flags.load(Ordering::Relaxed) & 1 == 0,
            EventIndex => passed(self.ring.event.load(Ordering::Relaxed), old, new),
            Packed => (old..new).contains(&self.ring.event.load(Ordering::Relaxed)),
        }
    }

    fn fence(&self) {
        if self.fence {
            fence(Ordering::SeqCst);
        }
    }
}

/// The teller publishes its entries; the waiter takes them and sleeps in between. The checker reports a waiter that is
/// never woken as a deadlock.
fn check(layout: Layout, broken: Broken) {
    loom::model(move || {
        // Leaked: the checker's objects cannot be dropped while it unwinds from what it found.
        let ring: &Ring = Box::leak(Box::new(Ring {
            index: AtomicU16::new(0),
            there: std::array::from_fn(|_| AtomicU16::new(0)),
            flags: AtomicU16::new(1),
            event: AtomicU16::new(NOTHING),
            entries: std::array::from_fn(|_| UnsafeCell::new(0)),
            bell: Notify::new(),
        }));
        let teller = thread::spawn(move || tell(ring, layout, broken));
        take(ring, layout, broken);
        teller.join().unwrap();
    });
}

fn tell(ring: &Ring, layout: Layout, broken: Broken) {
    let order = if broken == Broken::Release { Ordering::Relaxed } else { Ordering::Release };
    let side = Side { ring, layout, fence: broken != Broken::TellersFence };
    for batch in layout.batches() {
        for entry in batch.clone() {
            // SAFETY: the entry is ours until it is published; the checker would find an access meanwhile.
            ring.entries[usize::from(entry)].with_mut(|word| unsafe { *word = entry + 1 });
        }
        side.publish(batch, order, broken == Broken::FirstFirst);
        if wanted(&side, batch.start, batch.end) {
            ring.bell.notify();
        }
    }
}

fn take(ring: &Ring, layout: Layout, broken: Broken) {
    let side = Side { ring, layout, fence: broken != Broken::WaitersFence };
    let end = layout.batches().last().map_or(0, |batch| batch.end);
    let mut next = 0;
    loop {
        while next < end && side.is_there(next) {
            if layout == Packed {
                // Who sees the first one may count on the others of its batch.
                let batch = layout.batches().iter().find(|batch| batch.contains(&next)).unwrap();
                assert!(batch.clone().all(|entry| side.is_there(entry)), "half of a batch");
            }
            // SAFETY: the entry is published; the checker would find a write meanwhile.
            let entry = ring.entries[usize::from(next)].with(|entry| unsafe { *entry });
            next += 1;
            assert_eq!(entry, next);
        }
        if next == end {
            return;
        }
        let sleep = if broken == Broken::Order {
            let nothing = !side.is_there(next);
            arm(&side, next);
            nothing
        } else {
            arm(&side, next)
        };
        if sleep {
            ring.bell.wait();
            disarm(&side);
        }
    }
}

#[test]
fn nobody_sleeps_with_flags() {
    check(Flags, Broken::Nothing);
}

#[test]
fn nobody_sleeps_with_event_index() {
    check(EventIndex, Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn flags_need_the_tellers_fence() {
    check(Flags, Broken::TellersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn flags_need_the_waiters_fence() {
    check(Flags, Broken::WaitersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn event_index_needs_the_tellers_fence() {
    check(EventIndex, Broken::TellersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn event_index_needs_the_waiters_fence() {
    check(EventIndex, Broken::WaitersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn flags_are_set_before_the_last_look() {
    check(Flags, Broken::Order);
}

#[test]
#[should_panic(expected = "deadlock")]
fn the_event_index_is_set_before_the_last_look() {
    check(EventIndex, Broken::Order);
}

#[test]
#[should_panic]
fn entries_are_released_with_the_index() {
    check(EventIndex, Broken::Release);
}

#[test]
fn nobody_sleeps_with_packed_rings() {
    check(Packed, Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn packed_rings_need_the_tellers_fence() {
    check(Packed, Broken::TellersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn packed_rings_need_the_waiters_fence() {
    check(Packed, Broken::WaitersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn the_event_position_is_set_before_the_last_look() {
    check(Packed, Broken::Order);
}

#[test]
#[should_panic]
fn entries_are_released_with_the_first_flag() {
    check(Packed, Broken::Release);
}

#[test]
#[should_panic(expected = "half of a batch")]
fn the_first_of_a_batch_is_published_last() {
    check(Packed, Broken::FirstFirst);
}
