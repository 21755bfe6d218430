//! The daemon's configuration: a TOML file, overridden by the command line. Everything in it is fixed until restart;
//! whatever changes while the daemon runs goes through the API.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::cli::{self, CpuList, PollMode, ServeArgs};
use crate::names::{DriverName, IFNAME_BYTES_MAX, PATH_BYTES_MAX};
use crate::spec::DatapathType;

/// Read if no other is named.
const FILE_DEFAULT: &str = "/etc/vhostd/vhostd.toml";

/// Why the daemon cannot be configured so.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error("cannot read configuration {path}: {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// Its content.
    #[error("configuration {path}: {cause}")]
    Content {
        /// Which.
        path: PathBuf,
        /// What and where.
        cause: String,
    },
}

/// All settings, as in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The API's socket.
    pub api: ApiConfig,
    /// Where plugs are recorded.
    pub state: StateConfig,
    /// Workers and switch.
    pub dataplane: DataplaneConfig,
    /// vhost-user sockets.
    pub sockets: SocketsConfig,
    /// Open vSwitch.
    pub ovs: OvsConfig,
    /// Devices that guests get.
    pub devices: DevicesConfig,
    /// What is logged, and how.
    pub log: LogConfig,
}

/// `[api]`
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiConfig {
    /// Path of the socket.
    pub socket: PathBuf,
    /// Its permissions, octal.
    #[serde(deserialize_with = "octal")]
    pub mode: u32,
    /// Its group, by name or number.
    pub group: Option<String>,
    /// Users that may connect beside root and the daemon's own; empty: whoever can open the socket.
    pub uids: Vec<u32>,
}

/// `[state]`
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StateConfig {
    /// Directory.
    pub dir: PathBuf,
}

/// `[dataplane]`
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataplaneConfig {
    /// Lcores for workers.
    pub cpus: CpuList,
    /// How they wait.
    pub poll: PollMode,
    /// How long a learned address lives without a frame from it.
    #[serde(deserialize_with = "duration")]
    pub ageing: Duration,
    /// Addresses that one guest may teach the switch.
    pub fdb_port_max: u32,
}

/// `[sockets]`
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SocketsConfig {
    /// Directories under which sockets may be, without a symbolic link below them; empty: anywhere.
    pub dirs: Vec<PathBuf>,
    /// Permissions of a socket that the daemon makes, octal.
    #[serde(deserialize_with = "octal")]
    pub mode: u32,
    /// Its group, by name or number.
    pub group: Option<String>,
}

/// `[ovs]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OvsConfig {
    /// Its database, `unix:PATH` or `tcp:HOST:PORT`. Only plugs into Open vSwitch need it.
    #[serde(deserialize_with = "address")]
    pub database: ovsdb::Address,
    /// What bridges are made as that a plug does not say it of; left out: in the kernel if that can.
    pub datapath_type: Option<DatapathType>,
    /// Directory of the sockets that join us with ovs-vswitchd by vhost-user; made if it is not there.
    #[serde(deserialize_with = "socket_dir")]
    pub socket_dir: PathBuf,
    /// Whether new ports with an iface-id start in the dead VLAN.
    pub isolate: bool,
    /// Whether new ports that are a guest's card get a bridge of their own.
    pub per_port_bridge: bool,
    /// Type of the row in table QoS that new ports with a device in the kernel get; `none`: they get none.
    #[serde(deserialize_with = "qos_type")]
    pub qos_type: Option<String>,
}

/// Values of `QoS.type` (ovs-vswitchd.conf.db(5)) for devices in the kernel.
const QOS_TYPES: [&str; 6] =
    ["linux-htb", "linux-hfsc", "linux-sfq", "linux-codel", "linux-fq_codel", "linux-noop"];
/// Bytes that a directory leaves of a socket's path for a port's name.
const SOCKET_DIR_BYTES_MAX: usize = PATH_BYTES_MAX - 1 - IFNAME_BYTES_MAX;

/// `[devices]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DevicesConfig {
    /// Where sysfs is mounted.
    pub sysfs: PathBuf,
    /// Driver that has a guest's device while it is plugged; left out: the one that has it.
    pub driver: Option<DriverName>,
    /// The same for a nested container's.
    pub nested_driver: DriverName,
    /// Whether frames of a guest's virtual function from other addresses are dropped; left out: as it is.
    pub spoof_check: Option<bool>,
    /// Whether a guest's virtual function is trusted; left out: as it is.
    pub trust: Option<bool>,
    /// Pid file of the lldpad that speaks 802.1Qbg with the switch.
    pub lldpad: PathBuf,
}

/// `[log]`
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Levels by target.
    pub filter: String,
    /// Form of a line.
    pub format: LogFormat,
}

/// Form of a log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self { socket: cli::API_DEFAULT.into(), mode: 0o660, group: None, uids: Vec::new() }
    }
}

impl Default for StateConfig {
    fn default() -> Self {
        Self { dir: "/var/lib/vhostd".into() }
    }
}

impl Default for DataplaneConfig {
    fn default() -> Self {
        Self {
            cpus: CpuList::default(),
            poll: PollMode::default(),
            // IEEE 802.1Q, 8.8.3: the recommended ageing time.
            ageing: Duration::from_secs(300),
            fdb_port_max: 1024,
        }
    }
}

impl Default for SocketsConfig {
    fn default() -> Self {
        Self { dirs: Vec::new(), mode: 0o660, group: None }
    }
}

impl Default for OvsConfig {
    fn default() -> Self {
        Self {
            database: ovsdb::Address::Unix("/run/openvswitch/db.sock".into()),
            datapath_type: None,
            socket_dir: "/run/vhostd/ovs".into(),
            isolate: false,
            per_port_bridge: false,
            // The one that leaves the device alone: without a row Open vSwitch takes its queueing discipline away.
            qos_type: Some("linux-noop".into()),
        }
    }
}

impl Default for DevicesConfig {
    fn default() -> Self {
        Self {
            sysfs: "/sys".into(),
            driver: None,
            nested_driver: "uio_pci_generic".parse().expect("it is a driver's name"),
            spoof_check: None,
            trust: None,
            lldpad: "/run/lldpad.pid".into(),
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { filter: "info".into(), format: LogFormat::default() }
    }
}

impl Config {
    /// The file's settings with the command line's over them.
    pub fn load(args: &ServeArgs, api: Option<&Path>) -> Result<Self, ConfigError> {
        let mut config = match &args.config {
            Some(path) => Self::read(path)?,
            None if Path::new(FILE_DEFAULT).exists() => Self::read(Path::new(FILE_DEFAULT))?,
            None => Self::default(),
        };
        if let Some(socket) = api {
            config.api.socket = socket.to_owned();
        }
        if let Some(dir) = &args.state_dir {
            config.state.dir.clone_from(dir);
        }
        if let Some(cpus) = &args.cpus {
            config.dataplane.cpus = cpus.clone();
        }
        if let Some(poll) = args.poll {
            config.dataplane.poll = poll;
        }
        Ok(config)
    }

    fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|cause| ConfigError::Read { path: path.into(), cause })?;
        toml::from_str(&text)
            .map_err(|e| ConfigError::Content { path: path.into(), cause: e.to_string().trim_end().into() })
    }
}

fn octal<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let text = String::deserialize(deserializer)?;
    let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| serde::de::Error::custom(format_args!("{text:?} is not a mode such as \"0660\"")))
}

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ovsdb::Address, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

fn socket_dir<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.starts_with('/') && text.len() <= SOCKET_DIR_BYTES_MAX {
        return Ok(text.into());
    }
    let bounds = format_args!("{text:?} is not an absolute path of at most {SOCKET_DIR_BYTES_MAX} bytes");
    Err(serde::de::Error::custom(bounds))
}

fn qos_type<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.as_str() {
        "none" => Ok(None),
        kind if QOS_TYPES.contains(&kind) => Ok(Some(text)),
        _ => Err(serde::de::Error::custom(format_args!(
            "{text:?} is not none or one of {}",
            QOS_TYPES.join(", ")
        ))),
    }
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    cli::duration(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, args: ServeArgs) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vhostd.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&ServeArgs { config: Some(path), ..args }, None)
    }

    #[test]
    fn the_example_says_what_holds_without_it() {
        let example = load(include_str!("../packaging/vhostd.toml"), ServeArgs::default()).unwrap();
        assert_eq!(format!("{example:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let text = "[dataplane]\ncpus = \"1\"\npoll = \"busy\"\n[state]\ndir = \"/a\"\n";
        let config = load(text, ServeArgs::default()).unwrap();
        assert_eq!((config.dataplane.cpus.0, config.dataplane.poll), (vec![1], PollMode::Busy));
        let args = ServeArgs {
            cpus: Some("2-3".parse().unwrap()),
            poll: Some(PollMode::Adaptive),
            state_dir: Some("/b".into()),
            config: None,
        };
        let config = load(text, args).unwrap();
        assert_eq!((config.dataplane.cpus.0, config.dataplane.poll), (vec![2, 3], PollMode::Adaptive));
        assert_eq!(config.state.dir, Path::new("/b"));
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (text, expect) in [
            ("[api]\nsockets = \"/x\"\n", "sockets"),
            ("[api]\nmode = \"0999\"\n", "0999"),
            ("[api]\nmode = 660\n", "line 2"),
            ("[dataplane]\ncpus = \"3-1\"\n", "3-1"),
            ("[dataplane]\nageing = \"soon\"\n", "soon"),
            ("[log]\nformat = \"xml\"\n", "xml"),
            ("[ovs]\ndatabase = \"/run/db.sock\"\n", "unix:PATH"),
            ("[ovs]\nsocket_dir = \"run\"\n", "absolute"),
            ("[ovs]\nqos_type = \"linux-tbf\"\n", "linux-noop"),
            ("no toml", "line 1"),
        ] {
            let error = load(text, ServeArgs::default()).unwrap_err().to_string();
            assert!(error.contains(expect), "{text:?}: {error}");
        }
        let missing = ServeArgs { config: Some("/nowhere/vhostd.toml".into()), ..ServeArgs::default() };
        assert!(matches!(Config::load(&missing, None), Err(ConfigError::Read { .. })));
    }
}
