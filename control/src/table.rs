//! What the API answers, printed: columns for people, or the same JSON in other clothes.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, ContentArrangement, Table};
use serde::Serialize;

use crate::api::{FdbRow, PortDrops, PortKind, PortStats, QueueMove, Worker};
use crate::cli::Format;
use crate::spec::{Device, PlugSpec, To};
use crate::status::Plug;

/// Something that makes a row.
pub trait Row: Serialize {
    /// Titles; those after the bar are shown by `-o wide` only. A title in brackets is of a number.
    const TITLES: &'static str;
    /// One cell a title.
    fn cells(&self) -> Vec<String>;
    /// What `-o name` prints.
    fn name(&self) -> String;
}

/// A list in the format asked for, with its last line feed.
pub fn list<T: Row>(rows: &[T], format: Format) -> String {
    match format {
        Format::Json => json(&rows),
        Format::Yaml => yaml(&rows),
        Format::Name => rows.iter().map(|row| row.name() + "\n").collect(),
        Format::Table | Format::Wide => columns(rows, format == Format::Wide),
    }
}

/// One plug in the format asked for.
pub fn plug(plug: &Plug, format: Format) -> String {
    match format {
        Format::Json => json(plug),
        Format::Yaml => yaml(plug),
        Format::Name => format!("{}\n", plug.id),
        Format::Table | Format::Wide => details(plug),
    }
}

/// One line about a plug that was just made, or the steps that would make it.
pub fn plugged(plug: &Plug, format: Format) -> String {
    if matches!(format, Format::Table | Format::Wide) {
        let waiting = waiting_for(plug);
        let colon = if waiting.is_empty() { "" } else { ": " };
        let line = format!("{} {}{colon}{waiting}\n", plug.id, plug.status.phase.name());
        let steps = (1..).zip(&plug.steps).map(|(number, step)| format!("{number:>3}. {step}\n"));
        return line + &steps.collect::<String>();
    }
    self::plug(plug, format)
}

/// Pretty JSON.
pub fn json(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).expect("what the API answers is plain JSON") + "\n"
}

/// YAML.
pub fn yaml(value: &impl Serialize) -> String {
    let text = serde_saphyr::to_string(value).expect("what the API answers is plain data");
    text.trim_end().to_owned() + "\n"
}

fn columns<T: Row>(rows: &[T], wide: bool) -> String {
    let (narrow, more) = T::TITLES.split_once(" | ").unwrap_or((T::TITLES, ""));
    let mut titles: Vec<&str> = narrow.split("  ").collect();
    if wide && !more.is_empty() {
        titles.extend(more.split("  "));
    }
    let bare = |title: &&str| title.trim_matches(['[', ']']).to_owned();
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(titles.iter().map(bare));
    for row in rows {
        let mut cells = row.cells();
        cells.truncate(titles.len());
        table.add_row(cells);
    }
    for (index, title) in titles.iter().enumerate() {
        let column = table.column_mut(index).expect("each title has a column");
        column.set_padding((0, 2));
        if title.starts_with('[') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn details(plug: &Plug) -> String {
    let spec = &plug.spec;
    let mut rows = vec![("name", plug.id.to_string()), ("phase", plug.status.phase.name().into())];
    let mut add = |title, value: Option<String>| rows.extend(value.map(|value| (title, value)));
    add("network", spec.network.as_ref().map(ToString::to_string));
    add("socket", (spec.socket.is_some()).then(|| socket(spec)));
    add("to", (spec.to.is_some()).then(|| to(plug)));
    for (title, value) in spec.device().map(device).into_iter().flatten() {
        add(title, value);
    }
    add("mac", spec.mac.map(|mac| mac.to_string()));
    add("mtu", spec.mtu.map(|mtu| mtu.to_string()));
    add("queues", spec.queues.map(|queues| queues.to_string()));
    for condition in &plug.status.conditions {
        add("reason", Some(condition.message.clone()));
    }
    rows.iter().map(|(title, value)| format!("{title:<12} {value}\n")).collect()
}

/// What whoever starts the guest has to know of its device.
fn device(device: &Device) -> [(&'static str, Option<String>); 4] {
    let found = device.found.clone().unwrap_or_default();
    let port = device.port.as_ref().map(|port| format!("{} in {}", text(&port.tap), port.bridge));
    [
        ("driver", device.driver.as_ref().map(ToString::to_string)),
        ("was bound to", found.driver),
        ("group", found.iommu_group.map(|group| format!("/dev/vfio/{group}"))),
        ("representor", port),
    ]
}

fn waiting_for(plug: &Plug) -> String {
    plug.status.conditions.iter().map(|c| c.message.as_str()).collect::<Vec<_>>().join("; ")
}

fn socket(spec: &PlugSpec) -> String {
    spec.socket.as_ref().map_or_else(String::new, |socket| format!("{} {}", socket.role.name(), socket.path))
}

fn to(plug: &Plug) -> String {
    plug.spec.to.as_ref().map_or_else(String::new, |to| match to {
        To::Tap(tap) => format!("tap:{}", tap.tap),
        To::Bridge(bridge) => format!("bridge:{} ({})", bridge.bridge, to.tap(&plug.id)),
        To::Ovs(ovs) => format!("ovs:{} ({})", ovs.bridge, to.tap(&plug.id)),
        To::Macvtap(macvtap) => format!("macvtap:{} ({})", macvtap.device, to.tap(&plug.id)),
        To::Device(device) => format!("device:{}", text(&device.address)),
    })
}

fn text(value: &Option<impl ToString>) -> String {
    value.as_ref().map_or_else(|| "-".into(), ToString::to_string)
}

impl Row for Plug {
    const TITLES: &'static str = "NAME  PHASE  NETWORK  SOCKET  TO | MAC  [MTU]  [QUEUES]  REASON";

    fn cells(&self) -> Vec<String> {
        let or_dash = |cell: String| if cell.is_empty() { "-".into() } else { cell };
        vec![
            self.id.to_string(),
            self.status.phase.name().into(),
            text(&self.spec.network),
            or_dash(socket(&self.spec)),
            or_dash(to(self)),
            text(&self.spec.mac),
            text(&self.spec.mtu),
            text(&self.spec.queues),
            or_dash(waiting_for(self)),
        ]
    }

    fn name(&self) -> String {
        self.id.to_string()
    }
}

impl Row for PortStats {
    const TITLES: &'static str = "PORT  [RX FRAMES]  [RX BYTES]  [TX FRAMES]  [TX BYTES]  [DROPS] | [GSO FRAMES]  [KICKS]  [CALLS]  \
                                  [RINGS]  KIND  NETWORK";

    fn cells(&self) -> Vec<String> {
        let counts = &self.counts;
        let sum =
            |read: fn(&crate::api::RingStats) -> u64| self.rings.iter().map(read).sum::<u64>().to_string();
        let kind = match self.kind {
            PortKind::VhostUser => "vhost_user",
            PortKind::FrontEnd => "front_end",
            PortKind::Tap => "tap",
        };
        vec![
            self.port.clone(),
            counts.rx_frames.to_string(),
            counts.rx_bytes.to_string(),
            counts.tx_frames.to_string(),
            counts.tx_bytes.to_string(),
            counts.drops.values().sum::<u64>().to_string(),
            counts.gso_frames.to_string(),
            sum(|ring| ring.kicks),
            sum(|ring| ring.calls),
            self.rings.len().to_string(),
            kind.into(),
            self.network.clone(),
        ]
    }

    fn name(&self) -> String {
        self.port.clone()
    }
}

impl Row for PortDrops {
    const TITLES: &'static str = "PORT  REASON  WHO  [FRAMES] | ADVICE";

    fn cells(&self) -> Vec<String> {
        let frames = self.frames.to_string();
        vec![self.port.clone(), self.reason.clone(), self.who.clone(), frames, self.advice.clone()]
    }

    fn name(&self) -> String {
        self.reason.clone()
    }
}

impl Row for FdbRow {
    const TITLES: &'static str = "NETWORK  MAC  PORT  [AGE]";

    fn cells(&self) -> Vec<String> {
        vec![self.network.clone(), self.mac.clone(), self.port.clone(), format!("{}s", self.age_s)]
    }

    fn name(&self) -> String {
        self.mac.clone()
    }
}

impl Row for QueueMove {
    const TITLES: &'static str = "PORT  [QUEUE]  [FROM]  [TO]  [SHARE]";

    fn cells(&self) -> Vec<String> {
        let share = format!("{:.1}%", self.share * 100.0);
        let numbers = [self.queue.to_string(), self.from.to_string(), self.to.to_string(), share];
        [vec![self.port.clone()], numbers.into()].concat()
    }

    fn name(&self) -> String {
        format!("{}/{}", self.port, self.queue)
    }
}

impl Row for Worker {
    const TITLES: &'static str =
        "[WORKER]  [CPU]  [NODE]  [TURNS]  [BUSY]  [FRAMES]  [PER BURST]  [CYCLES]  VRINGS";

    fn cells(&self) -> Vec<String> {
        vec![
            self.index.to_string(),
            text(&self.cpu),
            text(&self.node),
            self.turns.to_string(),
            format!("{:.1}%", self.busy_ratio * 100.0),
            self.frames.to_string(),
            format!("{:.1}", self.frames_per_burst),
            format!("{:.0}", self.cycles_per_frame),
            self.vrings.join(" "),
        ]
    }

    fn name(&self) -> String {
        self.index.to_string()
    }
}
