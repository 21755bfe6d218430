//! One question and one answer at a time, by netlink: rtnetlink's messages, sent to the kernel, or from process to process to the
//! port that bears lldpad's process number.

use std::io;
use std::path::Path;
use std::time::Duration;

use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use sys::fail_point;
use tokio::time::timeout;

use super::message::link_message;
use super::{Agent, AssociationError, Facing, Listener, Request};
use crate::Error;

/// For an answer, which waits for no switch.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

const ECONNREFUSED: i32 = 111;
/// Message types (netlink(7), rtnetlink(7)), and where a message has its own.
const NLMSG_DONE: u16 = 3;
const RTM_NEWLINK: u16 = 16;
const TYPE: std::ops::Range<usize> = 4..6;

/// Has the agent take a request.
pub(super) async fn tell(
    to: &Listener,
    agent: Agent,
    facing: &Facing,
    attributes: Vec<LinkAttribute>,
    request: Request,
) -> Result<(), AssociationError> {
    fail_point::pass(format_args!("{request} {} at {agent}", facing.name));
    let message = RouteNetlinkMessage::SetLink(link_message(facing.ifindex, attributes));
    match exchange(to, agent, facing, message, NLM_F_REQUEST | NLM_F_ACK).await? {
        NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
        NetlinkPayload::Error(error) => Err(refused(agent, facing, request, error.to_io())),
        // lldpad has sent what it knows instead of a bare yes.
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(_)) => Ok(()),
        other => Err(odd(agent, facing, &other)),
    }
}

/// Asks the agent for what it knows of the interface.
pub(super) async fn ask(
    to: &Listener,
    agent: Agent,
    facing: &Facing,
    attributes: Vec<LinkAttribute>,
) -> Result<LinkMessage, AssociationError> {
    let message = RouteNetlinkMessage::GetLink(link_message(facing.ifindex, attributes));
    match exchange(to, agent, facing, message, NLM_F_REQUEST).await? {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(link),
        NetlinkPayload::Error(error) if error.code.is_some() => {
            Err(refused(agent, facing, Request::Associate, error.to_io()))
        }
        other => Err(odd(agent, facing, &other)),
    }
}

type Payload = NetlinkPayload<RouteNetlinkMessage>;

async fn exchange(
    to: &Listener,
    agent: Agent,
    facing: &Facing,
    message: RouteNetlinkMessage,
    flags: u16,
) -> Result<Payload, AssociationError> {
    let device = || facing.name.clone();
    let failed = |error: io::Error| match (agent, error.raw_os_error()) {
        (Agent::Lldpad(pid), Some(ECONNREFUSED)) => no_agent(to, format!("process {pid} does not listen")),
        _ => Error::kernel("speak by netlink about", &facing.name, error).into(),
    };
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    // Not where the answer goes, which is where the request came from.
    message.header.port_number = to.told_at;
    let silent = |_| AssociationError::Silent { device: device(), agent, limit: ANSWER_LIMIT };
    let answer = timeout(ANSWER_LIMIT, round_trip(agent.port(), message)).await.map_err(silent)?;
    let mut answer = answer.map_err(failed)?;
    // Where the kernel has a type of its own for a link, lldpad has the one of a list's end.
    if answer.get(TYPE) == Some(&NLMSG_DONE.to_ne_bytes()) {
        answer[TYPE].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
    }
    let parsed = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
    let parsed = parsed.map_err(|error| AssociationError::Odd {
        device: device(),
        agent,
        cause: error.to_string(),
    })?;
    Ok(parsed.payload)
}

/// Sends the message, and waits for one from the same port.
async fn round_trip(port: u32, mut message: NetlinkMessage<RouteNetlinkMessage>) -> io::Result<Vec<u8>> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().bind_auto()?;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send_to(&bytes, &SocketAddr::new(port, 0)).await?;
    loop {
        let (answer, from) = socket.recv_from_full().await?;
        if from.port_number() == port {
            return Ok(answer);
        }
    }
}

/// lldpad.
pub(super) async fn lldpad(to: &Listener) -> Result<Agent, AssociationError> {
    pid_in(&to.pid_file).await.map(Agent::Lldpad).map_err(|cause| no_agent(to, cause))
}

/// The process number in a file. It must not be the kernel's: a request without answer would look like one that was taken.
pub(super) async fn pid_in(file: &Path) -> Result<u32, String> {
    let text = tokio::fs::read_to_string(file).await.map_err(|error| error.to_string())?;
    let pid = text.trim().parse().ok().filter(|pid| *pid != 0);
    pid.ok_or_else(|| "no process number is in it".into())
}

fn no_agent(to: &Listener, cause: String) -> AssociationError {
    AssociationError::NoAgent { pid_file: to.pid_file.clone(), cause }
}

fn refused(agent: Agent, facing: &Facing, request: Request, cause: io::Error) -> AssociationError {
    let device = facing.name.clone();
    let refused = |cause| AssociationError::Refused { agent, device: device.clone(), request, cause };
    if let Agent::Lldpad(_) = agent {
        return refused(cause);
    }
    match Error::kernel("set the port profile of", &device, cause) {
        Error::Unsupported { .. } => AssociationError::NoHardware { device: device.clone() },
        Error::Kernel { source, .. } => refused(source),
        error => error.into(),
    }
}

fn odd(agent: Agent, facing: &Facing, payload: &Payload) -> AssociationError {
    let cause = format!("a message of type {}", payload.message_type());
    AssociationError::Odd { device: facing.name.clone(), agent, cause }
}
