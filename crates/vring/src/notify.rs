//! Who tells whom, and when (virtio 1.2, 2.7.7, 2.7.10 and 2.8.14).
//!
//! It is the same in both directions and in both layouts. A *teller* publishes entries, and tells the other side if that wishes it:
//! the driver available ones by a kick, the device used ones by a call. A *waiter* says from which entry on it wishes to
//! be told, and then looks once more whether that is there before it sleeps.
//!
//! ```text
//! teller   publish entry · fence · load wish  ──► tell, or not
//! waiter   store wish    · fence · look       ──► sleep, or not
//! ```
//!
//! The fences are full ones, so of the two loads at least one sees the other side's store: either the teller tells, or the
//! waiter finds the entry and does not sleep. The protocol is written here once, over the few words it touches, so that
//! what is model-checked (see `models`) is what runs.

/// The words of one direction. Entries are named by their position in the ring.
pub(crate) trait Words {
    /// Whether the entry at `at`, the next to come, is there; with acquire.
    fn is_there(&self, at: u16) -> bool;
    /// Waiter: wishes to be told of the entry at `at`.
    fn wish(&self, at: u16);
    /// Waiter: wishes not to be told. Advisory.
    fn wish_nothing(&self);
    /// Teller: whether the waiter wishes to be told of one of the entries from `old` up to before `new`.
    fn is_wished(&self, old: u16, new: u16) -> bool;
    /// A full fence.
    fn fence(&self);
}

/// Teller: whether to tell after the entries from `old` up to before `new` were published.
#[inline]
pub(crate) fn wanted(words: &impl Words, old: u16, new: u16) -> bool {
    words.fence();
    words.is_wished(old, new)
}

/// Waiter: wishes to be told of the entry `next`. True if it is not there yet: then it may sleep.
#[inline]
pub(crate) fn arm(words: &impl Words, next: u16) -> bool {
    words.wish(next);
    words.fence();
    !words.is_there(next)
}

/// Waiter: wishes not to be told.
#[inline]
pub(crate) fn disarm(words: &impl Words) {
    words.wish_nothing();
}

/// Whether an index that went from `old` to `new` passed `event` (virtio 1.2, 2.7.7.2): notify exactly then.
#[inline]
pub(crate) fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(all(test, loom))]
mod models;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::{Words, arm, disarm, wanted};
    use crate::split::SplitRing;

    /// An empty ring in memory of its own.
    fn ring(memory: &mut [u64]) -> SplitRing {
        let base: *mut u8 = memory.as_mut_ptr().cast();
        let host = [0, 256, 512].map(|offset| base.wrapping_add(offset));
        // SAFETY: `memory` is aligned to 8 and has 128 words: 256 bytes for each area of a ring of 16.
        unsafe { SplitRing::from_raw(host, 16) }
    }

    /// The entries that were published, one by one: the specification's wish is to be told of one of them.
    #[test]
    fn told_exactly_when_the_event_is_among_the_entries() {
        let mut memory = [0; 128];
        let ring = ring(&mut memory);
        // Miri is a thousand times slower.
        let (olds, batches, step): (&[u16], &[u16], _) = if cfg!(miri) {
            (&[65_534], &[0, 1, 3], 4099)
        } else {
            let olds = &[0, 1, 77, 32_767, 32_768, 65_534, 65_535];
            (olds, &[0, 1, 2, 3, 16, 64, 256, 32_768, 65_535], 1)
        };
        for &old in olds {
            for &count in batches {
                let mut published = vec![false; 65_536];
                (0..count).for_each(|i| published[usize::from(old.wrapping_add(i))] = true);
                let new = old.wrapping_add(count);
                for event in (0..=u16::MAX).step_by(step) {
                    let told = published[usize::from(event)];
                    ring.calls(true).wish(event);
                    assert_eq!(wanted(&ring.calls(true), old, new), told, "call {event} {old}+{count}");
                    ring.kicks(true).wish(event);
                    assert_eq!(wanted(&ring.kicks(true), old, new), told, "kick {event} {old}+{count}");
                }
            }
        }
    }

    #[test]
    fn without_event_index_one_flag_decides() {
        let mut memory = [0; 128];
        let ring = ring(&mut memory);
        for flags in (0..=u16::MAX).step_by(if cfg!(miri) { 4099 } else { 1 }) {
            ring.calls(false).set_flags(flags);
            ring.kicks(false).set_flags(flags);
            assert_eq!(wanted(&ring.calls(false), 0, 1), flags % 2 == 0);
            assert_eq!(wanted(&ring.kicks(false), 0, 1), flags % 2 == 0);
        }
    }

    /// Where the words are: virtio 1.2, 2.7.6 and 2.7.8.
    #[test]
    fn words_of_each_direction() {
        let mut memory = [0; 128];
        let ring = ring(&mut memory);
        assert!(arm(&ring.kicks(true), 0));
        assert!(arm(&ring.calls(true), 0));
        ring.kicks(true).publish(0x101);
        ring.calls(true).publish(0x202);
        assert!(!arm(&ring.kicks(true), 0x303), "there is something");
        assert!(arm(&ring.calls(true), 0x202));
        disarm(&ring.kicks(false));
        disarm(&ring.calls(false));
        disarm(&ring.calls(true));
        let word = |offset: usize| {
            let bytes = memory[offset / 8].to_ne_bytes();
            u16::from_le_bytes([bytes[offset % 8], bytes[offset % 8 + 1]])
        };
        let (avail, used) = (256, 512);
        assert_eq!([word(avail), word(avail + 2), word(avail + 4 + 32)], [1, 0x101, 0x202]);
        assert_eq!([word(used), word(used + 2), word(used + 4 + 128)], [1, 0x202, 0x303]);
    }
}
