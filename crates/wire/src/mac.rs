//! MAC addresses (IEEE 802, 48 bits).

use core::fmt;
use core::str::FromStr;

/// A 48-bit MAC address. Ordered as its bytes are on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Mac([u8; 6]);

impl Mac {
    /// `ff:ff:ff:ff:ff:ff`
    pub const BROADCAST: Mac = Mac([0xff; 6]);
    /// `00:00:00:00:00:00`, which no station has.
    pub const ZERO: Mac = Mac([0; 6]);

    /// The address with these octets, in wire order.
    #[inline]
    pub const fn new(octets: [u8; 6]) -> Mac {
        Mac(octets)
    }

    /// The octets, in wire order.
    #[inline]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// The address as a number below 2⁴⁸ that reads like the address: `01:02:03:04:05:06` is
    /// `0x0102_0304_0506`.
    #[inline]
    pub const fn to_u64(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_be_bytes([0, 0, a, b, c, d, e, f])
    }

    /// The inverse of [`Mac::to_u64`]. The upper 16 bits are ignored.
    #[inline]
    pub const fn from_u64(value: u64) -> Mac {
        let [_, _, a, b, c, d, e, f] = value.to_be_bytes();
        Mac([a, b, c, d, e, f])
    }

    /// A locally administered unicast address out of 48 bits that the caller draws (IEEE 802, 8.4).
    pub const fn random_local(bits: u64) -> Mac {
        let mut mac = Mac::from_u64(bits);
        mac.0[0] = (mac.0[0] & !0x01) | 0x02;
        mac
    }

    /// Whether the group bit is set: multicast, broadcast included.
    #[inline]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether this is `ff:ff:ff:ff:ff:ff`.
    #[inline]
    pub const fn is_broadcast(self) -> bool {
        self.to_u64() == Mac::BROADCAST.to_u64()
    }

    /// Whether this is `00:00:00:00:00:00`.
    #[inline]
    pub const fn is_zero(self) -> bool {
        self.to_u64() == 0
    }

    /// Whether this is one of `01:80:c2:00:00:00` to `…:0f`, which a bridge does not forward
    /// (IEEE 802.1Q, 8.6.3: STP, pause, LACP, LLDP and their like).
    #[inline]
    pub const fn is_link_local_group(self) -> bool {
        self.to_u64() & !0xf == 0x0180_c200_0000
    }
}

impl From<[u8; 6]> for Mac {
    #[inline]
    fn from(octets: [u8; 6]) -> Mac {
        Mac(octets)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mac({self})")
    }
}

/// Why a text is not a MAC address. Positions count characters from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MacError {
    /// Not 17 bytes long, but this many.
    Length(usize),
    /// No separator, or another one than the first, at this position.
    Separator(usize),
    /// No hexadecimal digit at this position.
    Digit(usize),
}

impl fmt::Display for MacError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MacError::Length(length) => write!(f, "it has {length} characters instead of 17")?,
            MacError::Separator(at) => write!(f, "character {at} is not ':', or '-' throughout")?,
            MacError::Digit(at) => write!(f, "character {at} is not a hexadecimal digit")?,
        }
        f.write_str("; write six pairs of digits such as 52:54:00:12:34:56")
    }
}

impl core::error::Error for MacError {}

impl FromStr for Mac {
    type Err = MacError;

    /// Reads `aa:bb:cc:dd:ee:ff` or `aa-bb-cc-dd-ee-ff`, in any case.
    fn from_str(text: &str) -> Result<Mac, MacError> {
        let text: &[u8; 17] = text.as_bytes().try_into().map_err(|_| MacError::Length(text.len()))?;
        let separator = if text[2] == b'-' { b'-' } else { b':' };
        let mut octets = [0; 6];
        for (pair, octet) in octets.iter_mut().enumerate() {
            let at = pair * 3;
            if at > 0 && text[at - 1] != separator {
                return Err(MacError::Separator(at - 1));
            }
            *octet = hex(text, at)? << 4 | hex(text, at + 1)?;
        }
        Ok(Mac(octets))
    }
}

fn hex(text: &[u8; 17], at: usize) -> Result<u8, MacError> {
    match text[at] {
        digit @ b'0'..=b'9' => Ok(digit - b'0'),
        digit @ b'a'..=b'f' => Ok(digit - b'a' + 10),
        digit @ b'A'..=b'F' => Ok(digit - b'A' + 10),
        _ => Err(MacError::Digit(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn kinds_of_address() {
        let mac = |text: &str| text.parse::<Mac>().unwrap();
        assert!(Mac::BROADCAST.is_broadcast() && Mac::BROADCAST.is_multicast());
        assert!(Mac::ZERO.is_zero() && !Mac::ZERO.is_multicast());
        assert!(mac("33:33:00:00:00:01").is_multicast() && !mac("33:33:00:00:00:01").is_broadcast());
        assert!(!mac("52:54:00:00:00:01").is_multicast());
        assert!(mac("01:80:c2:00:00:00").is_link_local_group());
        assert!(mac("01:80:c2:00:00:0f").is_link_local_group());
        assert!(!mac("01:80:c2:00:00:10").is_link_local_group());
        assert!(!mac("00:80:c2:00:00:00").is_link_local_group());
    }

    #[test]
    fn reads_both_separators_in_any_case() {
        let expected = Mac::new([0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
        for text in ["52:54:00:ab:cd:ef", "52-54-00-AB-CD-EF", "52:54:00:aB:Cd:EF"] {
            assert_eq!(text.parse(), Ok(expected));
        }
        assert_eq!(expected.to_string(), "52:54:00:ab:cd:ef");
        assert_eq!(expected.to_u64(), 0x5254_00ab_cdef);
    }

    #[test]
    fn refuses_with_the_place() {
        let error = |text: &str| text.parse::<Mac>().unwrap_err();
        assert_eq!(error(""), MacError::Length(0));
        assert_eq!(error("5254.00ab.cdef"), MacError::Length(14));
        assert_eq!(error("52:54-00:ab:cd:ef"), MacError::Separator(5));
        assert_eq!(error("52-54-00-ab-cd:ef"), MacError::Separator(14));
        assert_eq!(error("52.54.00.ab.cd.ef"), MacError::Separator(2));
        assert_eq!(error("52:54:00:ab:cd:eg"), MacError::Digit(16));
        assert_eq!(error("+2:54:00:ab:cd:ef"), MacError::Digit(0));
        assert_eq!(error("52:54:00:ab:cd:é"), MacError::Digit(15));
        assert!(error("x").to_string().contains("52:54:00:12:34:56"));
    }

    proptest! {
        #[test]
        fn number_and_text_name_the_same_address(octets: [u8; 6]) {
            let mac = Mac::new(octets);
            prop_assert_eq!(Mac::from_u64(mac.to_u64() | 0xffff << 48), mac);
            prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            if let Ok(mac) = text.parse::<Mac>() {
                prop_assert_eq!(mac.to_string(), text.to_lowercase().replace('-', ":"));
            }
        }

        #[test]
        fn a_random_address_is_local_and_unicast(bits: u64) {
            let mac = Mac::random_local(bits);
            prop_assert_eq!(mac.octets()[0] & 3, 2);
        }
    }
}
