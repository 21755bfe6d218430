//! Why a step of a plug fails: whose it is, and the way out.

use crate::names::NameError;
use crate::status::Whose;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Sockets may not be there.
    #[error("socket {path} is outside of the directories for sockets ({}): see sockets.dirs", dirs.join(", "))]
    Directory {
        /// The socket.
        path: String,
        /// Where sockets may be.
        dirs: Vec<String>,
    },
    /// The host's network.
    #[error("{}", with_causes(.0))]
    Host(#[from] hostnet::Error),
    /// Open vSwitch.
    #[error(transparent)]
    Ovs(#[from] ovsdb::Error),
    /// The switch has no such ports.
    #[error(
        "Open vSwitch cannot be attached by vhost-user in bridge {bridge}: that needs DPDK \
         (other_config:dpdk-init=true) and a bridge with datapath_type netdev; or ask for a TAP"
    )]
    NoVhostUser {
        /// The bridge.
        bridge: String,
    },
    /// Sockets cannot be where they are to be shared with the switch.
    #[error("directory {path} for sockets to Open vSwitch cannot be made: {cause}; see ovs.socket_dir")]
    SwitchDirectory {
        /// The directory.
        path: String,
        /// Why.
        cause: std::io::Error,
    },
    /// A PCI device.
    #[error("{}", with_causes(.0))]
    Device(#[from] hostnet::PciError),
    /// The switch outside.
    #[error("{}", with_causes(.0))]
    Association(#[from] hostnet::AssociationError),
    /// An interface of a device has a name that no plug can have.
    #[error("an interface of the device cannot be used: {cause}")]
    Name {
        /// Its name.
        cause: NameError,
    },
    /// A record that was written by hand.
    #[error("the record does not say how the device was found: unplug it, and plug it again")]
    Unresolved,
    /// The socket.
    #[error("{}", with_causes(.0))]
    Socket(vhost_user::EndpointError),
    /// The dataplane.
    #[error("{}", with_causes(.0))]
    Dataplane(dataplane::Error),
}

impl StepError {
    /// Who has to do something about it.
    pub fn whose(&self) -> Whose {
        match self {
            Self::Directory { .. }
            | Self::Host(_)
            | Self::Ovs(_)
            | Self::NoVhostUser { .. }
            | Self::SwitchDirectory { .. }
            | Self::Device(_)
            | Self::Association(_)
            | Self::Name { .. }
            | Self::Socket(_) => Whose::Host,
            Self::Unresolved | Self::Dataplane(_) => Whose::Vhostd,
        }
    }

    /// The way out, where the message does not say it.
    pub fn hint(&self) -> Option<&'static str> {
        let Self::Socket(vhost_user::EndpointError::Io { cause, .. }) = self else { return None };
        match cause.kind() {
            std::io::ErrorKind::NotFound => {
                Some("make the directory first: vhostd makes sockets, no directories")
            }
            std::io::ErrorKind::PermissionDenied => {
                Some("the daemon's user has to be able to write in the directory")
            }
            _ => None,
        }
    }

    /// True if what the plug asks for belongs to somebody else.
    pub fn is_conflict(&self) -> bool {
        use hostnet::Error as Host;
        use vhost_user::EndpointError as Socket;
        match self {
            Self::Host(error) => matches!(
                error,
                Host::Busy { .. }
                    | Host::DeviceTaken { .. }
                    | Host::OtherDevice { .. }
                    | Host::Foreign { .. }
                    | Host::OtherPlug { .. }
                    | Host::WrongKind { .. }
                    | Host::Enslaved { .. }
                    | Host::ForeignBridge { .. }
                    | Host::OtherUplink { .. }
                    | Host::OtherVlan { .. }
                    | Host::InUse { .. }
                    | Host::NameTaken { .. }
            ),
            Self::Device(error) => {
                use hostnet::PciError as Pci;
                matches!(error, Pci::Group { .. } | Pci::HasFunctions { .. } | Pci::Ambiguous { .. })
            }
            Self::Ovs(error) => error.is_conflict(),
            Self::Socket(error) => {
                matches!(
                    error,
                    Socket::Foreign { .. } | Socket::NotOurs { .. } | Socket::InUse(_) | Socket::Raced(_)
                )
            }
            Self::Directory { .. }
            | Self::NoVhostUser { .. }
            | Self::SwitchDirectory { .. }
            | Self::Association(_)
            | Self::Name { .. }
            | Self::Unresolved
            | Self::Dataplane(_) => false,
        }
    }
}

impl From<dataplane::Error> for StepError {
    fn from(error: dataplane::Error) -> Self {
        match error {
            dataplane::Error::Endpoint { cause, .. } => Self::Socket(cause),
            error => Self::Dataplane(error),
        }
    }
}

/// An error and what is behind it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
