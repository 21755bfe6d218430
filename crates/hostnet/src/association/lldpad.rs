//! One question and one answer at a time with lldpad, by netlink from process to process: rtnetlink's messages, sent to the
//! port that bears lldpad's process number.

use std::io;
use std::time::Duration;

use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::time::timeout;

use super::message::link_message;
use super::{AssociationError, Facing, Listener, Request};
use crate::Error;

/// For lldpad to answer, which does not wait for the switch with it.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

const ECONNREFUSED: i32 = 111;
/// Message types (netlink(7), rtnetlink(7)), and where a message has its own.
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const TYPE: std::ops::Range<usize> = 4..6;

/// Has it take a request.
pub(super) async fn tell(
    to: &Listener,
    facing: &Facing,
    attributes: Vec<LinkAttribute>,
    request: Request,
) -> Result<(), AssociationError> {
    let message = RouteNetlinkMessage::SetLink(link_message(facing.ifindex, attributes));
    match exchange(to, facing, message).await? {
        (_, NetlinkPayload::Error(error)) if error.code.is_none() => Ok(()),
        (_, NetlinkPayload::Error(error)) => {
            let (device, cause) = (facing.name.clone(), error.to_io());
            Err(AssociationError::Refused { listener: "lldpad", device, request, cause })
        }
        // It has sent what it knows instead of a bare yes.
        (_, NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(_))) => Ok(()),
        (pid, other) => Err(odd(facing, pid, &other)),
    }
}

/// Asks for what it knows of the interface.
pub(super) async fn ask(to: &Listener, facing: &Facing) -> Result<LinkMessage, AssociationError> {
    let message = RouteNetlinkMessage::GetLink(link_message(facing.ifindex, Vec::new()));
    match exchange(to, facing, message).await? {
        (_, NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link))) => Ok(link),
        (_, NetlinkPayload::Error(error)) if error.code.is_some() => {
            let (device, cause) = (facing.name.clone(), error.to_io());
            Err(AssociationError::Refused { listener: "lldpad", device, request: Request::Associate, cause })
        }
        (pid, other) => Err(odd(facing, pid, &other)),
    }
}

type Payload = NetlinkPayload<RouteNetlinkMessage>;

async fn exchange(
    to: &Listener,
    facing: &Facing,
    message: RouteNetlinkMessage,
) -> Result<(u32, Payload), AssociationError> {
    let pid = pid_of(to).await?;
    let silent = |_| AssociationError::Silent { device: facing.name.clone(), pid, limit: ANSWER_LIMIT };
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(ECONNREFUSED) => no_agent(to, format!("process {pid} does not listen")),
        _ => Error::kernel("speak with lldpad about", &facing.name, error).into(),
    };
    let answer = timeout(ANSWER_LIMIT, round_trip(pid, message)).await.map_err(silent)?;
    let mut answer = answer.map_err(failed)?;
    // Where the kernel has a type of its own for a link, lldpad has the one of a list's end.
    if answer.get(TYPE) == Some(&NLMSG_DONE.to_ne_bytes()) {
        answer[TYPE].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
    }
    let parsed = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
    let parsed = parsed.map_err(|error| AssociationError::Odd {
        device: facing.name.clone(),
        pid,
        cause: error.to_string(),
    })?;
    Ok((pid, parsed.payload))
}

/// Sends the message, and waits for one from the same process.
async fn round_trip(pid: u32, message: RouteNetlinkMessage) -> io::Result<Vec<u8>> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().bind_auto()?;
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send_to(&bytes, &SocketAddr::new(pid, 0)).await?;
    loop {
        let (answer, from) = socket.recv_from_full().await?;
        if from.port_number() == pid {
            return Ok(answer);
        }
    }
}

/// The process, which must not be the kernel: a request without answer would look like one that was taken.
async fn pid_of(to: &Listener) -> Result<u32, AssociationError> {
    let text = tokio::fs::read_to_string(&to.pid_file).await;
    let text = text.map_err(|error| no_agent(to, error.to_string()))?;
    let pid = text.trim().parse().ok().filter(|pid| *pid != 0);
    pid.ok_or_else(|| no_agent(to, "no process number is in it".into()))
}

fn no_agent(to: &Listener, cause: String) -> AssociationError {
    AssociationError::NoAgent { pid_file: to.pid_file.clone(), cause }
}

fn odd(facing: &Facing, pid: u32, payload: &Payload) -> AssociationError {
    let cause = format!("a message of type {}", payload.message_type());
    AssociationError::Odd { device: facing.name.clone(), pid, cause }
}
