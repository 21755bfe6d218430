//! Every order in which a teller and a waiter can run, on every memory order that the language allows: nobody sleeps while
//! there is something to take. And the same with one thing left out each time, which must be found.

use loom::cell::UnsafeCell;
use loom::sync::Notify;
use loom::sync::atomic::{AtomicU16, Ordering, fence};
use loom::thread;

use super::{Words, arm, disarm, wanted};

/// What a twin leaves out.
#[derive(Clone, Copy, PartialEq)]
enum Broken {
    Nothing,
    TellersFence,
    WaitersFence,
    Release,
    /// The waiter looks first and wishes afterwards.
    Order,
}

const ENTRIES: u16 = 2;

struct Ring {
    index: AtomicU16,
    flags: AtomicU16,
    event: AtomicU16,
    /// What the entries say; accessing one that is not published is a race, which the checker finds.
    entries: [UnsafeCell<u16>; ENTRIES as usize],
    /// The eventfd, in epoll: remembers that it was written.
    bell: Notify,
}

/// One side's view of it.
struct Side<'a> {
    ring: &'a Ring,
    fence: bool,
    publish: Ordering,
}

impl Words for Side<'_> {
    fn index(&self) -> u16 {
        self.ring.index.load(Ordering::Acquire)
    }

    fn publish(&self, index: u16) {
        self.ring.index.store(index, self.publish);
    }

    fn flags(&self) -> u16 {
        self.ring.flags.load(Ordering::Relaxed)
    }

    fn set_flags(&self, flags: u16) {
        self.ring.flags.store(flags, Ordering::Relaxed);
    }

    fn event(&self) -> u16 {
        self.ring.event.load(Ordering::Relaxed)
    }

    fn set_event(&self, index: u16) {
        self.ring.event.store(index, Ordering::Relaxed);
    }

    fn fence(&self) {
        if self.fence {
            fence(Ordering::SeqCst);
        }
    }
}

/// The teller publishes its entries one by one; the waiter takes them and sleeps in between. The checker reports a waiter
/// that is never woken as a deadlock.
fn check(event_idx: bool, broken: Broken) {
    loom::model(move || {
        // Leaked: the checker's objects cannot be dropped while it unwinds from what it found.
        let ring: &Ring = Box::leak(Box::new(Ring {
            index: AtomicU16::new(0),
            flags: AtomicU16::new(1),
            event: AtomicU16::new(u16::MAX),
            entries: std::array::from_fn(|_| UnsafeCell::new(0)),
            bell: Notify::new(),
        }));
        let teller = thread::spawn(move || tell(ring, event_idx, broken));
        take(ring, event_idx, broken);
        teller.join().unwrap();
    });
}

fn tell(ring: &Ring, event_idx: bool, broken: Broken) {
    let publish = if broken == Broken::Release { Ordering::Relaxed } else { Ordering::Release };
    let side = Side { ring, fence: broken != Broken::TellersFence, publish };
    for old in 0..ENTRIES {
        // SAFETY: the entry is ours until it is published; the checker would find an access meanwhile.
        ring.entries[usize::from(old)].with_mut(|entry| unsafe { *entry = old + 1 });
        side.publish(old + 1);
        if wanted(&side, event_idx, old, old + 1) {
            ring.bell.notify();
        }
    }
}

fn take(ring: &Ring, event_idx: bool, broken: Broken) {
    let side = Side { ring, fence: broken != Broken::WaitersFence, publish: Ordering::Release };
    let mut next = 0;
    while next < ENTRIES {
        let available = side.index();
        while next != available {
            // SAFETY: the entry is published; the checker would find a write meanwhile.
            let entry = ring.entries[usize::from(next)].with(|entry| unsafe { *entry });
            next += 1;
            assert_eq!(entry, next);
        }
        if next == ENTRIES {
            return;
        }
        let sleep = if broken == Broken::Order {
            let nothing = side.index() == next;
            arm(&side, event_idx, next);
            nothing
        } else {
            arm(&side, event_idx, next)
        };
        if sleep {
            ring.bell.wait();
            disarm(&side, event_idx);
        }
    }
}

#[test]
fn nobody_sleeps_with_flags() {
    check(false, Broken::Nothing);
}

#[test]
fn nobody_sleeps_with_event_index() {
    check(true, Broken::Nothing);
}

#[test]
#[should_panic(expected = "deadlock")]
fn flags_need_the_tellers_fence() {
    check(false, Broken::TellersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn flags_need_the_waiters_fence() {
    check(false, Broken::WaitersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn event_index_needs_the_tellers_fence() {
    check(true, Broken::TellersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn event_index_needs_the_waiters_fence() {
    check(true, Broken::WaitersFence);
}

#[test]
#[should_panic(expected = "deadlock")]
fn flags_are_set_before_the_last_look() {
    check(false, Broken::Order);
}

#[test]
#[should_panic(expected = "deadlock")]
fn the_event_index_is_set_before_the_last_look() {
    check(true, Broken::Order);
}

#[test]
#[should_panic]
fn entries_are_released_with_the_index() {
    check(true, Broken::Release);
}
