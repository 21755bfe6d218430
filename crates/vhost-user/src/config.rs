//! `struct virtio_net_config` as bytes (virtio 1.2, 5.1.4), little-endian whatever the host is.

use crate::device::NetConfig;
use crate::message::CONFIG_SPACE_LEN;

/// virtio 1.2, 5.1.4: speed and duplex "unknown".
const SPEED_UNKNOWN: u32 = 0xffff_ffff;
const DUPLEX_UNKNOWN: u8 = 0xff;

/// The whole space; what the structure does not have is zero.
pub(crate) fn config_space(config: &NetConfig) -> [u8; CONFIG_SPACE_LEN] {
    let mut space = [0; CONFIG_SPACE_LEN];
    space[0..6].copy_from_slice(&config.mac.unwrap_or_default());
    space[6..8].copy_from_slice(&config.status.to_le_bytes());
    space[8..10].copy_from_slice(&config.max_queue_pairs.to_le_bytes());
    space[10..12].copy_from_slice(&config.mtu.unwrap_or(0).to_le_bytes());
    space[12..16].copy_from_slice(&SPEED_UNKNOWN.to_le_bytes());
    space[16] = DUPLEX_UNKNOWN;
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_virtio_puts_them() {
        let config = NetConfig {
            mac: Some([0x52, 0x54, 0, 1, 2, 3]),
            status: 1,
            max_queue_pairs: 0x0102,
            mtu: Some(9000),
        };
        let space = config_space(&config);
        let expected = [0x52, 0x54, 0, 1, 2, 3, 1, 0, 2, 1, 0x28, 0x23, 0xff, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(space[..17], expected);
        assert!(space[17..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn unknown_mac_and_mtu_are_zero() {
        let space = config_space(&NetConfig::default());
        assert!(space[..12].iter().all(|byte| *byte == 0));
    }
}
