//! One ring in memory of its own, with both ends in this program: for measuring rings without sockets and threads.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vring::driver::{Buffer, DriverMemory, DriverRing};
use vring::{GuestMemory, RingSetup, features};

const SIZE: u16 = 256;
/// Where the buffers begin, and from one to the next.
const BUFFERS: usize = 0x1_0000;
const STRIDE: usize = 2048 + 256;

/// The driver's end.
pub struct Side {
    /// Where ring and buffers lie.
    pub memory: Arc<DriverMemory>,
    /// The ring, every descriptor of it offered: give them back by `recycle`.
    pub ring: DriverRing,
    features: u64,
}

impl Side {
    /// A ring of the layout that `features` name, with buffers of `len` bytes each.
    pub fn new(len: u32, writable: bool, features: u64) -> Self {
        let features = features | 1 << features::VERSION_1 | 1 << features::MRG_RXBUF;
        let memory = DriverMemory::new(1 << 20).expect("memory");
        let mut ring = DriverRing::new(&memory, 0, SIZE, features);
        ring.fill_each(|i| Buffer { offset: BUFFERS + usize::from(i) * STRIDE, len, writable });
        ring.publish();
        ring.recycle();
        Self { memory, ring, features }
    }

    /// A descriptor of the memory.
    pub fn fd(&self) -> OwnedFd {
        self.memory.fd().try_clone_to_owned().expect("descriptor")
    }

    /// The memory as the device maps it.
    pub fn mapped(&self) -> Arc<GuestMemory> {
        Arc::new(GuestMemory::map(&[(self.memory.region(), self.fd())]).expect("mapping"))
    }

    /// What a front end would tell the device.
    pub fn setup(&self) -> RingSetup {
        let [desc_user_addr, avail_user_addr, used_user_addr] = self.ring.user_addrs();
        let start = u32::from(self.ring.start());
        RingSetup {
            size: SIZE,
            desc_user_addr,
            avail_user_addr,
            used_user_addr,
            base: start << 16 | start,
            features: self.features,
            kick: None,
            call: None,
            err: None,
            enabled: true,
        }
    }
}
