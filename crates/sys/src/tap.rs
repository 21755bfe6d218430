//! TAP devices: one [`TapQueue`] per file descriptor of a device.
//!
//! A TAP is a kernel interface whose other end is a file descriptor: a frame that the kernel sends out of the
//! interface is read from the descriptor, and one written to it is received by the interface. With multi-queue, up
//! to 256 descriptors belong to one device, and the kernel spreads flows over them. Each frame is preceded by a
//! virtio-net header of 12 bytes ([`VNET_HEADER_LEN`]) in little-endian, whatever the host: the one a guest with
//! VIRTIO_F_VERSION_1 uses, so it can travel unchanged.
//!
//! The device vanishes with its last descriptor, unless it is persistent.
//!
//! A macvtap is a TAP on top of another interface: what is written to it leaves through that one. Its descriptors come from a
//! character device of its own, and it is made and removed as an interface; otherwise it is the same.

use std::ffi::CStr;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6};

use crate::fail_point;

/// Bytes of virtio-net header before each frame (virtio 1.2, 5.1.6: with num_buffers).
pub const VNET_HEADER_LEN: usize = 12;

/// Longest name of an interface, in bytes (the kernel's IFNAMSIZ less the terminating zero).
pub const NAME_MAX: usize = libc::IFNAMSIZ - 1;

const CLONE_DEVICE: &str = "/dev/net/tun";

/// Why a TAP cannot be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel would refuse, change or expand the name, or people could not tell it from another.
    #[error(
        "interface name {name:?} {why}: give 1 to {NAME_MAX} printable ASCII characters without space, '/', ':', '%'"
    )]
    Name {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The device through which TAPs are made cannot be opened.
    #[error("cannot open {CLONE_DEVICE}: load the kernel module tun, or let this process use that device")]
    CloneDevice(#[source] io::Error),
    /// The kernel refused the descriptor a place at the device.
    #[error("cannot attach to TAP {name}")]
    Attach {
        /// The interface.
        name: String,
        /// EBUSY: somebody else holds it, or it exists and was to be created. EINVAL: it is no TAP, or differs in
        /// multi-queue. EPERM: it needs CAP_NET_ADMIN. E2BIG: all its queues are taken.
        source: io::Error,
    },
    /// The character device of a macvtap cannot be opened.
    #[error("cannot open {}, the device of macvtap {name}", node.display())]
    Node {
        /// The interface.
        name: String,
        /// Its device.
        node: PathBuf,
        /// ENOENT: nobody has made it (devtmpfs, or udev). EPERM: the cgroup of this process has no such device.
        source: io::Error,
    },
    /// The character device is another's: interfaces of several network namespaces share one directory of devices.
    #[error("{} is not the device of macvtap {name}: is there one of the same number in another namespace?", node.display())]
    OtherNode {
        /// The interface.
        name: String,
        /// What should be its device.
        node: PathBuf,
    },
    /// A request about an attached queue failed.
    #[error("{request} failed on a TAP queue")]
    Request {
        /// The ioctl's name.
        request: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl TapError {
    /// The kernel's error number, if it comes from the kernel.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Name { .. } | Self::OtherNode { .. } => None,
            Self::Node { source, .. }
            | Self::CloneDevice(source)
            | Self::Attach { source, .. }
            | Self::Request { source, .. } => source.raw_os_error(),
        }
    }
}

/// Checks the name of an interface that is to be made or looked for.
///
/// # Errors
/// [`TapError::Name`]. A `%` counts as an error since the kernel expands `tap%d` to the next free number.
pub fn check_name(name: &str) -> Result<(), TapError> {
    let bad = |&byte: &u8| !byte.is_ascii_graphic() || matches!(byte, b'/' | b':' | b'%');
    let why = match name {
        "" => "is empty",
        "." | ".." => "is the name of a directory",
        _ if name.len() > NAME_MAX => "is too long",
        _ if name.as_bytes().iter().any(bad) => "has a character that is not allowed",
        _ => return Ok(()),
    };
    Err(TapError::Name { name: name.to_owned(), why })
}

/// One queue of a TAP: a non-blocking descriptor to read frames from and write frames to.
#[derive(Debug)]
pub struct TapQueue(OwnedFd);

impl TapQueue {
    /// Attaches to the TAP `name`, which is made if it does not exist.
    ///
    /// # Errors
    /// [`TapError::Name`], [`TapError::CloneDevice`], [`TapError::Attach`].
    pub fn open(name: &str, multi_queue: bool) -> Result<Self, TapError> {
        Self::attach(name, multi_queue, 0)
    }

    /// Makes the TAP `name` and attaches to it.
    ///
    /// # Errors
    /// As [`open`](Self::open); EBUSY if an interface of that name exists.
    pub fn create(name: &str, multi_queue: bool) -> Result<Self, TapError> {
        Self::attach(name, multi_queue, libc::IFF_TUN_EXCL)
    }

    fn attach(name: &str, multi_queue: bool, extra: libc::c_int) -> Result<Self, TapError> {
        check_name(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(CLONE_DEVICE)
            .map_err(TapError::CloneDevice)?;
        let multi = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        Self(file.into()).with_header(name, multi | extra)
    }

    /// Opens one more queue of the macvtap `name`, whose number is `ifindex`. The kernel spreads flows over all of them.
    /// Devices of all network namespaces are in one directory by that number, so the name and the address tell whether it is
    /// the right one.
    ///
    /// # Errors
    /// [`TapError::Name`], [`TapError::Node`], [`TapError::OtherNode`], [`TapError::Attach`].
    pub fn open_macvtap(name: &str, ifindex: u32, address: &[u8]) -> Result<Self, TapError> {
        check_name(name)?;
        Self::open_node(name, address, Path::new(&format!("/dev/tap{ifindex}")))
    }

    fn open_node(name: &str, address: &[u8], node: &Path) -> Result<Self, TapError> {
        let failed = |source| TapError::Node { name: name.to_owned(), node: node.to_owned(), source };
        let other = || TapError::OtherNode { name: name.to_owned(), node: node.to_owned() };
        // Nothing is opened that might hang or do something when it is.
        if !node.metadata().map_err(failed)?.file_type().is_char_device() {
            return Err(other());
        }
        let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).to_owned();
        let queue = Self(options.open(node).map_err(failed)?.into());
        let is_it = queue.name().ok().as_deref() == Some(name)
            && queue.address().is_ok_and(|bytes| bytes == *address);
        if !is_it {
            return Err(other());
        }
        queue.with_header(name, libc::IFF_MULTI_QUEUE)
    }

    /// Joins the device, with the virtio-net header of this module.
    fn with_header(self, name: &str, extra: libc::c_int) -> Result<Self, TapError> {
        fail_point::pass(format_args!("attach to TAP {name}"));
        let mut request = ifreq(name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | extra);
        // SAFETY: TUNSETIFF reads and writes an ifreq.
        unsafe { self.ioctl("TUNSETIFF", libc::TUNSETIFF, &raw mut request) }.map_err(
            |error| match error {
                TapError::Request { source, .. } => TapError::Attach { name: name.to_owned(), source },
                other => other,
            },
        )?;
        let len = libc::c_int::try_from(VNET_HEADER_LEN).expect("12 fits");
        self.set_int("TUNSETVNETHDRSZ", libc::TUNSETVNETHDRSZ, len)?;
        // The default is the host's byte order.
        self.set_int("TUNSETVNETLE", libc::TUNSETVNETLE, 1)?;
        Ok(self)
    }

    /// Tells the kernel which of `TUN_F_…` it may leave to the reader of this device, all queues alike; returns what
    /// was set. Kernels before 6.2 have no USO: there it is left out.
    ///
    /// # Errors
    /// [`TapError::Request`], EINVAL for bits that do not go together (TSO without CSUM, USO4 without USO6).
    pub fn set_offload(&self, bits: u32) -> Result<u32, TapError> {
        fail_point::pass(format_args!("set a TAP's offloads to {bits:#x}"));
        let set = |bits| {
            // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory.
            let result =
                unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) };
            checked("TUNSETOFFLOAD", result).map(|()| bits)
        };
        let without_uso = bits & !(TUN_F_USO4 | TUN_F_USO6);
        match set(bits) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && without_uso != bits => {
                set(without_uso)
            }
            result => result,
        }
    }

    /// Says whether the device stays when its last queue is closed.
    ///
    /// # Errors
    /// [`TapError::Request`].
    pub fn set_persist(&self, persist: bool) -> Result<(), TapError> {
        fail_point::pass(format_args!("set a TAP's persistence to {persist}"));
        // SAFETY: TUNSETPERSIST takes its argument by value and touches no memory.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETPERSIST, libc::c_ulong::from(persist)) };
        checked("TUNSETPERSIST", result)
    }

    /// Switches this queue of a multi-queue device off or on. The kernel sends no flow to a queue that is off.
    ///
    /// # Errors
    /// [`TapError::Request`], EINVAL if the queue is that way already or the device has one queue only.
    pub fn set_enabled(&self, enabled: bool) -> Result<(), TapError> {
        fail_point::pass(format_args!("switch a TAP's queue to {enabled}"));
        let mut request = ifreq("", if enabled { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE });
        // SAFETY: TUNSETQUEUE reads an ifreq.
        unsafe { self.ioctl("TUNSETQUEUE", libc::TUNSETQUEUE, &raw mut request) }
    }

    /// The interface's present name: an administrator may have renamed it.
    ///
    /// # Errors
    /// [`TapError::Request`], EBADFD if the interface was deleted.
    pub fn name(&self) -> Result<String, TapError> {
        let request = self.ifreq()?;
        let bytes = request.ifr_name.map(libc::c_char::cast_unsigned);
        let name = CStr::from_bytes_until_nul(&bytes).expect("the kernel terminates names");
        Ok(name.to_string_lossy().into_owned())
    }

    /// The interface's Ethernet address.
    ///
    /// # Errors
    /// As [`name`](Self::name).
    pub fn address(&self) -> Result<[u8; 6], TapError> {
        let mut request = ifreq("", 0);
        // SAFETY: SIOCGIFHWADDR writes an ifreq.
        unsafe { self.ioctl("SIOCGIFHWADDR", libc::SIOCGIFHWADDR as libc::Ioctl, &raw mut request) }?;
        // SAFETY: the kernel filled in a hardware address, and any bytes are one.
        let bytes = unsafe { request.ifr_ifru.ifru_hwaddr }.sa_data.map(libc::c_char::cast_unsigned);
        Ok([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5]])
    }

    /// The device's `IFF_…` flags of the tun driver, such as `libc::IFF_MULTI_QUEUE` and `libc::IFF_PERSIST`.
    ///
    /// # Errors
    /// As [`name`](Self::name).
    pub fn flags(&self) -> Result<u32, TapError> {
        let request = self.ifreq()?;
        // SAFETY: TUNGETIFF filled in the flags, and any bits are a valid integer.
        Ok(u32::from(unsafe { request.ifr_ifru.ifru_flags }.cast_unsigned()))
    }

    /// The `IFF_…` flags that this kernel's tun driver knows.
    ///
    /// # Errors
    /// [`TapError::Request`].
    pub fn features(&self) -> Result<u32, TapError> {
        let mut features: libc::c_uint = 0;
        // SAFETY: TUNGETFEATURES writes an unsigned int.
        unsafe { self.ioctl("TUNGETFEATURES", libc::TUNGETFEATURES, &raw mut features) }?;
        Ok(features)
    }

    fn ifreq(&self) -> Result<libc::ifreq, TapError> {
        let mut request = ifreq("", 0);
        // SAFETY: TUNGETIFF writes an ifreq.
        unsafe { self.ioctl("TUNGETIFF", libc::TUNGETIFF, &raw mut request) }?;
        Ok(request)
    }

    fn set_int(&self, name: &'static str, code: libc::Ioctl, mut value: libc::c_int) -> Result<(), TapError> {
        // SAFETY: the callers' requests read an int.
        unsafe { self.ioctl(name, code, &raw mut value) }
    }

    /// # Safety
    /// The request `code` reads and writes a `T` at most, and keeps no pointer to it.
    unsafe fn ioctl<T>(
        &self,
        name: &'static str,
        code: libc::Ioctl,
        argument: *mut T,
    ) -> Result<(), TapError> {
        // SAFETY: the descriptor is open as long as self; `argument` is what the request wants (the caller's promise).
        checked(name, unsafe { libc::ioctl(self.0.as_raw_fd(), code, argument) })
    }
}

/// A queue that came from elsewhere: attached by [`TapQueue::open`] in this process or in another.
impl From<OwnedFd> for TapQueue {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<TapQueue> for OwnedFd {
    fn from(queue: TapQueue) -> Self {
        queue.0
    }
}

impl AsFd for TapQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn checked(request: &'static str, result: libc::c_int) -> Result<(), TapError> {
    if result >= 0 { Ok(()) } else { Err(TapError::Request { request, source: io::Error::last_os_error() }) }
}

/// `name` has NAME_MAX bytes at most, so a terminating zero is left.
fn ifreq(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: ifreq is a plain C structure that may be all zeros.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    #[expect(clippy::cast_possible_truncation, reason = "the tun driver's flags are 16 bits wide")]
    let flags = flags as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
    request
}

#[cfg(test)]
mod tests;
