//! How far a plug has come, and what it waits for.
//!
//! ```text
//! pending → attached → linked → forwarding
//!    |          |         |         every worker that serves it has it in its list
//!    |          |         rings run and are enabled; a TAP is open
//!    |          the socket accepts, or is being dialled; the TAP is there
//!    wanted, but a step of ours has not succeeded yet
//! ```
//!
//! A plug of two ports is as far as the port that is less far.

use dataplane::PortReport;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vhost_user::{SessionState, SessionStatus};

use crate::names::Name;
use crate::spec::{PlugSpec, Socket};

/// How far a plug has come.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    ToSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Wanted, but not there yet.
    #[default]
    #[value(skip)]
    Pending,
    /// The socket is ready or being dialled; the TAP is there.
    Attached,
    /// A front end negotiated, rings run and are enabled.
    Linked,
    /// Every worker concerned forwards its frames.
    Forwarding,
}

impl Phase {
    /// Stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Attached => "attached",
            Self::Linked => "linked",
            Self::Forwarding => "forwarding",
        }
    }
}

/// Who has to do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Whose {
    /// The VMM or the guest behind the socket, or another switch.
    FrontEnd,
    /// This host: a bridge, a TAP, a directory, a permission.
    Host,
    /// The daemon itself.
    Vhostd,
}

/// A missing step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Condition {
    /// The phase that is not reached for want of it.
    pub phase: Phase,
    /// Whose step it is.
    pub whose: Whose,
    /// The step in words.
    pub message: String,
}

/// How a plug is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// How far it has come.
    pub phase: Phase,
    /// What is missing; empty when it forwards.
    pub conditions: Vec<Condition>,
}

/// A plug as the API shows it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Plug {
    /// Its id.
    pub id: Name,
    /// What it is asked to be, completed.
    pub spec: PlugSpec,
    /// How it is.
    pub status: Status,
    /// What a dry run would do, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<String>,
}

impl Status {
    /// Not attached, for a reason.
    pub fn pending(whose: Whose, message: impl Into<String>) -> Self {
        let condition = Condition { phase: Phase::Attached, whose, message: message.into() };
        Self { phase: Phase::Pending, conditions: vec![condition] }
    }

    /// From what the dataplane says of the plug's ports.
    pub fn of_ports(spec: &PlugSpec, ports: &[PortReport]) -> Self {
        let conditions = ports.iter().filter_map(|port| missing(spec, port)).collect();
        Self { phase: Phase::Forwarding, conditions: Vec::new() }.and(conditions)
    }

    /// The same if these are missing, too.
    pub fn and(mut self, missing: Vec<Condition>) -> Self {
        let reached = |c: &Condition| if c.phase == Phase::Linked { Phase::Attached } else { Phase::Linked };
        self.phase = missing.iter().map(reached).fold(self.phase, Phase::min);
        self.conditions.extend(missing);
        self
    }
}

fn missing(spec: &PlugSpec, port: &PortReport) -> Option<Condition> {
    if port.forwarding {
        return None;
    }
    if port.linked {
        let message = format!("the workers have not taken up port {} yet", port.name);
        return Some(Condition { phase: Phase::Forwarding, whose: Whose::Vhostd, message });
    }
    let at = |session: &SessionStatus| spec.sockets().find(|socket| socket.path.as_path() == session.path);
    let (whose, message) = match port.session.as_ref().and_then(|session| Some((at(session)?, session))) {
        Some((socket, session)) => (Whose::FrontEnd, waiting_for_front_end(&socket, session)),
        None => (Whose::Host, format!("TAP port {} is not open", port.name)),
    };
    Some(Condition { phase: Phase::Linked, whose, message })
}

fn waiting_for_front_end(socket: &Socket, session: &SessionStatus) -> String {
    let path = &socket.path;
    let other = if socket.role.is_front_end() { "back end" } else { "front end" };
    match &session.state {
        SessionState::Listening => match &session.last_error {
            None => format!("waiting for a {other} to connect to {path}"),
            Some(error) => format!("waiting for a {other} to connect to {path}; the last one: {error}"),
        },
        SessionState::Dialling { last_error: None, .. } => format!("dialling {path}"),
        SessionState::Dialling { last_error: Some(error), .. } => format!("dialling {path}: {error}"),
        SessionState::Negotiating if socket.role.is_front_end() => {
            format!("the back end at {path} has not answered everything yet")
        }
        SessionState::Negotiating | SessionState::Linked => {
            let peer = session.peer.map_or_else(String::new, |peer| format!(" (pid {})", peer.pid));
            format!("a front end{peer} is connected to {path}, its driver has enabled no rings yet")
        }
    }
}
