//! SIGBUS guard for mappings of files that a peer may truncate.
//!
//! A page of a file mapping that lies beyond the file's end raises SIGBUS when it is touched. The memory of a guest
//! is such a file, and the front end may shrink it at any moment. A guard says "this range may do so": the signal
//! handler then puts private zero pages under the faulting access, counts a fault and lets the access go on. Whoever
//! works on that memory looks at the count once a burst, and treats the memory as broken when it is not zero.
//! Outside guarded ranges SIGBUS keeps its previous action, so that a real defect still ends in a core.
//!
//! What the handler replaces is not one page but the rest of the range, up to [`REPLACE_MAX`]. A file is truncated
//! at its end, so all of that is gone too; and it keeps the number of kernel mappings small. With single pages a peer
//! could make us fault on every second page until the process has no mapping left (`vm.max_map_count`, 65,530).
//! Replacement starts at a page of the file's own page size: the kernel refuses to cut a huge page. What is put there
//! is made of normal pages, since no huge page may be free.
//!
//! # Slots
//!
//! The handler may take no lock and allocate nothing, so guarded ranges live in a static table of atomics. A slot's
//! generation is odd while a range is registered. Writers hold a mutex; the handler reads generation, range,
//! generation, and passes over a slot that changed meanwhile: the range under the access that faults is registered for
//! longer than the access takes (see [`guard`]), so a slot that changes cannot be the one it looks for.
//!
//! # What the guard does not see
//!
//! A system call that touches such a page (`writev` from guest memory) raises no signal: it fails with EFAULT, or
//! returns short. The caller has to treat that as a fault itself, see [`Faults::add`].
//! A thread must not block SIGBUS: the kernel kills the process if it cannot deliver it. The process must not lock its
//! future memory (`mlockall`), or all of a replacement is populated at once.

use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Most ranges that can be guarded at one time.
pub const SLOTS_MAX: usize = 16_384;

/// Most bytes that one fault replaces, or one page if that is larger. After a truncation the rest is not populated
/// and costs nothing to replace. But a page can also be missing alone (its filesystem is full); then the populated
/// pages behind it take the handler 34 µs a MiB, up to 9 ms.
pub const REPLACE_MAX: usize = 256 << 20;

/// Why a range cannot be guarded.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// The range is empty, wraps, or does not consist of whole pages of a sane size.
    #[error("cannot guard {len} bytes at {start:#x}: not a range of whole {page_size}-byte pages")]
    Unaligned {
        /// First address.
        start: usize,
        /// Length in bytes.
        len: usize,
        /// Page size that was given.
        page_size: usize,
    },
    /// Another guard holds part of the range: it was dropped after its mapping was removed, or not at all.
    #[error("cannot guard {len} bytes at {start:#x}: part of that range is guarded already")]
    Overlap {
        /// First address.
        start: usize,
        /// Length in bytes.
        len: usize,
    },
    /// All slots are in use.
    #[error(
        "cannot guard more than {SLOTS_MAX} mappings: unplug ports or use fewer memory regions per guest"
    )]
    Full,
    /// The signal handler could not be installed.
    #[error("cannot install the SIGBUS handler")]
    Install(#[source] io::Error),
}

/// Counts the faults in one guest's memory, however many mappings it has.
#[derive(Clone, Default)]
pub struct Faults(Arc<AtomicU32>);

impl Faults {
    /// Faults so far. One relaxed load: a worker reads it once a burst.
    #[inline]
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts a fault that came as EFAULT from a system call instead of as a signal.
    pub fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Faults").field(&self.count()).finish()
    }
}

/// A guarded range. Dropping it ends the guard.
///
/// Drop it after the last access and **before** `munmap`: as soon as the addresses are free, another thread may
/// map something else there, and a fault in that must not find this guard.
#[derive(Debug)]
pub struct Guard {
    index: usize,
    // Keeps the counter alive that the slot points to.
    faults: Faults,
}

impl Guard {
    /// Faults so far in this range and in every other that was given the same [`Faults`].
    #[inline]
    pub fn faults(&self) -> u32 {
        self.faults.count()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut registry = registry();
        SLOTS[self.index].clear();
        registry.free.push(self.index);
    }
}

/// Guards `len` bytes at `start`, a mapping of a file with pages of `page_size` bytes (the huge-page size for
/// hugetlbfs). Faults are counted in `faults`. The first call installs the SIGBUS handler.
///
/// # Errors
/// See [`GuardError`].
///
/// # Safety
/// Until the guard is dropped, the whole range is one or more readable and writable file mappings that belong to the
/// caller, and the caller accepts that any part of it is replaced by private zero pages. No thread accesses the
/// range after the guard is dropped.
pub unsafe fn guard(
    start: usize,
    len: usize,
    page_size: usize,
    faults: &Faults,
) -> Result<Guard, GuardError> {
    let range = whole_pages(start, len, page_size).ok_or(GuardError::Unaligned { start, len, page_size })?;
    let mut registry = registry();
    let used = SLOTS_USED.load(Ordering::Relaxed);
    if SLOTS[..used].iter().any(|slot| slot.overlaps(&range)) {
        return Err(GuardError::Overlap { start, len });
    }
    if !registry.handler_installed {
        install_handler()?;
        registry.handler_installed = true;
    }
    let index = match registry.free.pop() {
        Some(index) => index,
        None if used < SLOTS_MAX => {
            // The slot is empty (generation 0) until it is filled below, so the order of the two does not matter.
            SLOTS_USED.store(used + 1, Ordering::Release);
            used
        }
        None => return Err(GuardError::Full),
    };
    SLOTS[index].fill(&range, page_size, faults);
    Ok(Guard { index, faults: faults.clone() })
}

fn whole_pages(start: usize, len: usize, page_size: usize) -> Option<Range<usize>> {
    let end = start.checked_add(len)?;
    let base = rustix::param::page_size();
    let whole = page_size.is_power_of_two()
        && page_size >= base
        && len > 0
        && start.is_multiple_of(page_size)
        && len.is_multiple_of(page_size);
    whole.then_some(start..end)
}

/// One guarded range as the handler sees it.
struct Slot {
    /// Odd: a range is registered.
    generation: AtomicU32,
    start: AtomicUsize,
    end: AtomicUsize,
    page_size: AtomicUsize,
    faults: AtomicPtr<AtomicU32>,
}

static SLOTS: [Slot; SLOTS_MAX] = [const { Slot::empty() }; SLOTS_MAX];
/// Slots from here on were never used: the handler does not look at them.
static SLOTS_USED: AtomicUsize = AtomicUsize::new(0);
static REGISTRY: Mutex<Registry> = Mutex::new(Registry { free: Vec::new(), handler_installed: false });

/// The writers' side. The handler never takes its lock.
struct Registry {
    /// Slots that were used before and are empty now.
    free: Vec<usize>,
    handler_installed: bool,
}

fn registry() -> std::sync::MutexGuard<'static, Registry> {
    // Nothing in here panics half-way, so a poisoned registry is still whole.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    const fn empty() -> Self {
        Self {
            generation: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page_size: AtomicUsize::new(0),
            faults: AtomicPtr::new(ptr::null_mut()),
        }
    }

    /// Under the registry's lock, on an empty slot.
    fn fill(&self, range: &Range<usize>, page_size: usize, faults: &Faults) {
        self.start.store(range.start, Ordering::Relaxed);
        self.end.store(range.end, Ordering::Relaxed);
        self.page_size.store(page_size, Ordering::Relaxed);
        self.faults.store(Arc::as_ptr(&faults.0).cast_mut(), Ordering::Relaxed);
        self.advance(Ordering::Release);
    }

    /// Under the registry's lock, on a filled slot.
    fn clear(&self) {
        self.advance(Ordering::Relaxed);
        // A handler that sees a field of the next range must see that this generation is over.
        fence(Ordering::Release);
    }

    fn advance(&self, ordering: Ordering) {
        let generation = self.generation.load(Ordering::Relaxed);
        self.generation.store(generation.wrapping_add(1), ordering);
    }

    /// Under the registry's lock.
    fn overlaps(&self, range: &Range<usize>) -> bool {
        self.generation.load(Ordering::Relaxed) % 2 == 1
            && self.start.load(Ordering::Relaxed) < range.end
            && range.start < self.end.load(Ordering::Relaxed)
    }

    /// What to replace if this slot's range holds `address`: from the start of its page to the end of the range, but
    /// not more than [`REPLACE_MAX`] bytes; and the counter. Runs in the handler.
    fn find(&self, address: usize) -> Option<(Range<usize>, usize, *const AtomicU32)> {
        let generation = self.generation.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        let page_size = self.page_size.load(Ordering::Relaxed);
        let faults = self.faults.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let stable = generation % 2 == 1 && self.generation.load(Ordering::Relaxed) == generation;
        if !stable || address < start || address >= end {
            return None;
        }
        let page = address & !(page_size - 1);
        let rest = (end - page).min(REPLACE_MAX.max(page_size));
        Some((page..page + rest, page_size, faults))
    }
}

/// What SIGBUS did before us, and does still outside guarded ranges.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

fn install_handler() -> Result<(), GuardError> {
    let previous = action(None).map_err(GuardError::Install)?;
    let on_sigbus: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    let mut ours = default_action();
    ours.sa_sigaction = on_sigbus as libc::sighandler_t;
    // SA_ONSTACK: the Rust runtime gives each thread a signal stack, and its own SIGBUS handler, to which we pass on,
    // expects to run there. A thread without one runs the handler on its ordinary stack. No SA_NODEFER: a SIGBUS
    // inside the handler is a defect and kills.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // Before our handler can run, so that it always finds it.
    let _ = PREVIOUS.set(previous);
    action(Some(&ours)).map_err(GuardError::Install)?;
    Ok(())
}

fn default_action() -> libc::sigaction {
    // SAFETY: sigaction is a plain C structure; all zeros is SIG_DFL with an empty mask and no flags.
    unsafe { std::mem::zeroed() }
}

/// Sets SIGBUS's action, if one is given; returns the one before. Async-signal-safe.
fn action(new: Option<&libc::sigaction>) -> io::Result<libc::sigaction> {
    let mut old = default_action();
    let new = new.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: `new` is null or points to a live sigaction whose handler, if any, has the signature its flags ask for;
    // `old` is a live sigaction to write to.
    let result = unsafe { libc::sigaction(libc::SIGBUS, new, &raw mut old) };
    if result == 0 { Ok(old) } else { Err(io::Error::last_os_error()) }
}

/// The signal handler. Async-signal-safe: atomics, and the system calls mmap, rt_sigaction and tgkill; errno is kept.
extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; si_addr is valid for every positive code of SIGBUS,
    // which only the kernel can send, and is merely a number here.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // Not BUS_ADRALN: replacing the page would not align the access. Not BUS_MCEERR_AO: it belongs to no access of ours.
    let page_gone = matches!(code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR);
    if page_gone && recover(address) {
        return;
    }
    pass_on(signal, info, context, code > 0);
}

/// Replaces the memory from `address` on, if it is guarded and the kernel lets us.
fn recover(address: usize) -> bool {
    let used = SLOTS_USED.load(Ordering::Acquire);
    let Some((range, page_size, faults)) = SLOTS[..used].iter().find_map(|slot| slot.find(address)) else {
        return false;
    };
    // Counted first: no thread can read a replaced page while the count is still zero.
    // SAFETY: the access that faulted precedes the drop of its guard (contract of `guard`), and the guard holds the
    // counter.
    unsafe { (*faults).fetch_add(1, Ordering::Relaxed) };
    // One page is the second choice for a host that does not overcommit.
    replace(range.start, range.len()) || replace(range.start, page_size)
}

/// Puts private zero pages at `start`. Pages are made when they are touched, so the length costs nothing.
fn replace(start: usize, len: usize) -> bool {
    // SAFETY: __errno_location returns the calling thread's errno, valid as long as the thread lives.
    let errno = unsafe { &mut *libc::__errno_location() };
    let saved = *errno;
    // SAFETY: the range lies in a guarded range, which its owner allows to be replaced at any time (contract of
    // `guard`) and which is not unmapped while an access to it is under way. It starts and ends at page boundaries of
    // the file. MAP_FIXED replaces it in one step: other threads see the old pages or the new ones. The raw system
    // call is used because libc's mmap is not promised to be async-signal-safe.
    let mapped = unsafe {
        libc::syscall(
            libc::SYS_mmap,
            start,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    *errno = saved;
    mapped != -1
}

/// Does what would have happened without us.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, from_kernel: bool) {
    if let Some(previous) = PREVIOUS.get().filter(|_| from_kernel) {
        let handler = previous.sa_sigaction;
        if handler != libc::SIG_DFL && handler != libc::SIG_IGN {
            if previous.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: whoever set SA_SIGINFO stored a function of this signature.
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(handler) };
                handler(signal, info, context);
            } else {
                // SAFETY: without SA_SIGINFO a handler that is neither default nor ignore has this signature.
                let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
                handler(signal);
            }
            return;
        }
    }
    // The access is repeated when we return, and kills with the address of the fault in the core. One that another
    // process sent does not come again by itself.
    let _ = action(Some(&default_action()));
    if !from_kernel {
        // SAFETY: raise has no conditions; the signal is delivered when the handler returns.
        unsafe { libc::raise(signal) };
    }
}

#[cfg(test)]
mod tests;
