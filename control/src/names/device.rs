//! Names of devices and of what drives them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NAME_BYTES_MAX, NameError, excerpt};

checked_text! {
    /// Name of a kernel driver.
    #[schema(value_type = String, pattern = "^[A-Za-z0-9_-]{1,63}$", example = "vfio-pci")]
    DriverName, check_driver
}

fn check_driver(text: &str) -> Result<(), NameError> {
    let all_ok = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    if all_ok && (1..=NAME_BYTES_MAX).contains(&text.len()) {
        return Ok(());
    }
    Err(NameError::Driver(excerpt(text)))
}

/// A value whose only form outside is its text.
macro_rules! as_text {
    ($type:ident) => {
        impl TryFrom<String> for $type {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}

/// Where a PCI device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, pattern = "^[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[01][0-9A-Fa-f]\\.[0-7]$", example = "0000:03:00.1")]
pub struct PciAddress(pub hostnet::PciAddress);

as_text!(PciAddress);

impl FromStr for PciAddress {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        text.parse().map(Self).map_err(|_| NameError::Pci(excerpt(text)))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.to_string())
    }
}

/// A UUID, in any of its forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(value_type = String, example = "dc065497-3c8d-4f44-8fb4-e1d33c16a536")]
pub struct Uuid(pub [u8; 16]);

as_text!(Uuid);

impl FromStr for Uuid {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let uuid = uuid::Uuid::try_parse(text).map_err(|_| NameError::Uuid(excerpt(text)))?;
        Ok(Self(uuid.into_bytes()))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&uuid::Uuid::from_bytes(self.0).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices_are_read_and_written_as_one() {
        assert_eq!("0000:AB:1C.7".parse::<PciAddress>().unwrap().to_string(), "0000:ab:1c.7");
        assert!("ab:1c.7".parse::<PciAddress>().is_err());
        let uuid = "dc065497-3c8d-4f44-8fb4-e1d33c16a536";
        assert_eq!(uuid.replace('-', "").parse::<Uuid>().unwrap().to_string(), uuid);
        assert!(uuid[1..].parse::<Uuid>().is_err());
        for good in ["vfio-pci", "uio_pci_generic", "mlx5_core"] {
            assert!(good.parse::<DriverName>().is_ok(), "{good}");
        }
        for bad in ["", "..", "a/b", "igb vf", "igb.x", &"x".repeat(64)] {
            assert!(bad.parse::<DriverName>().is_err(), "{bad:?}");
        }
    }
}
