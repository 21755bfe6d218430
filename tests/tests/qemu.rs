//! Linux guests under QEMU on the sockets of plugs, with the host behind an uplink: what a guest does in its life, and what
//! it sees when the daemon loses its own.
//!
//! ```text
//!   one ──(QEMU connects)──┐
//!                          vhostd, network "net" ──uplink── TAP in bridge br-net: the host
//!   two ──(QEMU listens)───┘
//! ```
#![allow(clippy::unwrap_used)]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::daemon::Daemon;
use e2e::deadline::wait_for_some;
use e2e::process::Process;
use e2e::qemu::{Guest, GuestConfig, Nic, Role};
use e2e::traffic::{PingStream, Pings, TcpStream};

const HOST: &str = "10.78.0.1";
/// All plugs.
const PLUGS: [&str; 3] = ["one", "two", "uplink"];
/// For what a busy machine does soon.
const SOON: Duration = Duration::from_secs(60);
/// Between two pings of the stream that measures the gap.
const PING_INTERVAL: Duration = Duration::from_millis(10);

#[test]
fn guests_outlive_the_daemon_and_the_daemon_its_guests() {
    let mut net = Net::start(&[]).unwrap();
    let [one, two] = net.guests.each_ref().map(|guest| guest.boot(&net.daemon).unwrap());
    net.pings(&one, &two).unwrap();
    net.streams(&one, &two).unwrap();
    net.daemon_killed("its link goes down and up", &one, &two).unwrap();

    // Linux forgets its neighbours when the link goes down, asks for them in vain, and asks again after a second. A
    // guest that is not told shows the daemon's part of the gap.
    net.guests[1].properties = &["status=off"];
    let (one, two) = net.qemu_killed(one, two).unwrap();
    for _ in 0..2 {
        net.daemon_killed("its link stays up", &one, &two).unwrap();
    }
}

#[test]
fn two_queues_jumbo_frames_and_a_reboot() {
    let mut net = Net::start(&["--mtu", "9000"]).unwrap();
    for guest in &mut net.guests {
        guest.cpus = 2;
        guest.queues = 2;
        guest.mtu = Some(9000);
    }
    let [mut one, mut two] = net.guests.each_ref().map(|guest| guest.boot(&net.daemon).unwrap());
    net.interrupt_line(&one).unwrap();
    net.jumbo_frames(&one, &two).unwrap();
    net.both_queues(&one, &two).unwrap();
    net.reboot(&mut one, &mut two).unwrap();
    net.smaller_mtu(one).unwrap();
}

#[test]
fn a_guest_with_packed_rings_beside_one_without() {
    let mut net = Net::start(&[]).unwrap();
    net.guests[0].properties = &["vectors=0", "packed=on"];
    let [mut one, two] = net.guests.each_ref().map(|guest| guest.boot(&net.daemon).unwrap());
    assert_eq!([&one, &two].map(|guest| has_packed_rings(guest).unwrap()), [true, false]);
    net.pings(&one, &two).unwrap();
    net.streams(&one, &two).unwrap();
    net.reboot_one(&mut one, &two).unwrap();

    // Nothing in a packed ring says where a back end that is gone was, and QEMU, which has asked it in vain, gives the next
    // one the position of its own start. So frames do not flow again until the guest sets its card up anew.
    net.daemon.kill_and_restart().unwrap();
    net.daemon.wait_for_forwarding(&PLUGS).unwrap();
    ping(&two, HOST, "").unwrap();
    net.reboot_one(&mut one, &two).unwrap();
}

/// The daemon with a network of two guests and an uplink.
struct Net {
    daemon: Daemon,
    guests: [GuestPlan; 2],
    _alone: MutexGuard<'static, ()>,
}

/// A guest to be booted.
struct GuestPlan {
    name: &'static str,
    role: Role,
    mac: &'static str,
    address: &'static str,
    cpus: u16,
    queues: u16,
    mtu: Option<u16>,
    properties: &'static [&'static str],
}

const ONE: GuestPlan = GuestPlan {
    name: "one",
    role: Role::Client,
    mac: "52:54:00:78:00:11",
    address: "10.78.0.11",
    cpus: 1,
    queues: 1,
    mtu: None,
    // What QEMU before 10 needs is right with every QEMU.
    properties: &["vectors=0"],
};
const TWO: GuestPlan = GuestPlan {
    name: "two",
    role: Role::Server,
    mac: "52:54:00:78:00:12",
    address: "10.78.0.12",
    properties: &[],
    ..ONE
};

impl GuestPlan {
    fn boot(&self, daemon: &Daemon) -> Result<Guest> {
        let mut nic = Nic::new(&daemon.socket(self.name), self.role, self.mac);
        nic.queues = self.queues;
        nic.mtu = self.mtu;
        nic.properties = self.properties.iter().map(|property| (*property).into()).collect();
        let guest = Guest::boot(&GuestConfig { cpus: self.cpus, ..GuestConfig::new(self.name, vec![nic]) })?;
        self.configure(&guest)?;
        daemon.wait_for_forwarding(&[self.name])?;
        Ok(guest)
    }

    fn configure(&self, guest: &Guest) -> Result<()> {
        guest.check(&format!("ip addr add {}/24 dev eth0 && ip link set eth0 up", self.address)).map(drop)
    }
}

impl Net {
    /// Everything but the guests; `options` are those of all plugs.
    fn start(options: &[&str]) -> Result<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        // Emulated guests need all the CPU there is: one pair of them at a time.
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let daemon = Daemon::start()?;
        daemon.host().run(&format!(
            "ip link add br-net type bridge; ip addr add {HOST}/24 dev br-net; ip link set br-net up"
        ))?;
        let (one, two) = (daemon.socket("one"), daemon.socket("two"));
        let links = [
            ["one", "--listen", one.to_str().context("path")?],
            ["two", "--connect", two.to_str().context("path")?],
            ["uplink", "--to", "bridge:br-net"],
        ];
        for link in links {
            daemon.run(&[&["plug", "--network", "net"], &link[..], options].concat())?;
        }
        Ok(Self { daemon, guests: [ONE, TWO], _alone: alone })
    }

    fn pings(&self, one: &Guest, two: &Guest) -> Result<()> {
        self.daemon.wait_for_forwarding(&PLUGS)?;
        ping(one, TWO.address, "")?;
        ping(two, ONE.address, "")?;
        ping(one, HOST, "")?;
        ping(two, HOST, "")
    }

    /// TCP between guests and with the host, in frames larger than the MTU: nobody on the way segments them.
    fn streams(&self, one: &Guest, two: &Guest) -> Result<()> {
        let _guest_server = one.spawn("iperf3 --server")?;
        let mut server = self.daemon.host().command("iperf3");
        server.arg("--server");
        let _host_server = Process::spawn("iperf3 on the host", &server)?;
        for (to, options) in [(ONE.address, ""), (HOST, ""), (HOST, "--reverse")] {
            let before = self.daemon.gso_frames()?;
            let rate = TcpStream::start(two, to, 1, options)?.rate()?;
            let frames = self.daemon.gso_frames()? - before;
            println!("TCP two → {to} {options}: {rate:.2} Gbit/s, {frames} GSO frames");
            ensure!(frames > 0, "TCP to {to} {options}: no frame carried a segmentation request");
        }
        Ok(())
    }

    /// Nobody asks for the plugs again, and the guests do nothing but ping.
    fn daemon_killed(&mut self, how: &str, one: &Guest, two: &Guest) -> Result<()> {
        let streams = [
            ("one, where QEMU connects", PingStream::start(one, HOST, PING_INTERVAL)?),
            (&format!("two, where QEMU listens and {how}"), PingStream::start(two, HOST, PING_INTERVAL)?),
        ];
        let down = self.daemon.kill_and_restart()?;
        self.daemon.wait_for_forwarding(&PLUGS)?;
        println!("daemon killed, and answers after {} ms", down.as_millis());
        for (guest, stream) in streams {
            stream.wait_for_more(100)?;
            let (pings, gap) = stream.stop()?;
            println!("    {guest}: gap {} ms, {} of {} pings lost", gap.as_millis(), pings.lost, pings.sent);
        }
        self.pings(one, two)
    }

    /// A guest's VMM dies and comes again; the other guest does not notice.
    fn qemu_killed(&self, one: Guest, two: Guest) -> Result<(Guest, Guest)> {
        one.kill()?;
        self.wait_for_phase("one", "attached")?;
        ping(&two, HOST, "")?;
        let one = self.guests[0].boot(&self.daemon)?;
        two.kill()?;
        self.wait_for_phase("two", "attached")?;
        ping(&one, HOST, "")?;
        let two = self.guests[1].boot(&self.daemon)?;
        self.pings(&one, &two)?;
        Ok((one, two))
    }

    fn wait_for_phase(&self, plug: &str, phase: &str) -> Result<()> {
        wait_for_some(&format!("{plug} to be {phase}"), SOON, || {
            Ok((self.daemon.json(&["show", plug])?["status"]["phase"] == phase).then_some(()))
        })
    }

    /// A card without MSI-X, and so without vectors, has its interrupt line.
    fn interrupt_line(&self, one: &Guest) -> Result<()> {
        let vectors = |device| one.run(&format!("ls /sys/class/{device}/device/../msi_irqs/* 2>/dev/null"));
        ensure!(
            vectors("virtio-ports/*")?.status == 0,
            "no device has vectors, so their absence shows nothing"
        );
        ensure!(vectors("net/eth0")?.status != 0, "vectors=0, and yet: {}", vectors("net/eth0")?.stdout);
        Ok(())
    }

    /// Frames of exactly the MTU go both ways and to the host, undivided.
    fn jumbo_frames(&self, one: &Guest, two: &Guest) -> Result<()> {
        for (plug, guest) in [("one", one), ("two", two)] {
            self.ensure_mtu(plug, guest, 9000)?;
            // Linux sets DF on what fits the MTU, unless it is told not to look for the path's.
            ensure!(guest.check("cat /proc/sys/net/ipv4/ip_no_pmtu_disc")?.trim() == "0");
        }
        let ways =
            [("one", one, TWO.address), ("two", two, ONE.address), ("one", one, HOST), ("two", two, HOST)];
        for (plug, from, to) in ways {
            ping(from, to, "")?;
            let sent = || self.daemon.stats(plug)?["rx_frames"].as_u64().context("no rx_frames");
            let before = (sent()?, fragments(from)?);
            // 8 bytes of ICMP and 20 of IP make 9000.
            ping(from, to, "-s 8972")?;
            let (frames, cut) = (sent()? - before.0, fragments(from)? - before.1);
            // Twelve pings, and perhaps neighbour discovery.
            ensure!(
                (12..40).contains(&frames) && cut == 0,
                "{plug} to {to}: {frames} frames, {cut} fragments"
            );
            ping(from, to, "-s 8973")?;
            let cut = fragments(from)? - before.1;
            ensure!(cut == 24, "{plug} to {to}: twelve frames too long by a byte make {cut} fragments");
        }
        Ok(())
    }

    /// The plug allows 9000, QEMU asks for less (NET_SET_MTU), and the guest takes that.
    fn smaller_mtu(&mut self, one: Guest) -> Result<()> {
        one.kill()?;
        self.wait_for_phase("one", "attached")?;
        self.guests[0].mtu = Some(8900);
        let one = self.guests[0].boot(&self.daemon)?;
        self.ensure_mtu("one", &one, 8900)?;
        ping(&one, HOST, "-s 8872")
    }

    fn ensure_mtu(&self, plug: &str, guest: &Guest, mtu: u16) -> Result<()> {
        ensure!(guest.check("cat /sys/class/net/eth0/mtu")?.trim() == mtu.to_string());
        ensure!(self.daemon.stats(plug)?["mtu"] == mtu, "{}", self.daemon.stats(plug)?);
        Ok(())
    }

    /// Many flows from one guest to the other: both RX rings of the receiver get some, both TX rings of the sender are used.
    fn both_queues(&self, one: &Guest, two: &Guest) -> Result<()> {
        for guest in [one, two] {
            guest.check("ethtool -L eth0 combined 2 || ethtool -l eth0")?;
        }
        let _server = one.spawn("iperf3 --server")?;
        TcpStream::start(two, ONE.address, 2, "--parallel 16")?.rate()?;
        let frames = |plug: &str, index: u16, counter: &str| -> Result<u64> {
            let stats = self.daemon.stats(plug)?;
            let rings = stats["rings"].as_array().context("no rings")?;
            let ring = rings.iter().find(|ring| ring["index"] == index);
            ring.and_then(|ring| ring[counter].as_u64()).with_context(|| format!("ring {index}: {stats}"))
        };
        for pair in [0, 1] {
            let received = frames("one", 2 * pair, "tx_frames")?;
            let sent = frames("two", 2 * pair + 1, "rx_frames")?;
            println!("queue pair {pair}: {received} frames to guest one, {sent} from guest two");
            ensure!(received > 0 && sent > 0, "queue pair {pair} is not used");
        }
        Ok(())
    }

    /// Each guest is reset while the other looks on.
    fn reboot(&self, one: &mut Guest, two: &mut Guest) -> Result<()> {
        self.reboot_one(one, two)?;
        two.reset()?;
        self.guests[1].configure(two)?;
        self.pings(one, two)
    }

    fn reboot_one(&self, one: &mut Guest, two: &Guest) -> Result<()> {
        one.reset()?;
        self.guests[0].configure(one)?;
        self.pings(one, two)
    }
}

/// Whether the guest has negotiated packed rings: bit 34, as one of the digits.
fn has_packed_rings(guest: &Guest) -> Result<bool> {
    Ok(guest.check("cat /sys/class/net/eth0/device/features")?.as_bytes().get(34) == Some(&b'1'))
}

/// IP fragments that a guest has made (RFC 4293, ipSystemStatsOutFragCreates).
fn fragments(guest: &Guest) -> Result<u64> {
    let text = guest.check("grep ^Ip: /proc/net/snmp")?;
    let (names, numbers) = text.split_once('\n').context("two lines")?;
    let mut columns = names.split(' ').zip(numbers.split(' '));
    let (_, number) = columns.find(|(name, _)| *name == "FragCreates").context("no FragCreates")?;
    Ok(number.trim().parse()?)
}

/// Eleven pings, all answered after the first, which may have to find the way.
fn ping(guest: &Guest, to: &str, options: &str) -> Result<()> {
    let text = guest.check(&format!(
        "ping -c 1 -W 10 {options} {to} >/dev/null && ping -c 11 -i 0.05 -W 5 {options} {to}"
    ))?;
    let pings = Pings::parse(&text)?;
    ensure!(pings.received == pings.sent, "{text}");
    Ok(())
}
