use super::*;

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::thread;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;

/// A shared mapping of a whole memfd.
struct Shared {
    file: OwnedFd,
    start: usize,
    len: usize,
}

impl Shared {
    fn new(len: usize, flags: MemfdFlags) -> rustix::io::Result<Self> {
        let file = memfd_create("guest", flags | MemfdFlags::CLOEXEC)?;
        ftruncate(&file, len as u64)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let start = unsafe {
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)?
        };
        Ok(Self { file, start: start.addr(), len })
    }

    fn pages(count: usize) -> Self {
        Self::new(count * PAGE, MemfdFlags::empty()).unwrap()
    }

    fn guard(&self, page_size: usize) -> Guard {
        // SAFETY: the tests drop the guard before the mapping and do not touch it in between.
        unsafe { guard(self.start, self.len, page_size, &Faults::default()) }.unwrap()
    }

    fn byte(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        ptr::with_exposed_provenance_mut(self.start + offset)
    }

    fn read(&self, offset: usize) -> u8 {
        // SAFETY: in the mapping (checked by `byte`), which lives as long as self.
        unsafe { self.byte(offset).read_volatile() }
    }

    fn write(&self, offset: usize, value: u8) {
        // SAFETY: as in `read`.
        unsafe { self.byte(offset).write_volatile(value) }
    }

    fn truncate(&self, len: usize) {
        ftruncate(&self.file, len as u64).unwrap();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows it any more.
        unsafe { munmap(ptr::with_exposed_provenance_mut(self.start), self.len) }.unwrap();
    }
}

/// The kernel's mappings that lie in the range.
fn mappings(shared: &Shared) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let starts = maps.lines().filter_map(|line| usize::from_str_radix(line.split('-').next()?, 16).ok());
    starts.filter(|&start| start >= shared.start && start < shared.start + shared.len).count()
}

#[test]
fn truncated_page_reads_zero_and_is_counted() {
    let shared = Shared::pages(16);
    let guard = shared.guard(PAGE);
    shared.write(3 * PAGE, 7);
    shared.write(4 * PAGE, 8);
    assert_eq!(guard.faults(), 0);
    shared.truncate(4 * PAGE);
    assert_eq!(shared.read(3 * PAGE), 7, "what is left of the file stays");
    assert_eq!(guard.faults(), 0);
    assert_eq!(shared.read(4 * PAGE), 0);
    assert_eq!(guard.faults(), 1);
    shared.write(5 * PAGE, 9);
    assert_eq!(shared.read(5 * PAGE), 9, "the replacement can be written");
    assert_eq!(shared.read(3 * PAGE), 7);
}

#[test]
fn one_fault_replaces_the_rest_so_that_mappings_stay_few() {
    let shared = Shared::pages(1024);
    let guard = shared.guard(PAGE);
    shared.truncate(0);
    // The worst order: each page is below all that were replaced before.
    for page in (0..1024).rev().step_by(2) {
        shared.read(page * PAGE);
    }
    assert_eq!(guard.faults(), 512);
    assert!(mappings(&shared) <= 2, "{}", mappings(&shared));
    let again = Shared::pages(1024);
    let guard = again.guard(PAGE);
    again.truncate(0);
    (0..1024).for_each(|page| again.write(page * PAGE, 1));
    assert_eq!(guard.faults(), 1);
}

#[test]
fn what_one_fault_replaces_is_bounded() {
    const GIANT: usize = 1 << 30;
    let found = |start: usize, len: usize, page_size, address| {
        let slot = Slot::empty();
        slot.fill(&(start..start + len), page_size, &Faults::default());
        slot.find(address).map(|(range, ..)| range)
    };
    let (start, len) = (8 * GIANT, 4 * GIANT);
    let end = start + len;
    assert_eq!(found(start, len, PAGE, start - 1), None);
    assert_eq!(found(start, len, PAGE, end), None);
    assert_eq!(found(start, len, PAGE, start), Some(start..start + REPLACE_MAX));
    assert_eq!(found(start, len, PAGE, end - 1), Some(end - PAGE..end));
    assert_eq!(found(start, len, HUGE, end - HUGE - 1), Some(end - 2 * HUGE..end));
    assert_eq!(found(start, len, GIANT, start + 7), Some(start..start + GIANT));
}

#[test]
fn reader_and_writer_survive_truncation_under_them() {
    for _ in 0..20 {
        let shared = Shared::pages(256);
        let guard = shared.guard(PAGE);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            for writer in [true, false] {
                let (shared, stop) = (&shared, &stop);
                scope.spawn(move || {
                    let mut offset = 0;
                    while !stop.load(Ordering::Relaxed) {
                        if writer {
                            shared.write(offset, 1);
                        } else {
                            let _ = shared.read(offset);
                        }
                        offset = (offset + 61) % shared.len;
                    }
                });
            }
            for round in 0..200 {
                shared.truncate(if round % 2 == 0 { PAGE } else { shared.len });
            }
            shared.truncate(0);
            while guard.faults() == 0 {
                thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn fault_inside_a_vector_copy_is_repaired() {
    let shared = Shared::pages(64);
    let guard = shared.guard(PAGE);
    (0..shared.len).for_each(|offset| shared.write(offset, 5));
    shared.truncate(32 * PAGE);
    let mut copy = vec![1_u8; shared.len - 3];
    // SAFETY: both ranges are valid for the length, apart, and nobody else touches them in this test.
    unsafe { ptr::copy_nonoverlapping(shared.byte(3), copy.as_mut_ptr(), copy.len()) };
    let there = 32 * PAGE - 3;
    assert!(copy[..there].iter().all(|&byte| byte == 5));
    assert!(copy[there..].iter().all(|&byte| byte == 0));
    assert_eq!(guard.faults(), 1);
}

#[test]
fn two_threads_may_fault_on_one_page() {
    for _ in 0..500 {
        let shared = Shared::pages(1);
        let guard = shared.guard(PAGE);
        shared.truncate(0);
        let start = Barrier::new(2);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    start.wait();
                    assert_eq!(shared.read(100), 0);
                });
            }
        });
        assert!((1..=2).contains(&guard.faults()), "{}", guard.faults());
    }
}

#[test]
fn hole_reads_zero_without_a_fault() {
    let shared = Shared::pages(8);
    let guard = shared.guard(PAGE);
    shared.write(PAGE, 7);
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&shared.file, hole, 0, shared.len as u64).unwrap();
    assert_eq!(shared.read(PAGE), 0);
    assert_eq!(guard.faults(), 0);
}

#[test]
fn grown_back_file_stays_replaced() {
    let shared = Shared::pages(2);
    let guard = shared.guard(PAGE);
    shared.truncate(0);
    shared.write(0, 3);
    shared.truncate(shared.len);
    assert_eq!(shared.read(0), 3);
    assert_eq!(guard.faults(), 1);
}

#[test]
fn system_call_fails_instead_of_faulting() {
    let shared = Shared::pages(2);
    let guard = shared.guard(PAGE);
    shared.truncate(0);
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    // SAFETY: the mapping lives; the kernel only reads from it.
    let bytes = unsafe { std::slice::from_raw_parts(shared.byte(0), 64) };
    assert_eq!(rustix::io::write(&writer, bytes), Err(rustix::io::Errno::FAULT));
    assert_eq!(guard.faults(), 0);
    guard.faults.add();
    assert_eq!(guard.faults(), 1);
}

#[test]
fn mappings_may_share_a_counter() {
    let (one, two) = (Shared::pages(1), Shared::pages(1));
    let faults = Faults::default();
    // SAFETY: as in `Shared::guard`.
    let guards =
        [&one, &two].map(|shared| unsafe { guard(shared.start, shared.len, PAGE, &faults) }.unwrap());
    one.truncate(0);
    two.truncate(0);
    one.read(0);
    two.read(0);
    assert_eq!((faults.count(), guards[0].faults()), (2, 2));
}

#[test]
fn slots_are_reused_while_others_fault() {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let shared = Shared::pages(1);
                let guard = shared.guard(PAGE);
                shared.truncate(0);
                assert_eq!(shared.read(0), 0);
                assert_eq!(guard.faults(), 1);
            }
        });
        let (one, two) = (Shared::pages(1), Shared::pages(4));
        for _ in 0..100_000 {
            let _one = one.guard(PAGE);
            let _two = two.guard(PAGE);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(SLOTS_USED.load(Ordering::Relaxed) < 1000, "slots leak");
}

#[test]
fn huge_pages_are_replaced_whole() {
    let _lent = match HugePages::borrow(4) {
        Ok(lent) => lent,
        Err(why) => return eprintln!("SKIPPED huge_pages_are_replaced_whole: {why}"),
    };
    let shared = match Shared::new(4 * HUGE, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB) {
        Ok(shared) => shared,
        Err(error) => return eprintln!("SKIPPED huge_pages_are_replaced_whole: no huge memfd: {error}"),
    };
    let guard = shared.guard(HUGE);
    (0..4).for_each(|page| shared.write(page * HUGE, 1));
    shared.truncate(HUGE);
    assert_eq!(shared.read(3 * HUGE + 12_345), 0);
    assert_eq!(shared.read(HUGE + HUGE / 2), 0);
    shared.write(2 * HUGE - 1, 6);
    assert_eq!((shared.read(0), shared.read(2 * HUGE - 1)), (1, 6));
    assert_eq!(guard.faults(), 2);
}

/// Raises the number of huge pages for a while.
struct HugePages(usize);

impl HugePages {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";

    fn now() -> Result<usize, String> {
        let text = std::fs::read_to_string(Self::PATH).map_err(|error| format!("{}: {error}", Self::PATH))?;
        text.trim().parse().map_err(|_| format!("{}: not a number", Self::PATH))
    }

    fn borrow(count: usize) -> Result<Self, String> {
        let before = Self::now()?;
        let wanted = before + count;
        std::fs::write(Self::PATH, wanted.to_string()).map_err(|error| format!("{}: {error}", Self::PATH))?;
        let lent = Self(count);
        if Self::now()? < wanted { Err("the kernel has no memory for huge pages".into()) } else { Ok(lent) }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let now = Self::now().unwrap();
        std::fs::write(Self::PATH, now.saturating_sub(self.0).to_string()).unwrap();
    }
}

/// Runs a test of this binary in a process of its own, where it does what kills; returns the signal it died of.
fn death_of(test: &str) -> Option<i32> {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &format!("sigbus::tests::{test}")]).env(CHILD, "1");
    child.output().unwrap().status.signal()
}

const CHILD: &str = "SYS_SIGBUS_CHILD";

fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

#[test]
fn unguarded_fault_kills() {
    if is_child() {
        let (guarded, other) = (Shared::pages(1), Shared::pages(1));
        let _guard = guarded.guard(PAGE);
        guarded.truncate(0);
        guarded.read(0);
        other.truncate(0);
        other.read(0);
    } else {
        assert_eq!(death_of("unguarded_fault_kills"), Some(libc::SIGBUS));
    }
}

#[test]
fn fault_after_the_guard_is_dropped_kills() {
    if is_child() {
        let shared = Shared::pages(1);
        drop(shared.guard(PAGE));
        shared.truncate(0);
        shared.read(0);
    } else {
        assert_eq!(death_of("fault_after_the_guard_is_dropped_kills"), Some(libc::SIGBUS));
    }
}

#[test]
fn signal_from_a_process_kills() {
    if is_child() {
        let shared = Shared::pages(1);
        let _guard = shared.guard(PAGE);
        // SAFETY: kill has no conditions.
        unsafe { libc::kill(libc::getpid(), libc::SIGBUS) };
        thread::park();
    } else {
        assert_eq!(death_of("signal_from_a_process_kills"), Some(libc::SIGBUS));
    }
}

#[test]
fn previous_handlers_get_what_is_not_ours() {
    extern "C" fn plain(_: libc::c_int) {
        // SAFETY: _exit has no conditions.
        unsafe { libc::_exit(41) }
    }
    extern "C" fn with_info(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the kernel passed a valid siginfo, handed on unchanged; _exit has no conditions.
        unsafe { libc::_exit(if (*info).si_code == libc::BUS_ADRERR { 42 } else { 43 }) }
    }
    if let Some(kind) = std::env::var_os(CHILD) {
        let mut previous = default_action();
        if kind == "plain" {
            previous.sa_sigaction = plain as extern "C" fn(libc::c_int) as libc::sighandler_t;
        } else {
            let handler: extern "C" fn(_, _, _) = with_info;
            previous.sa_sigaction = handler as libc::sighandler_t;
            previous.sa_flags = libc::SA_SIGINFO;
        }
        action(Some(&previous)).unwrap();
        let (guarded, other) = (Shared::pages(1), Shared::pages(1));
        let _guard = guarded.guard(PAGE);
        other.truncate(0);
        other.read(0);
    } else {
        for (kind, code) in [("plain", 41), ("info", 42)] {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "sigbus::tests::previous_handlers_get_what_is_not_ours"]).env(CHILD, kind);
            assert_eq!(child.output().unwrap().status.code(), Some(code), "{kind}");
        }
    }
}

#[test]
fn bad_ranges_are_refused() {
    let guard = |start, len, page| {
        // SAFETY: every range below is refused.
        unsafe { guard(start, len, page, &Faults::default()) }.unwrap_err()
    };
    for (start, len, page) in [
        (PAGE, 0, PAGE),
        (PAGE + 1, PAGE, PAGE),
        (PAGE, PAGE + 1, PAGE),
        (PAGE, PAGE, HUGE),
        (PAGE, PAGE, 0),
        (PAGE, PAGE, 1),
        (PAGE, PAGE, 3 * PAGE),
        (usize::MAX - PAGE + 1, 2 * PAGE, PAGE),
    ] {
        assert!(matches!(guard(start, len, page), GuardError::Unaligned { .. }), "{start} {len} {page}");
    }
    let shared = Shared::pages(4);
    let _guard = shared.guard(PAGE);
    assert!(matches!(guard(shared.start + PAGE, PAGE, PAGE), GuardError::Overlap { .. }));
    assert!(matches!(guard(shared.start + 3 * PAGE, 2 * PAGE, PAGE), GuardError::Overlap { .. }));
}

#[test]
fn full_table_is_an_error() {
    // In a process of its own: other tests need slots.
    if is_child() {
        // Nobody touches these addresses, so nothing need be mapped there.
        let base = 1 << 40;
        let nth = |index: usize| {
            // SAFETY: no access is ever made, so nothing is replaced.
            unsafe { guard(base + index * PAGE, PAGE, PAGE, &Faults::default()) }
        };
        let mut guards: Vec<Guard> = (0..SLOTS_MAX).map(|index| nth(index).unwrap()).collect();
        assert!(matches!(nth(SLOTS_MAX), Err(GuardError::Full)));
        guards.swap_remove(77);
        nth(SLOTS_MAX).unwrap();
        // The handler finds the last of all slots, too.
        guards.pop();
        let shared = Shared::pages(1);
        let guard = shared.guard(PAGE);
        shared.truncate(0);
        shared.read(0);
        std::process::exit(if guard.faults() == 1 { 55 } else { 56 });
    } else {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "sigbus::tests::full_table_is_an_error"]).env(CHILD, "1");
        assert_eq!(child.output().unwrap().status.code(), Some(55));
    }
}
