//! A model with the real device beside it, in shared memory, and what is compared.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::EventfdFlags;
use vring::driver::DriverMemory;
use vring::{
    BURST_MAX, Burst, ChainFault, Enqueued, Frames, GuestMemory, RegionSpec, RingFault, RingSetup, RxRing,
    TxRing,
};

use super::{Model, Region};

/// The model's image in shared memory, for a device.
pub struct Rig {
    pub memory: Arc<DriverMemory>,
    pub mapped: Arc<GuestMemory>,
    pub model: Model,
}

impl Rig {
    pub fn new(model: Model) -> Self {
        let memory = DriverMemory::new(model.image.len()).unwrap();
        let spec = |r: &Region| RegionSpec { guest_addr: r.guest, ..memory.region_of(r.offset, r.len) };
        let fd = || memory.fd().try_clone_to_owned().unwrap();
        let table: Vec<_> = model.regions.iter().map(|r| (spec(r), fd())).collect();
        let mapped = Arc::new(GuestMemory::map(&table).unwrap());
        let rig = Self { memory, mapped, model };
        rig.load();
        rig
    }

    pub fn setup(&self, call: Option<OwnedFd>) -> RingSetup {
        let user_addr = self.memory.region().user_addr;
        let [desc_user_addr, avail_user_addr, used_user_addr] =
            self.model.ring.map(|part| user_addr + part as u64);
        RingSetup {
            size: self.model.size,
            desc_user_addr,
            avail_user_addr,
            used_user_addr,
            base: self.model.next.into(),
            features: self.model.features,
            kick: None,
            call,
            err: None,
            enabled: true,
        }
    }

    /// The device's memory as it is.
    pub fn image(&self) -> Vec<u8> {
        let mut image = vec![0; self.model.image.len()];
        self.memory.read(0, &mut image);
        image
    }

    /// The device's memory is what the model says, to the last byte.
    pub fn check(&self) {
        self.check_outside(&[]);
    }

    /// The same, except in these ranges.
    pub fn check_outside(&self, ranges: &[Range<usize>]) {
        let image = self.image();
        if image == self.model.image {
            return;
        }
        let wrong = (0..image.len())
            .filter(|i| image[*i] != self.model.image[*i])
            .find(|i| !ranges.iter().any(|r| r.contains(i)));
        if let Some(i) = wrong {
            panic!("byte {i:#x} is {:#x}, the model says {:#x}", image[i], self.model.image[i]);
        }
    }
}

/// A model with the real device beside it.
pub trait Beside {
    /// The driver's changes to the image become visible.
    fn load(&self);
    fn start_tx(&mut self) -> TxRing;
    fn start_rx(&mut self) -> RxRing;
    /// Takes all that is available; checks every chain and the memory. An error is where the model has it, and ends it.
    fn send(&mut self, ring: &mut TxRing, frames: &mut Frames) -> Result<Sent, RingFault>;
    /// Delivers a burst of frames (12-byte header in front of each); checks the outcome and the memory. `None` if buffers
    /// lie over each other, or over the ring: then anything may have become of it.
    fn receive(
        &mut self,
        ring: &mut RxRing,
        burst: &Burst<'_>,
        frames: &[Vec<u8>],
    ) -> Option<Result<Enqueued, RingFault>>;
}

impl Beside for Rig {
    fn load(&self) {
        self.memory.write(0, &self.model.image);
    }

    fn start_tx(&mut self) -> TxRing {
        self.model.start();
        TxRing::start(self.setup(Some(eventfd())), &self.mapped).unwrap()
    }

    fn start_rx(&mut self) -> RxRing {
        self.model.start();
        RxRing::start(self.setup(Some(eventfd())), &self.mapped).unwrap()
    }

    fn send(&mut self, ring: &mut TxRing, frames: &mut Frames) -> Result<Sent, RingFault> {
        let mut sent = Sent::default();
        loop {
            let expected = self.model.available(u16::try_from(BURST_MAX).unwrap());
            let burst = match ring.dequeue(frames) {
                Ok(burst) => burst,
                Err(fault) => {
                    let first = expected.and_then(|n| {
                        let burst = u16::try_from(BURST_MAX).unwrap();
                        (0..n.min(burst)).try_for_each(|step| self.model.head(step).map(|_| ()))
                    });
                    assert_eq!(Err(fault), first);
                    self.check();
                    return Err(fault);
                }
            };
            let available = usize::from(expected.expect("the model found the ring broken"));
            let count = burst.burst.len();
            if available == 0 {
                assert_eq!(count, 0);
                return Ok(sent);
            }
            assert!(count != 0 && count <= available.min(BURST_MAX), "{count} of {available}");
            for i in 0..count {
                let head = self.model.head(u16::try_from(i).unwrap()).expect("the model found a head wrong");
                let expected = self.model.frame(head);
                assert_eq!(frame_of(&burst.burst, i), expected, "chain {head}");
                match expected {
                    Ok((header, frame)) => sent.frames.push([header, frame].concat()),
                    Err(fault) => sent.faults.push(fault),
                }
            }
            let call = burst.complete();
            assert_eq!(call, self.model.complete(u16::try_from(count).unwrap()), "call after {count}");
            assert_eq!(ring.base(), u32::from(self.model.next));
            self.check();
        }
    }

    fn receive(
        &mut self,
        ring: &mut RxRing,
        burst: &Burst<'_>,
        frames: &[Vec<u8>],
    ) -> Option<Result<Enqueued, RingFault>> {
        let placed = self.model.deliver(frames);
        let result = ring.enqueue(burst, u64::MAX);
        if placed.tangled {
            return None;
        }
        assert_eq!(result, placed.result);
        match &result {
            Ok(_) => {
                self.check();
                assert_eq!(ring.base(), u32::from(self.model.next));
            }
            Err(_) => {
                // Buffers and used elements may have been written, but nothing was said about them.
                let elements = self.model.ring[2] + 4;
                let mut written = placed.written;
                written.push(elements..elements + 8 * usize::from(self.model.size));
                self.check_outside(&written);
            }
        }
        Some(result)
    }
}

/// What was taken from a TX ring.
#[derive(Debug, Default)]
pub struct Sent {
    pub frames: Vec<Vec<u8>>,
    pub faults: Vec<ChainFault>,
}

/// Frame `index` of a burst as [`Model::frame`] says it.
pub fn frame_of(burst: &Burst<'_>, index: usize) -> Result<(Vec<u8>, Vec<u8>), ChainFault> {
    match burst.fault(index) {
        Some(fault) => Err(fault),
        None => {
            let mut frame = Vec::new();
            burst.gather(index, &mut frame);
            assert_eq!(frame.len(), burst.frame_len(index) as usize);
            assert!(frame.starts_with(burst.prefix(index)));
            Ok((burst.header(index).to_vec(), frame))
        }
    }
}

pub fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}
