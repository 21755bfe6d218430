//! Representors: of each virtual function of a card with an embedded switch, the switch's port that the host sees
//! (Documentation/networking/representors.rst). What the guest sends through its virtual function comes out of it, and the
//! other way round.
//!
//! Nothing in sysfs leads from a virtual function to its representor but names: the switch's, which they share, and the port's,
//! which says the numbers of both functions.

use super::tree::Entry;
use super::{Function, Pci, PciAddress, PciError};

/// The representor of a virtual function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Representor {
    /// Its name, at present.
    pub name: String,
    /// The physical function.
    pub physical: PciAddress,
    /// The virtual function's number.
    pub number: u32,
}

impl Pci {
    /// The representor of a virtual function.
    ///
    /// # Errors
    /// [`PciError::NotVirtual`], [`PciError::NoSwitch`], [`PciError::NoRepresentor`], [`PciError::Representors`]; as for
    /// [`device`](Self::device).
    pub fn representor(&self, address: PciAddress) -> Result<Representor, PciError> {
        let Function::Virtual { of: physical, number } = self.device(address)?.function else {
            return Err(PciError::NotVirtual { address });
        };
        let class = self.tree.dir("class/net".into());
        let no_switch = PciError::NoSwitch { address: physical, of: address };
        let Some(switch) = switch_of(&class, &self.device(physical)?.interfaces)? else {
            return Err(no_switch);
        };
        let mut names = Vec::new();
        for name in class.names("")? {
            let link = class.dir(&name);
            if link.text("phys_switch_id")?.as_deref() == Some(switch.as_str())
                && let Some(port) = link.text("phys_port_name")?
                && is_port_of(&port, physical.function, number)
            {
                names.push(name);
            }
        }
        match (names.pop(), names.is_empty()) {
            (Some(name), true) => Ok(Representor { name, physical, number }),
            (None, _) => Err(PciError::NoRepresentor { address, number, switch }),
            (Some(last), false) => {
                names.push(last);
                Err(PciError::Representors { address, names })
            }
        }
    }
}

/// The switch that the physical function's uplink (`p0`) is in; where no interface is called so, the first that is in one.
fn switch_of(class: &Entry, interfaces: &[String]) -> Result<Option<String>, PciError> {
    let mut first = None;
    for name in interfaces {
        let link = class.dir(name);
        let Some(switch) = link.text("phys_switch_id")?.filter(|id| !id.is_empty()) else { continue };
        let port = link.text("phys_port_name")?;
        if port.is_some_and(|port| port.strip_prefix('p').is_some_and(is_number)) {
            return Ok(Some(switch));
        }
        first.get_or_insert(switch);
    }
    Ok(first)
}

/// Whether a port of that name is the one of this virtual function: `pf0vf3`, `vf3` or, of older drivers, `3`.
fn is_port_of(port: &str, function: u8, number: u32) -> bool {
    if is_number(port) {
        return port.parse() == Ok(number);
    }
    let port = port.to_ascii_lowercase();
    let physical = number_after(&port, "pf");
    number_after(&port, "vf") == Some(number) && physical.is_none_or(|found| found == u32::from(function))
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The number behind the first `word` that has one.
fn number_after(text: &str, word: &str) -> Option<u32> {
    text.match_indices(word).find_map(|(at, _)| {
        let rest = &text[at + word.len()..];
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest[..end].parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_known_by_their_names() {
        for (port, function, number, is) in [
            ("pf0vf3", 0, 3, true),
            ("pf1vf3", 0, 3, false),
            ("PF1VF3", 1, 3, true),
            ("c0pf0vf3", 0, 3, true),
            ("vf3", 7, 3, true),
            ("3", 7, 3, true),
            ("vf30", 0, 3, false),
            ("p3", 0, 3, false),
            ("pf0", 0, 0, false),
            ("pf0sf3", 0, 3, false),
            ("", 0, 0, false),
            ("vf", 0, 0, false),
            ("99999999999999", 0, 3, false),
            ("vf99999999999999", 0, 3, false),
        ] {
            assert_eq!(is_port_of(port, function, number), is, "{port}");
        }
    }
}
