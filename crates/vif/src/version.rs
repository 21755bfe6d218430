//! Which versions of a class can be read with ours.

use std::fmt;

/// The version of a class as this crate knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Raised by changes that older readers cannot read.
    pub major: u64,
    /// Raised by added fields.
    pub minor: u64,
}

impl Version {
    /// Whether an object that its sender labels `label` can be read with this version: the same major, and no newer.
    /// Missing parts count as 0, and a third part other than 0 is newer than none. `None` if `label` is no version.
    pub(crate) fn reads(self, label: &str) -> Option<bool> {
        let parts = label.split('.').map(number).collect::<Option<Vec<u64>>>()?;
        let part = |index: usize| parts.get(index).copied().unwrap_or(0);
        let is_patched = parts.iter().skip(2).any(|&part| part != 0);
        Some(part(0) == self.major && (part(1), is_patched) <= (self.minor, false))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A part of a version. One that does not fit is as good as the largest: newer than any of ours.
fn number(digits: &str) -> Option<u64> {
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: Version = Version { major: 1, minor: 1 };

    #[test]
    fn reads_its_own_and_older_ones_of_its_major() {
        for label in ["1.1", "1.0", "1", "01.00", "1.1.0", "1.0.9", "1.1.0.0"] {
            assert_eq!(OURS.reads(label), Some(true), "{label}");
        }
    }

    #[test]
    fn does_not_read_newer_ones_and_other_majors() {
        for label in
            ["1.2", "1.10", "1.1.5", "1.1.0.1", "0.9", "0.1", "2.0", "1.99999999999999999999999", "0"]
        {
            assert_eq!(OURS.reads(label), Some(false), "{label}");
        }
    }

    #[test]
    fn knows_what_is_no_version() {
        for label in
            ["", "abc", "1.", ".1", "1..0", "-1.0", "+1.0", "1.0a1", "v1.0", " 1.0", "1!1.0", "1.0\n", "١.٠"]
        {
            assert_eq!(OURS.reads(label), None, "{label}");
        }
    }
}
