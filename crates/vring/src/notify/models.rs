//! Every order in which a teller and a waiter can run, on every memory order that the language allows: nobody sleeps while
//! there is something to take. And the same with one thing left out each time, which must be found.

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
    event_idx: bool,
    fence: bool,
}

impl Side<'_> {
    fn index(&self) -> u16 {
        self.ring.index.load(Ordering::Acquire)
    }
}

impl Words for Side<'_> {
    fn is_there(&self, at: u16) -> bool {
        self.index() != at
    }

    fn wish(&self, at: u16) {
        if self.event_idx {
            self.ring.event.store(at, Ordering::Relaxed);
        } else {
            self.ring.flags.store(0, Ordering::Relaxed);
        }
    }

    fn wish_nothing(&self) {
        if !self.event_idx {
            self.ring.flags.store(1, Ordering::Relaxed);
        }
    }

    fn is_wished(&self, old: u16, new: u16) -> bool {
        if self.event_idx {
            passed(self.ring.event.load(Ordering::Relaxed), old, new)
        } else {
            self.ring.flags.load(Ordering::Relaxed) & 1 == 0
        }
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
    let side = Side { ring, event_idx, fence: broken != Broken::TellersFence };
    for old in 0..ENTRIES {
        // SAFETY: the entry is ours until it is published; the checker would find an access meanwhile.
        ring.entries[usize::from(old)].with_mut(|entry| unsafe { *entry = old + 1 });
        ring.index.store(old + 1, publish);
        if wanted(&side, old, old + 1) {
            ring.bell.notify();
        }
    }
}

fn take(ring: &Ring, event_idx: bool, broken: Broken) {
    let side = Side { ring, event_idx, fence: broken != Broken::WaitersFence };
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
