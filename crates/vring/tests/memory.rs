//! What a front end may pass as guest memory, and what not; and that nothing of it stays.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod model;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use model::{Beside, Model, Rig, noise, regions};
use rustix::event::{EventfdFlags, epoll};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use vring::driver::{DriverMemory, DriverRing};
use vring::{
    Frames, GuestMemory, MemoryError, PORT_BYTES_MAX, RegionSpec, RingError, RingFault, RingSetup,
    TOTAL_BYTES_MAX, TxRing, features,
};

const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;

/// The budget of all ports together and the fault guard's slots belong to the process: who uses them up is alone.
static PROCESS: RwLock<()> = RwLock::new(());

fn shared() -> RwLockReadGuard<'static, ()> {
    PROCESS.read().unwrap_or_else(PoisonError::into_inner)
}

fn alone() -> RwLockWriteGuard<'static, ()> {
    PROCESS.write().unwrap_or_else(PoisonError::into_inner)
}

fn memfd(name: &str, len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

/// A region whose addresses are its place in the file.
fn region(at: u64, size: u64) -> RegionSpec {
    RegionSpec { guest_addr: 0x1_0000_0000 + at, size, user_addr: 0x7000_0000_0000 + at, mmap_offset: at }
}

/// Maps regions of one file of `len` bytes.
fn map(len: u64, specs: &[RegionSpec]) -> Result<GuestMemory, MemoryError> {
    let fd = memfd("vring-memory", len);
    let table: Vec<_> = specs.iter().map(|spec| (*spec, fd.try_clone().unwrap())).collect();
    GuestMemory::map(&table)
}

/// Mappings of files of that name in this process.
fn mappings(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(name)).count()
}

#[test]
fn number_of_regions() {
    let _process = shared();
    let max = GuestMemory::REGIONS_MAX as u64;
    let pages = |count: u64| (0..count).map(|i| region(i * PAGE, PAGE)).collect::<Vec<_>>();
    assert!(matches!(map(PAGE, &[]), Err(MemoryError::Count(0))));
    assert!(matches!(map((max + 1) * PAGE, &pages(max + 1)), Err(MemoryError::Count(510))));
    let full = map(max * PAGE, &pages(max)).unwrap();
    assert_eq!((full.regions().len(), full.bytes()), (509, 509 * PAGE));
    let one_more = memfd("vring-memory", (max + 1) * PAGE);
    let refused = full.with_region(region(max * PAGE, PAGE), one_more.as_fd());
    assert!(matches!(refused, Err(MemoryError::Count(510))));
}

#[test]
fn regions_that_overlap_or_touch() {
    let _process = shared();
    let first = region(0, 4 * PAGE);
    let second = region(4 * PAGE, 4 * PAGE);
    assert!(map(8 * PAGE, &[second, first]).is_ok(), "neighbours, in any order");
    let cases = [
        ("identical", first),
        ("guest addresses by one byte", RegionSpec { guest_addr: second.guest_addr - 1, ..second }),
        ("user addresses by one byte", RegionSpec { user_addr: second.user_addr - 1, ..second }),
        (
            "guest addresses: one inside the other",
            RegionSpec { guest_addr: first.guest_addr + 1, size: 1, ..second },
        ),
        (
            "user addresses: one inside the other",
            RegionSpec { user_addr: first.user_addr + 1, size: 1, ..second },
        ),
    ];
    for (what, other) in cases {
        for table in [[first, other], [other, first]] {
            assert!(matches!(map(8 * PAGE, &table), Err(MemoryError::Overlap(..))), "{what}");
        }
        let memory = map(8 * PAGE, &[first]).unwrap();
        let file = memfd("vring-memory", 8 * PAGE);
        assert!(matches!(memory.with_region(other, file.as_fd()), Err(MemoryError::Overlap(..))), "{what}");
    }
    let same_bytes = RegionSpec { mmap_offset: 0, ..second };
    assert!(
        map(8 * PAGE, &[first, same_bytes]).is_ok(),
        "the same bytes at two addresses are the guest's business"
    );
}

#[test]
fn sizes_and_addresses() {
    let _process = shared();
    let at = region(0, PAGE);
    let last = u64::MAX;
    assert!(matches!(map(PAGE, &[RegionSpec { size: 0, ..at }]), Err(MemoryError::Empty(_))));
    for wraps in [
        RegionSpec { guest_addr: last - PAGE + 1, ..at },
        RegionSpec { guest_addr: last, size: 1, ..at },
        RegionSpec { user_addr: last - PAGE + 1, ..at },
        RegionSpec { mmap_offset: last - PAGE + 1, ..at },
        RegionSpec { size: last, ..at },
    ] {
        assert!(matches!(map(PAGE, &[wraps]), Err(MemoryError::Wraps(_))), "{wraps:?}");
    }
    assert!(map(PAGE, &[RegionSpec { guest_addr: 0, user_addr: 0, ..at }]).is_ok(), "0 is an address");
    assert!(map(PAGE, &[RegionSpec { guest_addr: last - PAGE, ..at }]).is_ok(), "the last page but one byte");
    assert!(map(PAGE, &[region(1, PAGE - 1)]).is_ok(), "offsets need not be aligned");
}

#[test]
fn files_that_are_too_short() {
    let _process = shared();
    let too_short = |len, spec| match map(len, &[spec]) {
        Err(MemoryError::FileTooShort { end, file_len, .. }) => Some((end, file_len)),
        Err(other) => panic!("{other}"),
        Ok(_) => None,
    };
    assert_eq!(too_short(PAGE, region(0, PAGE)), None);
    assert_eq!(too_short(PAGE, region(0, PAGE + 1)), Some((PAGE + 1, PAGE)));
    assert_eq!(too_short(PAGE, region(1, PAGE)), Some((PAGE + 1, PAGE)));
    assert_eq!(too_short(PAGE, region(PAGE, 1)), Some((PAGE + 1, PAGE)));
    assert_eq!(too_short(0, region(0, 1)), Some((1, 0)));
    let far = RegionSpec { mmap_offset: u64::MAX - PAGE, ..region(0, PAGE) };
    assert_eq!(too_short(PAGE, far), Some((u64::MAX, PAGE)));
}

#[test]
fn one_bad_region_leaves_nothing_of_the_others() {
    let _process = shared();
    let name = "vring-memory-partial";
    let fd = memfd(name, 4 * PAGE);
    let table =
        [(region(0, PAGE), fd.try_clone().unwrap()), (region(PAGE, 4 * PAGE), fd.try_clone().unwrap())];
    assert!(matches!(GuestMemory::map(&table), Err(MemoryError::FileTooShort { .. })));
    let closed = reopened(&fd, OFlags::RDONLY);
    let table = [(region(0, PAGE), fd.try_clone().unwrap()), (region(PAGE, PAGE), closed)];
    assert!(matches!(GuestMemory::map(&table), Err(MemoryError::Map { .. })));
    assert_eq!(mappings(name), 0);
}

fn reopened(fd: &OwnedFd, flags: OFlags) -> OwnedFd {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[test]
fn descriptors_that_are_no_memory() {
    let _process = shared();
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let manifest = open(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    let kinds = [
        ("a pipe", rustix::pipe::pipe().unwrap().0),
        ("a socket", UnixStream::pair().unwrap().0.into()),
        ("a directory", open("/tmp")),
        ("a device", open("/dev/zero")),
        ("no file", rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap()),
        ("no file", epoll::create(epoll::CreateFlags::CLOEXEC).unwrap()),
        ("a file on file system", open("/proc/self/maps")),
        ("a file on file system", manifest),
    ];
    for (kind, fd) in kinds {
        let spec = region(0, PAGE);
        match GuestMemory::map(&[(spec, fd)]) {
            Err(MemoryError::Kind { found, .. }) => assert!(found.starts_with(kind), "{kind}: {found}"),
            other => panic!("{kind}: {other:?}"),
        }
    }
    let memory = memfd("vring-memory-kinds", PAGE);
    let sealed = memfd("vring-memory-kinds", PAGE);
    rustix::fs::fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    let unmappable = [
        ("read-only", reopened(&memory, OFlags::RDONLY)),
        ("write-only", reopened(&memory, OFlags::WRONLY)),
        ("O_PATH", reopened(&memory, OFlags::PATH)),
        ("write-sealed", sealed),
    ];
    for (what, fd) in unmappable {
        assert!(matches!(GuestMemory::map(&[(region(0, PAGE), fd)]), Err(MemoryError::Map { .. })), "{what}");
    }
    assert_eq!(mappings("vring-memory-kinds"), 0);
}

#[test]
fn seals_are_noted() {
    let _process = shared();
    let fd = memfd("vring-memory", PAGE);
    let at = |fd: &OwnedFd| [(region(0, PAGE), fd.try_clone().unwrap())];
    assert!(GuestMemory::map(&at(&fd)).unwrap().shrinkable());
    rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW).unwrap();
    assert!(GuestMemory::map(&at(&fd)).unwrap().shrinkable());
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    assert!(!GuestMemory::map(&at(&fd)).unwrap().shrinkable());
}

#[test]
fn budgets() {
    let _process = alone();
    let sparse = memfd("vring-memory-budget", PORT_BYTES_MAX + PAGE);
    let port = |size| GuestMemory::map(&[(region(0, size), sparse.try_clone().unwrap())]);
    assert!(matches!(port(PORT_BYTES_MAX + 1), Err(MemoryError::Budget { scope: "one port", .. })));
    let whole = port(PORT_BYTES_MAX).unwrap();
    let more = RegionSpec { mmap_offset: 0, ..region(PORT_BYTES_MAX, PAGE) };
    let refused = whole.with_region(more, sparse.as_fd());
    assert!(matches!(refused, Err(MemoryError::Budget { scope: "one port", .. })));
    drop(whole);
    // Twice: what was given back can be had again.
    for _ in 0..2 {
        let ports: Vec<_> =
            (0..TOTAL_BYTES_MAX / PORT_BYTES_MAX).map(|_| port(PORT_BYTES_MAX).unwrap()).collect();
        let refused = port(PAGE);
        assert!(matches!(refused, Err(MemoryError::Budget { scope: "all ports together", .. })));
        assert_eq!(mappings("vring-memory-budget"), ports.len(), "the others are not affected");
    }
    assert_eq!(mappings("vring-memory-budget"), 0);
}

#[test]
fn more_regions_than_the_fault_guard_has_slots() {
    let _process = alone();
    let max = GuestMemory::REGIONS_MAX as u64;
    let fd = memfd("vring-memory-slots", max * PAGE);
    let table: Vec<_> = (0..max).map(|i| (region(i * PAGE, PAGE), fd.try_clone().unwrap())).collect();
    let mut ports = Vec::new();
    let refused = loop {
        match GuestMemory::map(&table) {
            Ok(port) => ports.push(port),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, MemoryError::Guard { .. }), "{refused}");
    assert_eq!(ports.len(), sys::sigbus::SLOTS_MAX / table.len());
    drop(ports);
    assert_eq!(mappings("vring-memory-slots"), 0);
    assert!(GuestMemory::map(&table).is_ok(), "the slots are free again");
}

#[test]
fn adding_and_removing_regions_shares_mappings() {
    let _process = shared();
    let name = "vring-memory-shared";
    let fd = memfd(name, 16 * PAGE);
    // Not neighbours in the file: the kernel would show neighbours as one mapping.
    let [a, b, c] = [0, 4, 8].map(|page| region(page * PAGE, PAGE));
    let table = [(a, fd.try_clone().unwrap()), (c, fd.try_clone().unwrap())];
    let two = GuestMemory::map(&table).unwrap();
    assert_eq!(mappings(name), 2);
    let three = two.with_region(b, fd.as_fd()).unwrap();
    assert_eq!(mappings(name), 3);
    assert_eq!(three.regions(), [a, b, c], "ascending");
    let twice = three.with_region(b, fd.as_fd()).unwrap();
    assert_eq!((twice.regions(), mappings(name)), (vec![a, b, c], 3), "added twice");
    let once = twice.without_region(&b).unwrap();
    assert_eq!(once.regions(), [a, b, c], "removed once");
    assert_eq!(once.without_region(&b).unwrap().regions(), [a, c], "removed twice");
    drop((twice, once));
    let other = memfd("vring-memory-other", 16 * PAGE);
    assert!(matches!(three.with_region(b, other.as_fd()), Err(MemoryError::Overlap(..))), "another file");
    let one = three.without_region(&a).unwrap().without_region(&c).unwrap();
    assert_eq!((one.regions(), one.bytes()), (vec![b], PAGE));
    drop((two, three));
    assert_eq!(mappings(name), 1, "only what is still in a table is mapped");
    for unknown in
        [a, RegionSpec { size: 1, ..b }, RegionSpec { user_addr: 1, ..b }, RegionSpec { guest_addr: 1, ..b }]
    {
        assert!(matches!(one.without_region(&unknown), Err(MemoryError::Unknown(_))), "{unknown}");
    }
    // The specification does not tell by the offset which region is meant.
    let empty = one.without_region(&RegionSpec { mmap_offset: 77, ..b }).unwrap();
    assert_eq!(empty.bytes(), 0);
    drop(one);
    assert_eq!(mappings(name), 0);
    assert!(empty.with_region(a, fd.as_fd()).is_ok(), "an emptied table can grow again");
}

#[test]
fn the_same_table_again() {
    let _process = shared();
    let fd = memfd("vring-memory", 4 * PAGE);
    let other = memfd("vring-memory", 4 * PAGE);
    let [a, b] = [region(0, PAGE), region(2 * PAGE, PAGE)];
    let table = |files: [(RegionSpec, &OwnedFd); 2]| files.map(|(spec, fd)| (spec, fd.try_clone().unwrap()));
    let memory = GuestMemory::map(&table([(a, &fd), (b, &fd)])).unwrap();
    assert!(memory.is_same(&table([(a, &fd), (b, &fd)])));
    assert!(memory.is_same(&table([(b, &fd), (a, &fd)])), "in any order");
    assert!(!memory.is_same(&table([(a, &fd), (b, &other)])), "another file");
    let moved = RegionSpec { mmap_offset: PAGE, ..b };
    assert!(!memory.is_same(&table([(a, &fd), (moved, &fd)])), "elsewhere in the file");
    assert!(!memory.is_same(&table([(a, &fd), (b, &fd)])[..1]), "fewer regions");
    assert!(!GuestMemory::default().is_same(&table([(a, &fd), (b, &fd)])));
}

#[test]
fn guest_memory_is_left_out_of_core_dumps() {
    let _process = shared();
    let name = "vring-memory-dump";
    let fd = memfd(name, PAGE);
    let _memory = GuestMemory::map(&[(region(0, PAGE), fd)]).unwrap();
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let ours = smaps.split_once(name).unwrap().1;
    let flags = ours.lines().find(|line| line.starts_with("VmFlags")).unwrap();
    assert!(flags.contains(" dd"), "{flags}");
}

fn rig(parts: &[(usize, u64)]) -> Rig {
    let image = noise(parts.iter().map(|(len, _)| len).sum(), 1);
    Rig::new(Model::new(image, regions(parts), 16, 1 << features::VERSION_1, 0))
}

#[test]
fn rings_lie_whole_in_one_region_and_aligned() {
    let _process = shared();
    let page = 4096;
    let rig = rig(&[(page, 0), (page, PAGE)]);
    let base = rig.memory.region().user_addr;
    type Change = &'static dyn Fn(&mut RingSetup, u64);
    let start = |change: Change| {
        let mut setup = rig.setup(None);
        change(&mut setup, base);
        TxRing::start(setup, &rig.mapped).map(|ring| ring.size())
    };
    assert!(matches!(start(&|_, _| ()), Ok(16)));
    for size in [0, 3, 15, 33, 32_769, u16::MAX] {
        let setup = RingSetup { size, ..rig.setup(None) };
        let refused = TxRing::start(setup, &rig.mapped).map(|ring| ring.size());
        assert!(matches!(refused, Err(RingError::Size(s)) if s == size));
    }
    // The table of 16 ends with its region, or one descriptor behind it: the next region is elsewhere.
    assert!(start(&|s, base| s.desc_user_addr = base + PAGE - 256).is_ok());
    let unmapped: [(&str, Change); 8] = [
        ("descriptor table", &|s, base| s.desc_user_addr = base + PAGE - 240),
        ("descriptor table", &|s, base| s.desc_user_addr = base - 16),
        ("descriptor table", &|s, _| s.desc_user_addr = u64::MAX - 15),
        ("descriptor table", &|s, _| s.size = 1024),
        ("available ring", &|s, base| s.avail_user_addr = base + PAGE - 36),
        ("available ring", &|s, _| s.avail_user_addr = 0),
        ("used ring", &|s, base| s.used_user_addr = base + 2 * PAGE - 132),
        ("used ring", &|s, base| s.used_user_addr = base + 2 * PAGE),
    ];
    for (part, change) in unmapped {
        match start(change) {
            Err(RingError::Unmapped { part: found, .. }) => assert_eq!(found, part),
            other => panic!("{part}: {other:?}"),
        }
    }
    let unaligned: [(&str, Change); 3] = [
        ("descriptor table", &|s, _| s.desc_user_addr += 8),
        ("available ring", &|s, _| s.avail_user_addr += 1),
        ("used ring", &|s, _| s.used_user_addr += 2),
    ];
    for (part, change) in unaligned {
        match start(change) {
            Err(RingError::Unaligned { part: found, .. }) => assert_eq!(found, part),
            other => panic!("{part}: {other:?}"),
        }
    }
    // Aligned for the front end, not for us: the region begins at an odd offset of the file.
    let memory = DriverMemory::new(8192).unwrap();
    let odd = RegionSpec { mmap_offset: 1, size: PAGE, ..memory.region() };
    let mapped = Arc::new(GuestMemory::map(&[(odd, memory.fd().try_clone_to_owned().unwrap())]).unwrap());
    let mut setup = rig.setup(None);
    setup.desc_user_addr = odd.user_addr;
    assert!(matches!(TxRing::start(setup, &mapped), Err(RingError::Unaligned { .. })));
}

#[test]
fn a_running_ring_goes_on_in_a_new_table_or_breaks() {
    let _process = shared();
    let mut rig = rig(&[(4096, 0), (4096, 0), (4096, 0)]);
    let mut ring = rig.start_tx();
    let fewer = Arc::new(rig.mapped.without_region(&rig.mapped.regions()[2]).unwrap());
    assert_eq!(ring.set_memory(&fewer), Ok(()));
    assert_eq!(ring.is_empty(), Ok(true));
    let mut rx = rig.start_rx();
    assert_eq!(rx.set_memory(&fewer), Ok(()));
    let without_ring = Arc::new(fewer.without_region(&rig.mapped.regions()[0]).unwrap());
    assert_eq!(ring.set_memory(&without_ring), Err(RingFault::Unmapped));
    assert_eq!(rx.set_memory(&without_ring), Err(RingFault::Unmapped));
}

#[test]
fn a_ring_keeps_its_memory() {
    let _process = shared();
    let fd = memfd("vring-memory-kept", 4 * PAGE);
    let memory = DriverMemory::new(4096).unwrap();
    let ring = DriverRing::new(&memory, 0, 16, 0);
    let spec = RegionSpec { size: 4 * PAGE, mmap_offset: 0, ..memory.region() };
    let mapped = Arc::new(GuestMemory::map(&[(spec, fd)]).unwrap());
    let [desc_user_addr, avail_user_addr, used_user_addr] = ring.user_addrs();
    let setup = RingSetup {
        size: 16,
        desc_user_addr,
        avail_user_addr,
        used_user_addr,
        base: 0,
        features: 0,
        kick: None,
        call: None,
        err: None,
        enabled: true,
    };
    let mut tx = TxRing::start(setup, &mapped).unwrap();
    drop(mapped);
    assert_eq!(mappings("vring-memory-kept"), 1);
    assert_eq!(tx.is_empty(), Ok(true));
    drop(tx);
    assert_eq!(mappings("vring-memory-kept"), 0);
}

/// Front ends split one file into several regions, so a region may begin anywhere in a huge page.
#[test]
fn huge_pages() {
    let _process = shared();
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(fd) = rustix::fs::memfd_create("vring-memory-huge", flags) else {
        return println!("skipped: this kernel has no pages of 2 MiB");
    };
    rustix::fs::ftruncate(&fd, 2 * HUGE).unwrap();
    let inner = RegionSpec { mmap_offset: HUGE - 2 * PAGE, ..region(0, HUGE) };
    let mapped = Arc::new(GuestMemory::map(&[(inner, fd.try_clone().unwrap())]).unwrap());
    assert_eq!(mappings("vring-memory-huge"), 1);
    let setup = RingSetup {
        size: 16,
        desc_user_addr: inner.user_addr,
        avail_user_addr: inner.user_addr + 1024,
        used_user_addr: inner.user_addr + 2048,
        base: 0,
        features: 0,
        kick: None,
        call: None,
        err: None,
        enabled: true,
    };
    let mut ring = TxRing::start(setup, &mapped).unwrap();
    let mut frames = Frames::default();
    let found = ring.dequeue(&mut frames).map(|burst| burst.burst.len());
    if mapped.faulted() {
        println!("no free pages of 2 MiB: only shown that this breaks the ring and not the process");
        assert_eq!(found, Err(RingFault::Truncated));
    } else {
        // The device's flags are where the front end's offset says.
        let mut flags = [0; 2];
        rustix::io::pread(&fd, &mut flags, inner.mmap_offset + 2048).unwrap();
        assert_eq!((found, flags), (Ok(0), [1, 0]));
    }
    drop((ring, mapped));
    assert_eq!(mappings("vring-memory-huge"), 0);
}
