//! What the switch does on its own account. lldpad tells it to the netlink port that is in the header of a request, long after
//! that was answered: so there is a socket for it, and a request names that one ([`Listener::told_at`](super::Listener::told_at)).

use std::io;
use std::path::Path;

use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkVfInfo, VfInfo};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, TokioSocket};

use super::Request;
use super::exchange::pid_in;
use super::message::{request_in, uuid_in};
use crate::Error;

/// Longest message that is looked at, bytes: lldpad's buffer for one.
const MESSAGE_MAX: usize = 4096;

/// VSI instances that the switch has let go of, as they are told, from the moment it was opened.
pub struct SwitchWatch {
    socket: TokioSocket,
    port: u32,
}

/// A VSI instance that the switch has let go of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LetGo {
    /// The instance, a UUID.
    pub instance: [u8; 16],
    /// Its guests' addresses.
    pub addresses: Vec<[u8; 6]>,
}

impl SwitchWatch {
    /// Opens it in the network namespace of the thread. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open() -> Result<Self, Error> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE).map_err(Error::Open)?;
        let port = socket.socket_mut().bind_auto().map_err(Error::Open)?.port_number();
        Ok(Self { socket, port })
    }

    /// Its netlink port.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Waits for the next one. What another process than lldpad says, and whatever else that one says, is passed over.
    /// Cancel safe.
    ///
    /// # Errors
    /// The socket's. It may be asked again.
    pub async fn next(&mut self, pid_file: &Path) -> io::Result<LetGo> {
        loop {
            let (message, from) = self.socket.recv_from_full().await?;
            if pid_in(pid_file).await.ok() == Some(from.port_number())
                && let Some(let_go) = let_go_in(&message)
            {
                return Ok(let_go);
            }
        }
    }
}

fn let_go_in(message: &[u8]) -> Option<LetGo> {
    if message.len() > MESSAGE_MAX {
        return None;
    }
    let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).ok()?;
    let NetlinkPayload::InnerMessage(RouteNetlinkMessage::SetLink(link)) = message.payload else {
        return None;
    };
    let (mut instance, mut addresses) = (None, Vec::new());
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::VfPorts(ports) => {
                let is_let_go = |port: &&_| request_in(port) == Some(Request::Disassociate as u8);
                instance = ports.iter().find(is_let_go).and_then(uuid_in);
            }
            LinkAttribute::VfInfoList(stations) => addresses.extend(stations.iter().flat_map(addresses_of)),
            _ => {}
        }
    }
    Some(LetGo { instance: instance?, addresses })
}

fn addresses_of(station: &LinkVfInfo) -> impl Iterator<Item = [u8; 6]> {
    station.0.iter().filter_map(|info| match info {
        VfInfo::Mac(mac) => mac.mac.first_chunk().copied(),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_core::DefaultNla;
    use rtnetlink::packet_route::link::{LinkVfPort, VfInfoMac, VfPort};

    use super::super::message::link_message;
    use super::*;

    const UUID: [u8; 16] = [7; 16];
    const ADDRESS: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];

    /// lldpad's message: the request takes two bytes there.
    fn told(uuid: &[u8], request: &[u8]) -> Vec<u8> {
        let nla = |kind, value: &[u8]| VfPort::Other(DefaultNla::new(kind, value.to_vec()));
        let station = LinkVfInfo(vec![VfInfo::Mac(VfInfoMac::new(u32::MAX, &ADDRESS))]);
        let attributes = vec![
            LinkAttribute::IfName("eth1".into()),
            LinkAttribute::VfInfoList(vec![station]),
            LinkAttribute::VfPorts(vec![LinkVfPort(vec![nla(4, uuid), nla(6, request)])]),
        ];
        bytes(RouteNetlinkMessage::SetLink(link_message(7, attributes)))
    }

    fn bytes(message: RouteNetlinkMessage) -> Vec<u8> {
        let mut message = NetlinkMessage::from(message);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    #[test]
    fn an_instance_that_the_switch_lets_go_of_is_told_and_nothing_else() {
        let message = told(&UUID, &[3, 0]);
        let expected = Some(LetGo { instance: UUID, addresses: vec![ADDRESS] });
        assert_eq!(let_go_in(&message), expected);
        assert_eq!(let_go_in(&told(&UUID, &[3])), expected);
        for other in [
            told(&UUID, &[2, 0]),
            told(&UUID, &[]),
            told(&UUID[..15], &[3, 0]),
            bytes(RouteNetlinkMessage::SetLink(link_message(7, Vec::new()))),
            bytes(RouteNetlinkMessage::NewLink(link_message(7, Vec::new()))),
            Vec::new(),
            vec![0xff; 64],
            [message.clone(), vec![0; MESSAGE_MAX]].concat(),
        ] {
            assert_eq!(let_go_in(&other), None, "{other:02x?}");
        }
        // Whatever is wrong with it costs that message only.
        for at in 0..message.len() {
            let _ = let_go_in(&message[..at]);
            for value in [0, 1, 0x7f, 0xff] {
                let mut odd = message.clone();
                odd[at] = value;
                let _ = let_go_in(&odd);
            }
        }
    }
}
