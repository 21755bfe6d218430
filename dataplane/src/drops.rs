//! Why a frame was given up, and whose fault it was. Every frame that enters leaves, or counts one of these.

/// Whose fault a drop is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The guest behind the port the drop is counted on.
    Guest,
    /// This host: overload, TAP or uplink.
    Host,
    /// A rule somebody set.
    Policy,
    /// Nobody: the network has no such destination.
    Network,
}

impl Who {
    /// Stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Host => "host",
            Self::Policy => "policy",
            Self::Network => "network",
        }
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident $name:literal $who:ident $advice:literal;)+) => {
        /// A reason to drop a frame.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])+ $variant,)+ }

        impl DropReason {
            /// All reasons, in a fixed order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// Stable name for counters and JSON.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// Whose fault it is.
            pub fn who(self) -> Who {
                match self { $(Self::$variant => Who::$who,)+ }
            }

            /// One sentence for whoever has to mend it.
            pub fn advice(self) -> &'static str {
                match self { $(Self::$variant => $advice,)+ }
            }
        }
    };
}

reasons! {
    /// The guest gave no RX buffers in time.
    GuestRxRingFull "guest_rx_ring_full" Guest "The guest does not take frames fast enough: more vCPU time or a larger rx_queue_size.";
    /// No RX ring runs or is enabled.
    GuestRxRingDisabled "guest_rx_ring_disabled" Guest "The guest's driver is not up (booting, reset, link down inside the guest).";
    /// One buffer is too small and mergeable buffers were not negotiated.
    GuestBufferTooSmall "guest_buffer_too_small" Guest "Turn on mrg_rxbuf, or post buffers of MTU + 26 bytes and more.";
    /// A descriptor chain is malformed.
    GuestDescriptorInvalid "guest_descriptor_invalid" Guest "The guest's driver puts malformed descriptors into its ring.";
    /// A buffer lies outside of guest memory.
    GuestUnmappedAddress "guest_unmapped_address" Guest "The guest's driver points outside of the memory it shares.";
    /// Shorter than an Ethernet header.
    Runt "runt" Guest "The guest sends frames without an Ethernet header.";
    /// Offload fields contradict the frame or the negotiated features.
    BadOffload "bad_offload" Guest "The guest's driver asks for offloads that it did not negotiate or that do not fit the frame.";
    /// Longer than the MTU of the port it came from or goes to.
    MtuExceeded "mtu_exceeded" Guest "The guest's MTU is larger than the network's: set both alike.";
    /// Its TX ring is disabled.
    GuestTxRingDisabled "guest_tx_ring_disabled" Guest "The front end disabled this queue; frames already in it are drained.";
    /// Source address is a group address or zero.
    BadSource "bad_source" Guest "The guest sends from an address that no station can have.";
    /// A guest with a policy sent from an Ethernet address, or claimed one, that is not its own.
    SpoofedMac "spoofed_mac" Policy "The guest uses another Ethernet address than its plug says: change either, or plug without anti-spoofing.";
    /// A guest with a policy claimed an IP address that is not its own.
    SpoofedAddress "spoofed_address" Policy "The guest uses an IP address that its plug does not list: add it (--address), or plug without anti-spoofing.";
    /// Destined to 01:80:c2:00:00:0x, which no bridge forwards (IEEE 802.1Q, 8.6.3).
    LinkLocal "link_local" Policy "Link-local group addresses (STP, LLDP, LACP) end at the port.";
    /// Destination is behind the port it came from.
    Hairpin "hairpin" Network "The destination is behind the sender's own port; nothing to do.";
    /// Nobody else is in the network.
    NoDestination "no_destination" Network "No other port in this network: plug an uplink or a second guest.";
    /// The TAP's queue in the kernel is full.
    TapQueueFull "tap_queue_full" Host "The host does not take frames from the TAP fast enough.";
    /// The TAP refused the frame (down, or an error of the kernel).
    TapError "tap_error" Host "Is the TAP up? `ip link show` tells.";
    /// A receiver needs this frame segmented or its checksum completed, and that failed.
    GsoUnsupported "gso_unsupported" Guest "The receiver did not negotiate the offload and the frame cannot be segmented in software.";
    /// The back end that we drive gave no TX buffers back in time.
    PeerRingFull "peer_ring_full" Host "The back end that the port is attached to does not take frames fast enough.";
    /// No back end is attached, or its session is being started anew.
    PeerDown "peer_down" Host "No back end is attached: `vhostd show` tells what the port waits for.";
    /// A merged frame of which buffers are missing.
    PeerFrameTorn "peer_frame_torn" Host "The back end publishes merged frames in parts: a defect there.";
    /// The port is being removed.
    PortDraining "port_draining" Policy "The port was unplugged while the frame was on its way.";
}
