//! The bare loop as a back end: two ports, one copy a frame, nothing checked (see [`vring::limit`]). What it reaches
//! with the same front ends is the most that one copy a frame allows on this machine.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use vhost_user::{Device, NetConfig, Offer, Peer, Refusal};
use vring::limit::LimitRing;
use vring::{GuestMemory, RingError, RingSetup, features};

/// RX and TX ring of one port.
#[derive(Clone, Default)]
pub struct LimitPort {
    rings: Arc<[Mutex<Option<LimitRing>>; 2]>,
}

impl LimitPort {
    fn slot(&self, index: u16) -> std::sync::MutexGuard<'_, Option<LimitRing>> {
        self.rings[usize::from(index % 2)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves a burst from this port's guest to that of `to`.
    pub fn forward(&self, to: &Self) {
        let (mut tx, mut rx) = (self.slot(1), to.slot(0));
        if let (Some(tx), Some(rx)) = (&mut *tx, &mut *rx) {
            tx.forward(rx);
        }
    }
}

impl Device for LimitPort {
    fn offer(&self) -> Offer {
        Offer {
            features: 1 << features::VERSION_1
                | 1 << features::MRG_RXBUF
                | 1 << features::IN_ORDER
                | 1 << features::RING_PACKED
                | 1 << features::PROTOCOL_FEATURES,
            // MQ, REPLY_ACK.
            protocol_features: 1 << 0 | 1 << 3,
            queue_pairs: 1,
        }
    }

    fn config(&self) -> NetConfig {
        NetConfig::default()
    }

    fn connected(&mut self, _: Peer) {}

    fn set_features(&mut self, _: u64) {}

    fn set_mtu(&mut self, _: u64) -> Result<(), Refusal> {
        Ok(())
    }

    fn send_rarp(&mut self, _: [u8; 6]) -> Result<(), Refusal> {
        Ok(())
    }

    fn start_ring(
        &mut self,
        index: u16,
        setup: RingSetup,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), RingError> {
        *self.slot(index) = Some(LimitRing::start(&setup, memory)?);
        Ok(())
    }

    fn stop_ring(&mut self, index: u16) -> Option<u32> {
        self.slot(index).take().map(|ring| ring.base())
    }

    fn enable_ring(&mut self, _: u16, _: bool) {}

    fn set_call(&mut self, _: u16, _: Option<OwnedFd>) {}

    fn set_err(&mut self, _: u16, _: Option<OwnedFd>) {}

    fn set_memory(&mut self, _: &Arc<GuestMemory>) {}

    fn disconnected(&mut self) {
        for index in 0..2 {
            self.stop_ring(index);
        }
    }
}
