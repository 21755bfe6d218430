//! What a physical function's driver holds about its virtual functions (SR-IOV): their addresses and VLANs, which a guest that
//! has one cannot change, and what it may do. It is read and set through the physical function's interface (rtnetlink,
//! `IFLA_VFINFO_LIST`).

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkMessage, LinkVfInfo, VfInfo, VfInfoMac, VfInfoSpoofCheck, VfInfoTrust,
    VfInfoVlan,
};
use tracing::info;

use crate::error::EINVAL;
use crate::link::LinkState;
use crate::netlink::Message;
use crate::{Error, HostNet};

/// Some drivers have no address until they are given one, and refuse to take that back. This is nobody's.
const NO_ADDRESS: [u8; 6] = [0x02, 0, 0, 0, 0, 0];

/// A virtual function as its physical one holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionState {
    /// Its address; all zero before it was given one.
    pub address: [u8; 6],
    /// The VLAN that its frames are put into, which it does not see; 0 for none.
    pub vlan: u16,
    /// Their priority there, 0..=7.
    pub priority: u8,
    /// Whether frames from another address than its own are dropped. Read as off where the driver does not tell; when set,
    /// `None` leaves it as it is.
    pub spoof_check: Option<bool>,
    /// Whether it may have another address, and frames for all; the same holds for it.
    pub trust: Option<bool>,
}

impl HostNet {
    /// How virtual function `number` of the interface is held.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NoFunction`]; what the kernel refuses.
    pub async fn virtual_function(&self, physical: &str, number: u32) -> Result<FunctionState, Error> {
        let masks = vec![LinkExtentMask::Vf, LinkExtentMask::SkipStats];
        let request = self.links().get().match_name(physical).set_filter_mask(AddressFamily::Unspec, masks);
        let answer = self.first("list virtual functions of", physical, request).await?;
        let missing = || Error::Missing { name: physical.to_owned() };
        let absent = || Error::NoFunction { name: physical.to_owned(), number };
        state_of(&answer.ok_or_else(missing)?, number).ok_or_else(absent)
    }

    /// Has it held so. The physical function's interface is set up, if it is not: most drivers have no answer before.
    ///
    /// # Errors
    /// As for [`virtual_function`](Self::virtual_function).
    pub async fn set_virtual_function(
        &self,
        physical: &str,
        number: u32,
        wanted: &FunctionState,
    ) -> Result<(), Error> {
        let now = self.virtual_function(physical, number).await?;
        let left = FunctionState { spoof_check: None, trust: None, ..now };
        if left == *wanted {
            return Ok(());
        }
        let link = self.link(physical).await?.ok_or_else(|| Error::Missing { name: physical.to_owned() })?;
        self.set_up(&link).await?;
        if now.address != wanted.address {
            let set = |address: [u8; 6]| VfInfo::Mac(VfInfoMac::new(number, &address));
            let doing = "set the address of a virtual function of";
            match self.change_function(doing, &link, set(wanted.address)).await {
                Err(Error::Kernel { source, .. })
                    if source.raw_os_error() == Some(EINVAL) && wanted.address == [0; 6] =>
                {
                    self.change_function(doing, &link, set(NO_ADDRESS)).await?;
                }
                done => done?,
            }
        }
        if (now.vlan, now.priority) != (wanted.vlan, wanted.priority) {
            let vlan = VfInfoVlan::new(number, wanted.vlan.into(), wanted.priority.into());
            self.change_function("set the VLAN of a virtual function of", &link, VfInfo::Vlan(vlan)).await?;
        }
        // Also where they read as wanted: a driver that does not do it says so, instead of being believed.
        if let Some(on) = wanted.spoof_check {
            let check = VfInfo::SpoofCheck(VfInfoSpoofCheck::new(number, on));
            self.change_function("set the spoof check of a virtual function of", &link, check).await?;
        }
        if let Some(on) = wanted.trust {
            let trust = VfInfo::Trust(VfInfoTrust::new(number, on));
            self.change_function("set the trust in a virtual function of", &link, trust).await?;
        }
        info!(physical, number, ?wanted, "virtual function set");
        Ok(())
    }

    /// Has it held as it was. A setting that its driver does not have was none.
    ///
    /// # Errors
    /// As for [`virtual_function`](Self::virtual_function).
    pub async fn restore_virtual_function(
        &self,
        physical: &str,
        number: u32,
        before: &FunctionState,
    ) -> Result<(), Error> {
        let all_drivers_have = FunctionState { spoof_check: None, trust: None, ..*before };
        self.set_virtual_function(physical, number, &all_drivers_have).await?;
        match self.set_virtual_function(physical, number, before).await {
            Err(Error::Unsupported { .. }) => Ok(()),
            done => done,
        }
    }

    async fn change_function(
        &self,
        doing: &'static str,
        physical: &LinkState,
        what: VfInfo,
    ) -> Result<(), Error> {
        let list = LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![what])]);
        let edit = |message: Message| message.append_extra_attribute(list);
        self.change(doing, physical, edit).await
    }
}

/// Attributes are told apart by the number that each repeats.
fn state_of(link: &LinkMessage, number: u32) -> Option<FunctionState> {
    let mut found = None;
    for attribute in &link.attributes {
        let LinkAttribute::VfInfoList(functions) = attribute else { continue };
        for info in functions.iter().flat_map(|function| &function.0) {
            match info {
                VfInfo::Mac(mac) if mac.vf_id == number => {
                    let state = found.get_or_insert_with(FunctionState::default);
                    state.address.copy_from_slice(&mac.mac[..6]);
                }
                VfInfo::Vlan(vlan) if vlan.vf_id == number => {
                    let state = found.get_or_insert_with(FunctionState::default);
                    // 12 and 3 bits in a frame; more is nothing that a frame can have.
                    state.vlan = u16::try_from(vlan.vlan_id).ok()?;
                    state.priority = u8::try_from(vlan.qos).ok()?;
                }
                VfInfo::SpoofCheck(check) if check.vf_id == number => {
                    found.get_or_insert_with(FunctionState::default).spoof_check = Some(check.enabled);
                }
                VfInfo::Trust(trust) if trust.vf_id == number => {
                    found.get_or_insert_with(FunctionState::default).trust = Some(trust.enabled);
                }
                _ => {}
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_functions_state_is_read_by_its_number() {
        let function = |number, last, vlan| {
            LinkVfInfo(vec![
                VfInfo::Mac(VfInfoMac::new(number, &[0x52, 0x54, 0, 0, 0, last])),
                VfInfo::Vlan(VfInfoVlan::new(number, vlan, 5)),
                VfInfo::SpoofCheck(VfInfoSpoofCheck::new(number, true)),
            ])
        };
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::VfInfoList(vec![function(0, 1, 7), function(3, 2, 70_000)]));
        let first = FunctionState {
            address: [0x52, 0x54, 0, 0, 0, 1],
            vlan: 7,
            priority: 5,
            spoof_check: Some(true),
            trust: None,
        };
        assert_eq!(state_of(&link, 0), Some(first));
        assert_eq!(state_of(&link, 1), None);
        assert_eq!(state_of(&link, 3), None, "no frame can be in VLAN 70000");
        assert_eq!(state_of(&LinkMessage::default(), 0), None);
    }
}
