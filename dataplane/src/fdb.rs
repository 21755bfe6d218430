//! The forwarding database of one network: which address is behind which port.
//!
//! Shared by all workers without locks. An entry is one 64-bit word, address and port together, so a reader sees either
//! of two states and nothing between. Entries live in buckets of `WAYS` (a cache line); a bucket is chosen by a keyed
//! hash, because guests choose addresses and must not choose collisions. Buckets are made when they are first needed, in
//! chunks, so that a small network costs little memory.
//!
//! A port may teach so many addresses and no more: who claims a million gets its own cap and evicts nobody.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use foldhash::SharedSeed;
use wire::Mac;

/// Entries in a bucket: one cache line of words.
const WAYS: usize = 8;
/// Buckets in a chunk.
const CHUNK_BUCKETS: usize = 16;
/// Chunks in the table.
const CHUNKS: usize = 1024;
/// Ports of a network at the most.
pub const PORTS_MAX: usize = 4096;

/// An entry is `address << 16 | port + 1`; 0 is none.
#[derive(Default)]
#[repr(align(64))]
struct Bucket([AtomicU64; WAYS]);

#[derive(Default)]
struct Chunk {
    entries: [Bucket; CHUNK_BUCKETS],
    /// When each entry was last seen, seconds of the caller's clock.
    seen_s: [[AtomicU32; WAYS]; CHUNK_BUCKETS],
}

/// The table.
pub struct Fdb {
    chunks: Box<[OnceLock<Box<Chunk>>]>,
    /// How many addresses each port has taught.
    taught: Box<[AtomicU32]>,
    seed: u64,
}

/// What became of an address that a port showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learned {
    /// It was known to be there.
    Known,
    /// It is new, or it moved here.
    New,
    /// The port's cap or the table is full: the address stays unknown and frames to it are flooded.
    Refused,
}

impl Fdb {
    /// An empty table.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self {
            chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
            taught: (0..PORTS_MAX).map(|_| AtomicU32::new(0)).collect(),
            seed: seed(),
        }
    }

    /// The port behind which `mac` is.
    #[inline]
    pub fn lookup(&self, mac: Mac) -> Option<u16> {
        let (chunk, bucket) = self.place(mac);
        let chunk = self.chunks[chunk].get()?;
        let key = mac.to_u64();
        for entry in &chunk.entries[bucket].0 {
            let word = entry.load(Ordering::Relaxed);
            if word >> 16 == key {
                return port_of(word);
            }
        }
        None
    }

    /// Learns that `mac` is behind `port`, at most `max` addresses for it.
    pub fn learn(&self, mac: Mac, port: u16, now_s: u32, max: u32) -> Learned {
        let (chunk, bucket) = self.place(mac);
        let chunk = self.chunks[chunk].get_or_init(Box::default);
        let (entries, seen) = (&chunk.entries[bucket].0, &chunk.seen_s[bucket]);
        let word = mac.to_u64() << 16 | (u64::from(port) + 1);
        for (entry, seen) in entries.iter().zip(seen) {
            let old = entry.load(Ordering::Relaxed);
            if old >> 16 != word >> 16 {
                continue;
            }
            if old == word {
                if seen.load(Ordering::Relaxed) != now_s {
                    seen.store(now_s, Ordering::Relaxed);
                }
                return Learned::Known;
            }
            // The station moved. Should another worker change the entry at this moment, its frame wins.
            if !self.count_one(port, max) {
                return Learned::Refused;
            }
            if entry.compare_exchange(old, word, Ordering::Relaxed, Ordering::Relaxed).is_err() {
                self.uncount(Some(port));
                return Learned::Known;
            }
            self.uncount(port_of(old));
            seen.store(now_s, Ordering::Relaxed);
            return Learned::New;
        }
        if !self.count_one(port, max) {
            return Learned::Refused;
        }
        for (entry, seen) in entries.iter().zip(seen) {
            if entry.load(Ordering::Relaxed) != 0 {
                continue;
            }
            seen.store(now_s, Ordering::Relaxed);
            if entry.compare_exchange(0, word, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return Learned::New;
            }
        }
        self.uncount(Some(port));
        Learned::Refused
    }

    /// Forgets entries not seen since `now_s - ageing_s`, and every entry for which `gone(port)`. Returns how many are
    /// left.
    pub fn sweep(&self, now_s: u32, ageing_s: u32, gone: impl Fn(u16) -> bool) -> usize {
        let mut left = 0;
        self.each(|entry, seen| {
            let word = entry.load(Ordering::Relaxed);
            let Some(port) = port_of(word) else { return };
            let age = now_s.wrapping_sub(seen.load(Ordering::Relaxed));
            // A clock read just before another worker's makes a tiny negative age: not old.
            let old = age >= ageing_s && age < u32::MAX / 2;
            if (old || gone(port))
                && entry.compare_exchange(word, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            {
                self.uncount(Some(port));
            } else {
                left += 1;
            }
        });
        left
    }

    /// Every entry: (address, port, age in seconds).
    pub fn entries(&self, now_s: u32) -> Vec<(Mac, u16, u32)> {
        let mut all = Vec::new();
        self.each(|entry, seen| {
            let word = entry.load(Ordering::Relaxed);
            if let Some(port) = port_of(word) {
                let age = now_s.saturating_sub(seen.load(Ordering::Relaxed));
                all.push((Mac::from_u64(word >> 16), port, age));
            }
        });
        all
    }

    fn each(&self, mut visit: impl FnMut(&AtomicU64, &AtomicU32)) {
        for chunk in self.chunks.iter().filter_map(OnceLock::get) {
            for (bucket, seen) in chunk.entries.iter().zip(&chunk.seen_s) {
                for (entry, seen) in bucket.0.iter().zip(seen) {
                    visit(entry, seen);
                }
            }
        }
    }

    /// Chunk and bucket of an address. Mixed twice: after once, regular addresses share few buckets for some seeds.
    #[inline]
    #[allow(clippy::cast_possible_truncation)]
    fn place(&self, mac: Mac) -> (usize, usize) {
        const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
        let fold = |a: u64, b: u64| {
            let product = u128::from(a) * u128::from(b);
            (product as u64) ^ ((product >> 64) as u64)
        };
        let hash = fold(fold(mac.to_u64() ^ self.seed, ODD), self.seed | 1);
        let bucket = hash as usize % (CHUNKS * CHUNK_BUCKETS);
        (bucket / CHUNK_BUCKETS, bucket % CHUNK_BUCKETS)
    }

    /// Counts one more address for `port`, unless it has `max`.
    fn count_one(&self, port: u16, max: u32) -> bool {
        let Some(taught) = self.taught.get(usize::from(port)) else { return false };
        let more = |n: u32| (n < max).then(|| n + 1);
        taught.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn uncount(&self, port: Option<u16>) {
        if let Some(taught) = port.and_then(|p| self.taught.get(usize::from(p))) {
            taught.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[inline]
#[allow(clippy::cast_possible_truncation)]
fn port_of(word: u64) -> Option<u16> {
    (word as u16).checked_sub(1)
}

/// A number that guests cannot know, from the process's random hash seed.
fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let global = SharedSeed::global_random();
    let fold = foldhash::fast::FoldHasher::with_seed(std::process::id().into(), global).finish();
    let std = std::collections::hash_map::RandomState::new().build_hasher().finish();
    fold ^ std
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mac(n: u64) -> Mac {
        Mac::from_u64(0x0200_0000_0000 | n)
    }

    #[test]
    fn learns_moves_and_forgets() {
        let fdb = Fdb::new();
        assert_eq!(fdb.lookup(mac(1)), None);
        assert_eq!(fdb.learn(mac(1), 0, 0, 10), Learned::New);
        assert_eq!(fdb.learn(mac(1), 0, 5, 10), Learned::Known);
        assert_eq!(fdb.lookup(mac(1)), Some(0));
        assert_eq!(fdb.learn(mac(1), 7, 6, 10), Learned::New, "moved");
        assert_eq!(fdb.lookup(mac(1)), Some(7));
        assert_eq!(fdb.entries(8), [(mac(1), 7, 2)]);
        assert_eq!(fdb.sweep(10, 300, |_| false), 1);
        assert_eq!(fdb.sweep(306, 300, |_| false), 0, "aged out");
        assert_eq!(fdb.lookup(mac(1)), None);
        fdb.learn(mac(2), 3, 0, 10);
        fdb.learn(mac(3), 4, 0, 10);
        assert_eq!(fdb.sweep(0, 300, |port| port == 3), 1, "port 3 is gone");
        assert_eq!((fdb.lookup(mac(2)), fdb.lookup(mac(3))), (None, Some(4)));
    }

    #[test]
    fn a_port_has_its_cap_and_others_keep_their_entries() {
        let fdb = Fdb::new();
        for n in 0..100 {
            assert_eq!(fdb.learn(mac(n), 1, 0, 256), Learned::New);
        }
        let accepted = (1000..1_000_000).filter(|n| fdb.learn(mac(*n), 2, 0, 256) == Learned::New).count();
        assert_eq!(accepted, 256);
        assert!((0..100).all(|n| fdb.lookup(mac(n)) == Some(1)));
        // Moving does not get around the cap, and gives the old port its place back.
        assert_eq!(fdb.learn(mac(0), 2, 0, 256), Learned::Refused);
        assert_eq!(fdb.learn(mac(1000), 1, 0, 256), Learned::New);
        assert_eq!(fdb.learn(mac(0), 2, 0, 256), Learned::New);
    }

    #[test]
    fn holds_sixty_thousand_addresses() {
        // In a row, and with steps that a weak hash would not tell apart; seeds differ. By chance some 59,684 find room.
        for shift in [0, 8, 14, 20] {
            let fdb = Fdb::new();
            let mac = |n: u64| mac(n << shift);
            let learned = (0..60_000).filter(|n| fdb.learn(mac(*n), 0, 0, u32::MAX) == Learned::New).count();
            assert!(learned > 59_400, "{learned} of 60000, {shift} bits apart");
        }
    }
}
