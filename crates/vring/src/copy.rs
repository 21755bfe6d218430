//! Copies out of and into memory that another party may change meanwhile.
//!
//! All of these copy bytes that nobody has made a decision on; what is decided on was copied into private memory before.

/// Asks the cache for the line at `at`. Never faults, any address is harmless.
#[inline]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a prefetch reads nothing architecturally and cannot fault (Intel SDM, PREFETCHh).
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

/// Asks the cache for the line at `at`, to be written.
#[inline(always)]
pub(crate) fn prefetch_to_write(at: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: as in `prefetch`; a processor that does not know the hint ignores it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(at.cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

/// Defines a function twice, once for any processor and once for those with wider registers (x86-64-v3), where a copy of
/// a line takes two loads instead of four, and picks one at each call. What it calls is compiled likewise if inlined.
macro_rules! wide_registers {
    ($(#[$meta:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $result:ty { $body:expr }) => {
        $(#[$meta])*
        #[inline]
        fn $name($($arg: $type),*) -> $result {
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            {
                #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
                fn wide($($arg: $type),*) -> $result {
                    $body
                }
                if crate::copy::has_wide_registers() {
                    // SAFETY: the processor has what the function is compiled for.
                    return unsafe { wide($($arg),*) };
                }
            }
            $body
        }
    };
}
pub(crate) use wide_registers;

/// Whether the processor has what [`wide_registers`] compiles for.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
pub(crate) fn has_wide_registers() -> bool {
    use std::is_x86_feature_detected as has;
    static HAS: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        has!("avx2") && has!("bmi1") && has!("bmi2") && has!("lzcnt") && has!("popcnt")
    });
    *HAS
}

/// Copies 64 bytes.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of 64 bytes, and they do not overlap.
#[inline(always)]
unsafe fn copy_64(from: *const u8, to: *mut u8) {
    // SAFETY: passed on from the caller. A fixed length lets the compiler use registers instead of a call.
    unsafe { std::ptr::copy_nonoverlapping(from, to, 64) };
}

/// Copies `len` bytes; short copies go through registers, since most frames are short and a call per frame shows.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of `len` bytes, and they do not overlap.
#[inline(always)]
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    if (64..=128).contains(&len) {
        // SAFETY: two copies of 64 bytes that overlap in the middle cover `len` bytes and no byte more.
        unsafe {
            copy_64(from, to);
            copy_64(from.add(len - 64), to.add(len - 64));
        }
    } else {
        // SAFETY: the caller's promise, unchanged.
        unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
    }
}

/// As [`copy`], line by line in registers. Where system calls come between copies, the C library's function takes longer to
/// find its way than to copy a frame of usual length: three of a hundred cycles that a frame costs on its way to a TAP.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn copy_by_line(from: *const u8, to: *mut u8, len: usize) {
    let Some(last) = len.checked_sub(64) else {
        // SAFETY: the caller's promise, unchanged.
        return unsafe { copy(from, to, len) };
    };
    // SAFETY: the caller's promise: lines begin at multiples of 64 below the beginning of the last one, which may share bytes
    // with the one before, and ends at `len`.
    unsafe {
        for at in (0..last).step_by(64) {
            copy_64(from.add(at), to.add(at));
        }
        copy_64(from.add(last), to.add(last));
    }
}

/// As [`copy`], for two places in guest memory: a guest may lay its TX and RX buffers over each other.
///
/// # Safety
/// `from` is valid for reads and `to` for writes of `len` bytes.
#[inline]
pub(crate) unsafe fn copy_overlapping(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's promise; `copy` allows overlap.
    unsafe { std::ptr::copy(from, to, len) };
}
