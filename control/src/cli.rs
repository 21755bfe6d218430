//! The command line's grammar.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::RangedI64ValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::names::{ExternalId, IpPrefix, Mac, Name, SocketPath};
use crate::problem::Problem;
use crate::spec::{
    AntiSpoof, Attach, Bridge, Device, MTU_RANGE, Macvtap, Ovs, PlugSpec, QUEUES_RANGE, Role, Socket, Tap, To,
};
use crate::status::Phase;

/// Where the daemon is reached unless said otherwise.
pub const API_DEFAULT: &str = "/run/vhostd/api.sock";

/// A userspace vhost-user switch: network cards for virtual machines and containers.
#[derive(Debug, Parser)]
#[command(name = "vhostd", version, disable_help_subcommand = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// Socket of the daemon's API [default: /run/vhostd/api.sock]
    #[arg(long, env = "VHOSTD_API", global = true, value_name = "PATH", hide_env_values = true)]
    pub api: Option<PathBuf>,

    /// How to print what is found
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Format,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 ok, 1 error, 2 usage, 3 not found, 4 conflict, 5 time-out, \
                          6 daemon unreachable, 7 precondition";

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Columns for people
    #[default]
    Table,
    /// More columns
    Wide,
    /// The API's JSON
    Json,
    /// The same as YAML
    Yaml,
    /// Names only, one a line
    Name,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon
    Serve(ServeArgs),
    /// Plug a VIF: give it a port, an uplink, or both
    Plug(Box<PlugArgs>),
    /// Undo a plug; one that is not there is undone already
    Unplug(UnplugArgs),
    /// Print an os-vif object as it is understood
    Vif {
        /// The object; - is standard input
        #[arg(short, long, value_name = "FILE")]
        file: PathBuf,
    },
    /// List plugs
    Ls,
    /// Show one plug
    Show {
        /// The plug
        name: Name,
    },
    /// Frames and bytes by port and ring
    Stats {
        /// Only this plug's ports
        name: Option<Name>,
    },
    /// Frames given up, by port and reason, and whose fault it was
    Drops,
    /// Learned addresses
    Fdb,
    /// Workers and what they poll
    Workers {
        #[command(subcommand)]
        action: Option<WorkersAction>,
    },
    /// Print events as they happen
    Events {
        /// Begin after this event (its id)
        #[arg(long, value_name = "ID")]
        since: Option<String>,
    },
    /// Two built-in front ends talk through a daemon of their own: ten seconds, no QEMU, no root
    Demo,
    /// Send a request to the API and print the answer
    Api(ApiArgs),
    /// Print a completion script
    #[command(hide = true)]
    Completion {
        /// For this shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(hide = true)]
    Man,
}

/// `vhostd workers ...`.
#[derive(Debug, Subcommand)]
pub enum WorkersAction {
    /// Look at the load for a second, and move queues from busy workers to idle ones
    Rebalance {
        /// Only print what would be moved
        #[arg(long)]
        dry_run: bool,
    },
}

/// `vhostd serve`.
#[derive(Debug, Default, Args)]
pub struct ServeArgs {
    /// Configuration file [default: /etc/vhostd/vhostd.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where plugs are recorded [default: /var/lib/vhostd]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Lcores for workers, as 0,2-3 [default: one worker, not pinned]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
    /// How workers wait for frames
    #[arg(long, value_enum)]
    pub poll: Option<PollMode>,
}

/// How workers wait.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    ValueEnum,
    serde::Deserialize,
    serde::Serialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum PollMode {
    /// Sleep when there is nothing to do
    #[default]
    Adaptive,
    /// Never sleep
    Busy,
}

/// `vhostd plug`.
#[derive(Debug, Args)]
pub struct PlugArgs {
    /// Name of the plug
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    pub name: Option<Name>,
    /// Make this socket, a front end connects to it; beside an os-vif document, too
    #[arg(long, value_name = "PATH", conflicts_with = "connect")]
    pub listen: Option<SocketPath>,
    /// A front end makes this socket, connect to it; beside an os-vif document, too
    #[arg(long, value_name = "PATH")]
    pub connect: Option<SocketPath>,
    /// Be a guest to another switch: make this socket, its back end connects to it
    #[arg(long, value_name = "PATH", conflicts_with_all = ["listen", "connect", "frontend_connect", "file"])]
    pub frontend_listen: Option<SocketPath>,
    /// Be a guest to another switch: its back end makes this socket, connect to it
    #[arg(long, value_name = "PATH", conflicts_with_all = ["listen", "connect", "file"])]
    pub frontend_connect: Option<SocketPath>,
    /// Network to join [default: default]
    #[arg(long, value_name = "NET", conflicts_with = "file")]
    pub network: Option<Name>,
    /// The host's side: tap:DEV, bridge:BR, ovs:BR, macvtap:DEV[:bridge|vepa|passthrough] or device:PCI
    #[arg(long, value_name = "KIND:NAME", conflicts_with = "file")]
    pub to: Option<ToArg>,
    /// With ovs:BR, the logical port in OVN or Neutron that it is
    #[arg(long, value_name = "ID", conflicts_with = "file")]
    pub iface_id: Option<ExternalId>,
    /// With ovs:BR, what joins it with the switch [default: vhost-user if that has DPDK, else a TAP]
    #[arg(long, value_enum, value_name = "HOW", conflicts_with = "file")]
    pub attach: Option<Attach>,
    /// The guest's address
    #[arg(long, value_name = "MAC", conflicts_with = "file")]
    pub mac: Option<Mac>,
    /// Drop what the guest sends from another Ethernet address than --mac, or claims in ARP and neighbour discovery
    #[arg(long, conflicts_with = "file", requires = "mac")]
    pub anti_spoof: bool,
    /// The same for IP addresses: the guest has these, or of these networks, and no others
    #[arg(
        long,
        value_name = "ADDRESS[/BITS],...",
        conflicts_with = "file",
        requires = "mac",
        value_delimiter = ','
    )]
    pub address: Vec<IpPrefix>,
    /// Largest payload of an Ethernet frame, bytes [default: 1500]
    #[arg(long, value_name = "BYTES", conflicts_with = "file", value_parser = within(&MTU_RANGE))]
    pub mtu: Option<u16>,
    /// Queue pairs [default: what the guest wants, up to 128; one for a TAP and for another switch, which may have fewer]
    #[arg(long, value_name = "N", conflicts_with = "file", value_parser = within(&QUEUES_RANGE))]
    pub queues: Option<u16>,
    /// Read the plug from a document: os-vif, or as `show -o json` prints it; - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Say what would happen, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Return when the plug has come this far
    #[arg(long, value_enum, value_name = "PHASE")]
    pub wait: Option<Phase>,
    /// How long to wait for it
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub timeout: Duration,
}

/// `vhostd unplug`.
#[derive(Debug, Args)]
pub struct UnplugArgs {
    /// Name of the plug
    #[arg(required_unless_present = "file", conflicts_with = "file")]
    pub name: Option<Name>,
    /// Take the name from a document; - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Fail if there is no such plug
    #[arg(long)]
    pub must_exist: bool,
}

/// `vhostd api`.
#[derive(Debug, Args)]
pub struct ApiArgs {
    /// GET, PUT, POST or DELETE
    pub method: String,
    /// Path and query, as /v1/plugs
    pub path: String,
    /// Body as JSON; - is standard input
    #[arg(short, long, value_name = "JSON")]
    pub data: Option<String>,
}

impl PlugArgs {
    /// The socket that the options name.
    pub fn socket(&self) -> Option<Socket> {
        let sockets = [
            (Role::Listen, &self.listen),
            (Role::Connect, &self.connect),
            (Role::FrontendListen, &self.frontend_listen),
            (Role::FrontendConnect, &self.frontend_connect),
        ];
        // The grammar takes one of them at the most.
        sockets.into_iter().find_map(|(role, path)| Some(Socket { role, path: path.clone()? }))
    }

    /// The spec that the options describe.
    pub fn spec(&self) -> Result<PlugSpec, Problem> {
        let mut to = self.to.clone().map(|to| to.0);
        match (&mut to, &self.iface_id, self.attach) {
            (Some(To::Ovs(ovs)), iface_id, attach) => {
                ovs.iface_id.clone_from(iface_id);
                ovs.attach = attach;
            }
            (_, None, None) => {}
            _ => {
                let problem = "--iface-id and --attach are for a port of Open vSwitch: give --to ovs:BR";
                return Err(Problem::invalid(problem));
            }
        }
        Ok(PlugSpec {
            network: self.network.clone(),
            socket: self.socket(),
            to,
            mac: self.mac,
            mtu: self.mtu,
            queues: self.queues,
            anti_spoof: (self.anti_spoof || !self.address.is_empty())
                .then(|| AntiSpoof { addresses: self.address.clone() }),
        })
    }
}

fn within(range: &RangeInclusive<u16>) -> RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(i64::from(*range.start())..=i64::from(*range.end()))
}

/// `tap:DEV`, `bridge:BR`, `ovs:BR`, `macvtap:DEV[:MODE]`, `device:PCI`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToArg(To);

impl FromStr for ToArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = |name: &str| name.parse().map_err(|e| format!("{e}"));
        match text.split_once(':') {
            Some(("tap", tap)) => Ok(Self(To::Tap(Tap::new(name(tap)?)))),
            Some(("bridge", bridge)) => Ok(Self(To::Bridge(Bridge::new(name(bridge)?)))),
            Some(("ovs", bridge)) => Ok(Self(To::Ovs(Ovs::new(name(bridge)?)))),
            Some(("macvtap", rest)) => {
                let (device, mode) =
                    rest.split_once(':').map_or((rest, None), |(dev, mode)| (dev, Some(mode)));
                let mode = mode.map(str::parse).transpose()?.unwrap_or_default();
                Ok(Self(To::Macvtap(Macvtap { mode, ..Macvtap::new(name(device)?) })))
            }
            Some(("device", address)) => {
                Ok(Self(To::Device(Device::new(address.parse().map_err(|e| format!("{e}"))?))))
            }
            _ => Err("it must be tap:DEV, bridge:BR, ovs:BR, macvtap:DEV[:MODE] or device:PCI".into()),
        }
    }
}

/// `0,2-3`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct CpuList(pub Vec<usize>);

/// Lcores in a machine (CONFIG_NR_CPUS is at most 8192).
const CPUS_MAX: usize = 8192;

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{text:?} is not a list of lcores such as 0,2-3");
        let number = |n: &str| n.parse::<usize>().ok().filter(|n| *n < CPUS_MAX).ok_or_else(bad);
        let mut cpus = Vec::new();
        for part in text.split(',').filter(|_| !text.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(bad());
            }
            cpus.extend(first..=last);
        }
        let mut unique = cpus.clone();
        unique.sort_unstable();
        unique.dedup();
        if unique.len() == cpus.len() {
            Ok(Self(cpus))
        } else {
            Err(format!("{text:?} names an lcore twice"))
        }
    }
}

impl TryFrom<String> for CpuList {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// Longest wait that can be asked for.
const TIMEOUT_MAX: Duration = Duration::from_secs(600);

/// `10s`, `250ms`, `2m`; at most ten minutes.
pub fn duration(text: &str) -> Result<Duration, String> {
    let parsed: Option<jiff::SignedDuration> = text.parse().ok();
    parsed
        .and_then(|d| Duration::try_from(d).ok())
        .filter(|d| *d <= TIMEOUT_MAX)
        .ok_or_else(|| format!("{text:?} is not a time such as 10s or 250ms, at most 10m"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn lists_of_lcores() {
        let list = |text: &str| text.parse::<CpuList>();
        assert_eq!(list("0,2-3").unwrap().0, [0, 2, 3]);
        assert_eq!(list("").unwrap().0, [] as [usize; 0]);
        for bad in ["x", "3-1", "1,", "0-9999999", "1,1", "0-2,1", "-1", "1-"] {
            assert!(list(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_bounded() {
        assert_eq!(duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(duration("2m").unwrap(), Duration::from_secs(120));
        assert_eq!(duration("0s").unwrap(), Duration::ZERO);
        for bad in ["", "10", "-1s", "11m", "1y", "99999999999999999999s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn host_sides() {
        let to = |text: &str| text.parse::<ToArg>();
        assert!(matches!(to("tap:tap0").unwrap().0, To::Tap(_)));
        assert!(matches!(to("bridge:br0").unwrap().0, To::Bridge(Bridge { tap: None, .. })));
        let mode = |text: &str| match to(text).unwrap().0 {
            To::Macvtap(macvtap) => macvtap.mode.name(),
            other => panic!("{other:?}"),
        };
        assert_eq!((mode("macvtap:eth0"), mode("macvtap:eth0:passthrough")), ("bridge", "passthrough"));
        assert!(matches!(to("device:0000:03:00.1").unwrap().0, To::Device(_)));
        assert!(to("device:eth0").is_err());
        assert!(to("macvtap:eth0:private").unwrap_err().contains("passthrough"));
        for bad in ["", "tap", "tap:", "bridge:a/b", "vlan:eth0", "tap:0123456789abcdef"] {
            assert!(to(bad).is_err(), "{bad}");
        }
        assert!(to("bridge").unwrap_err().contains("bridge:BR"));
    }

    #[test]
    fn numbers_have_the_bounds_of_the_spec() {
        for (option, value, bounds) in [("--mtu", "70000", "68..=9216"), ("--queues", "0", "1..=128")] {
            let error =
                Cli::try_parse_from(["vhostd", "plug", "a", "--listen", "/x", option, value]).unwrap_err();
            assert!(error.to_string().contains(bounds), "{error}");
        }
    }
}
