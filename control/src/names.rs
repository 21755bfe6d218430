//! Names and addresses as people write them, checked once where they enter.
//!
//! A value of one of these types is well-formed; nothing further in checks it again. Each reads itself from JSON, TOML
//! and the command line by the same `FromStr`, and its error says what was given and what is possible.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes in the name of a plug or network.
const NAME_BYTES_MAX: usize = 63;
/// Bytes in a Linux interface's name (`IFNAMSIZ` without the terminating zero).
pub const IFNAME_BYTES_MAX: usize = 15;
/// Bytes of a value in Open vSwitch's `external_ids`; ours, it has no bound of its own.
const EXTERNAL_ID_BYTES_MAX: usize = 255;
/// Bytes in a UNIX socket's path (`sun_path` without the terminating zero).
pub const PATH_BYTES_MAX: usize = 107;

/// Why a text is not what it should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    /// Not a plug's or network's name.
    #[error(
        "{0:?} is not a name: 1 to 63 of A-Z a-z 0-9 _ . -, beginning with a letter or digit, without '..'"
    )]
    Name(String),
    /// Not an interface's name.
    #[error(
        "{0:?} is not an interface name: 1 to 15 printable ASCII characters without blank, '/', ':' or '%', not beginning with '-' or '.'"
    )]
    Interface(String),
    /// Not an identifier in somebody else's system.
    #[error("{0:?} is not an identifier: 1 to 255 bytes without control characters")]
    ExternalId(String),
    /// Not a station's address.
    #[error("{0:?} is not a unicast MAC address such as 52:54:00:12:34:56")]
    Mac(String),
    /// Neither an address nor a network.
    #[error("{0:?} is neither an IP address nor a network such as 192.0.2.0/24")]
    IpPrefix(String),
    /// Not a PCI device's address.
    #[error("{0:?} is not a PCI address such as 0000:03:00.1")]
    Pci(String),
    /// Not a kernel driver's name.
    #[error("{0:?} is not a driver's name: 1 to 63 of A-Z a-z 0-9 _ -")]
    Driver(String),
    /// Not a UUID.
    #[error("{0:?} is not a UUID such as dc065497-3c8d-4f44-8fb4-e1d33c16a536")]
    Uuid(String),
    /// Not a usable socket path.
    #[error("{path:?} is not a socket path: {why}")]
    Path {
        /// As given, shortened.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

/// A text for an error message: hostile input must not flood a log.
fn excerpt(text: &str) -> String {
    const CHARS_MAX: usize = 128;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

macro_rules! checked_text {
    ($(#[$meta:meta])* $type:ident, $check:path) => {
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        $(#[$meta])*
        #[serde(try_from = "String", into = "String")]
        pub struct $type(String);

        impl $type {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                $check(text)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                $check(&text)?;
                Ok(Self(text))
            }
        }

        impl From<$type> for String {
            fn from(checked: $type) -> Self {
                checked.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

mod device;
pub use self::device::{DriverName, PciAddress, Uuid};

checked_text! {
    /// Name of a plug or of a network.
    #[schema(value_type = String, pattern = "^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$", example = "vm1")]
    Name, check_name
}

checked_text! {
    /// Name of a Linux network interface, at most 15 bytes.
    #[schema(value_type = String, max_length = 15, example = "br0")]
    IfName, check_interface
}

checked_text! {
    /// Identifier of something in another system, as of a logical port in OVN; at most 255 bytes.
    #[schema(value_type = String, max_length = 255, example = "dc065497-3c8d-4f44-8fb4-e1d33c16a536")]
    ExternalId, check_external_id
}

checked_text! {
    /// Absolute path of a UNIX socket, at most 107 bytes.
    #[schema(value_type = String, max_length = 107, example = "/run/vhostd/vm1.sock")]
    SocketPath, check_path
}

impl SocketPath {
    /// As a path.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }
}

fn check_name(text: &str) -> Result<(), NameError> {
    let first_ok = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest_ok = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b));
    if first_ok && rest_ok && text.len() <= NAME_BYTES_MAX && !text.contains("..") {
        return Ok(());
    }
    Err(NameError::Name(excerpt(text)))
}

fn check_interface(text: &str) -> Result<(), NameError> {
    let first_ok = !text.starts_with(['-', '.']);
    // The kernel expands '%' (`dev_alloc_name`) and cuts aliases at ':'.
    let all_ok = text.bytes().all(|b| b.is_ascii_graphic() && !b"/:%".contains(&b));
    if first_ok && all_ok && (1..=IFNAME_BYTES_MAX).contains(&text.len()) {
        return Ok(());
    }
    Err(NameError::Interface(excerpt(text)))
}

fn check_external_id(text: &str) -> Result<(), NameError> {
    if (1..=EXTERNAL_ID_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(NameError::ExternalId(excerpt(text)))
}

fn check_path(text: &str) -> Result<(), NameError> {
    let why = if !text.starts_with('/') {
        "it must be absolute"
    } else if text.len() > PATH_BYTES_MAX {
        "it must be at most 107 bytes long (sun_path), use a shorter directory"
    } else if text.chars().any(char::is_control) {
        "it must not contain control characters"
    } else if text[1..].split('/').any(|part| matches!(part, "" | "." | "..")) {
        "every part of it must be a plain name, without '.', '..' or '//'"
    } else {
        return Ok(());
    };
    Err(NameError::Path { path: excerpt(text), why })
}

/// A station's Ethernet address: unicast, not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$", example = "52:54:00:12:34:56")]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let bad = || NameError::Mac(excerpt(text));
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && !p.starts_with('+')).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        // IEEE 802, 8.2.2: the lowest bit of the first octet marks a group address.
        if parts.next().is_some() || bytes == [0; 6] || bytes[0] & 1 == 1 {
            return Err(bad());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&mac_text(self.0))
    }
}

/// An IP address, or a network of them, whose host bits are not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IpPrefix {
    address: IpAddr,
    bits: u8,
}

impl IpPrefix {
    /// The address as given.
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// Length of the prefix, 0..=32 or 0..=128 bits.
    pub fn bits(self) -> u8 {
        self.bits
    }
}

impl From<IpAddr> for IpPrefix {
    fn from(address: IpAddr) -> Self {
        Self { address, bits: bits_of(address) }
    }
}

fn bits_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl FromStr for IpPrefix {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let bad = || NameError::IpPrefix(excerpt(text));
        let (address, bits) =
            text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let Some(bits) = bits else { return Ok(address.into()) };
        let digits = (1..=3).contains(&bits.len()) && bits.bytes().all(|b| b.is_ascii_digit());
        let bits = bits.parse().ok().filter(|bits| digits && *bits <= bits_of(address)).ok_or_else(bad)?;
        Ok(Self { address, bits })
    }
}

impl TryFrom<String> for IpPrefix {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<IpPrefix> for String {
    fn from(prefix: IpPrefix) -> Self {
        prefix.to_string()
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, bits } = self;
        if *bits == bits_of(*address) {
            return address.fmt(f);
        }
        f.pad(&format!("{address}/{bits}"))
    }
}

/// Six bytes as `52:54:00:12:34:56`; also for addresses that no station may have.
pub fn mac_text(bytes: [u8; 6]) -> String {
    bytes.map(|b| format!("{b:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_plain() {
        for good in ["a", "vm1", "0b1e-4f_x.y", &"x".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        let long = "x".repeat(64);
        let bad = [
            "",
            &long,
            "..",
            "a..b",
            "a/b",
            "-rf",
            ".x",
            "a\nb",
            "a b",
            "%d",
            "$(x)",
            "a;b",
            "v\u{43c}1",
            "a\0",
            "_a",
        ];
        for bad in bad {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn interface_names_are_what_the_kernel_takes_verbatim() {
        for good in ["br0", "tap-vm1", "eth0.100", &"x".repeat(15)] {
            assert!(good.parse::<IfName>().is_ok(), "{good}");
        }
        for bad in ["", "..", "a/b", "a b", "tap%d", "eth0:1", "-x", "\u{e9}th0", &"x".repeat(16)] {
            assert!(bad.parse::<IfName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn socket_paths_cannot_wander() {
        let just_fits = format!("/{}", "x".repeat(106));
        assert!(just_fits.parse::<SocketPath>().is_ok());
        let too_long = format!("/{}", "x".repeat(107));
        for bad in [
            "",
            "vm.sock",
            "./vm.sock",
            "/a/../b",
            "/a/./b",
            "/a//b",
            "/a/",
            "/",
            "/a\0b",
            "/a\nb",
            &too_long,
        ] {
            assert!(bad.parse::<SocketPath>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn addresses_are_unicast() {
        assert_eq!("52:54:00:AB:cd:0f".parse::<Mac>().unwrap().to_string(), "52:54:00:ab:cd:0f");
        let bad = [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:11",
            "525400abcd0f",
            "5:54:00:ab:cd:0f",
            "+5:54:00:ab:cd:0f",
            "ff:ff:ff:ff:ff:ff",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "gg:54:00:ab:cd:0f",
        ];
        for bad in bad {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn addresses_and_networks_are_written_as_usual() {
        for text in ["192.0.2.7", "192.0.2.0/24", "0.0.0.0/0", "2001:db8::1", "2001:db8::/32"] {
            assert_eq!(text.parse::<IpPrefix>().unwrap().to_string(), text);
        }
        assert_eq!("192.0.2.7/32".parse::<IpPrefix>().unwrap(), "192.0.2.7".parse().unwrap());
        for bad in [
            "",
            "192.0.2",
            "192.0.2.7/33",
            "2001:db8::1/129",
            "192.0.2.7/",
            "192.0.2.7/+1",
            "192.0.2.7/0001",
            "a/8",
        ] {
            assert!(bad.parse::<IpPrefix>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn messages_quote_at_most_an_excerpt() {
        let message = "y".repeat(60_000).parse::<Name>().unwrap_err().to_string();
        assert!(message.len() < 400, "{}", message.len());
    }
}
