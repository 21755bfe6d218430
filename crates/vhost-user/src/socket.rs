//! Socket files: publishing a listening one so that nothing foreign is ever replaced, and dialling one.
//!
//! A socket is bound in a private directory beside its final place, gets its mode and owner there, listens, and is then
//! renamed into place: whoever sees the name can connect, and nobody could connect before. A name that is taken is only
//! replaced if it is a socket of ours that nobody listens on any more, and by an exchange, so that what was replaced can
//! be looked at once more before it is removed.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::socket::sockopt::PeerCredentials;
use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Uid};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, connect, listen,
    socket_with,
};

use crate::device::Peer;

/// Bytes of a socket's path at the most: `sun_path` has 108, one of them for the final zero.
pub const PATH_MAX: usize = 107;

/// Why a socket cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Longer than a socket address can hold.
    #[error("socket path {path:?} has {len} bytes: {PATH_MAX} at the most, choose a shorter directory")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// No file name, or a zero byte in it.
    #[error("{0:?} is no path of a socket: it needs a file name")]
    Path(PathBuf),
    /// The name is taken by something that is no socket.
    #[error("{path:?} is a {found}, no socket: remove it or choose another path")]
    Foreign {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// The name is taken by somebody else's socket.
    #[error("{path:?} is a socket of user {uid}: remove it or choose another path")]
    NotOurs {
        /// The path.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// Somebody listens there.
    #[error("{0:?} is in use: another process or endpoint listens on it")]
    InUse(PathBuf),
    /// The name changed hands while we looked.
    #[error("{0:?} was replaced while the socket was being published: try again")]
    Raced(PathBuf),
    /// A system call failed.
    #[error("{path:?}: cannot {what}: {cause}")]
    Io {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        cause: io::Error,
    },
    /// The session thread is gone.
    #[error("the session thread has ended")]
    Ended,
}

/// Where a socket is: its directory, held open, and its name in there.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    dir: OwnedFd,
    name: PathBuf,
}

impl Place {
    /// Opens the directory of `path`.
    ///
    /// # Errors
    /// A path that is no socket's or too long; a directory that cannot be opened.
    pub fn open(path: &Path) -> Result<Self, EndpointError> {
        let (dir, name) = split(path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir =
            fs::open(dir, flags, Mode::empty()).map_err(|e| failed(path, "open the directory of", e))?;
        Ok(Self { path: path.to_owned(), dir, name })
    }

    /// Publishes a listening socket here, non-blocking, with room for `backlog` connections that wait to be accepted.
    ///
    /// # Errors
    /// [`EndpointError::Foreign`], [`EndpointError::NotOurs`], [`EndpointError::InUse`], [`EndpointError::Raced`]; what
    /// the system refuses. Nothing is left of a socket that was published in vain.
    pub fn publish(self, access: Access, backlog: i32) -> Result<(OwnedFd, Published), EndpointError> {
        // Looked at first for the better error; looked at again when the name is taken over.
        self.check()?;
        let private = PrivateDir::make(&self)?;
        let (dir, name) = (&private.dir, Path::new("socket"));
        let socket = socket().map_err(|e| self.error("make a socket for", e))?;
        let address = address_at(dir, name).map_err(|e| self.error("bind", e))?;
        bind(&socket, &address).map_err(|e| self.error("bind", e))?;
        let mode = Mode::from_raw_mode(access.mode & 0o777);
        fs::chmodat(dir, name, mode, AtFlags::empty()).map_err(|e| self.error("set the mode of", e))?;
        if access.owner.is_some() || access.group.is_some() {
            let (owner, group) = (access.owner.map(Uid::from_raw), access.group.map(Gid::from_raw));
            fs::chownat(dir, name, owner, group, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| self.error("set the owner of", e))?;
        }
        listen(&socket, backlog).map_err(|e| self.error("listen on", e))?;
        let stat = fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| self.error("look at the new socket for", e))?;
        move_into(&self, dir, name)?;
        drop(private);
        Ok((socket, Published { place: self, id: identity(&stat) }))
    }

    fn error(&self, what: &'static str, cause: Errno) -> EndpointError {
        failed(&self.path, what, cause)
    }

    /// What the name stands for now; symbolic links are not followed.
    fn stat(&self) -> Result<Option<Stat>, EndpointError> {
        match fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(self.error("look at", e)),
        }
    }

    /// Checks that the name is free (`None`) or a stale socket of ours.
    fn check(&self) -> Result<Option<Stat>, EndpointError> {
        let Some(stat) = self.stat()? else { return Ok(None) };
        let path = self.path.clone();
        let found = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket => None,
            FileType::Directory => Some("directory"),
            FileType::Symlink => Some("symbolic link"),
            FileType::Fifo => Some("FIFO"),
            FileType::RegularFile => Some("file"),
            _ => Some("device"),
        };
        if let Some(found) = found {
            return Err(EndpointError::Foreign { path, found });
        }
        if stat.st_uid != rustix::process::geteuid().as_raw() {
            return Err(EndpointError::NotOurs { path, uid: stat.st_uid });
        }
        match dial_at(&self.dir, &self.name) {
            Err(Errno::CONNREFUSED) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            // A full backlog is somebody's, too.
            Ok(_) | Err(Errno::AGAIN) => Err(EndpointError::InUse(path)),
            Err(e) => Err(self.error("probe", e)),
        }
    }
}

/// Access to a published socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Permission bits of the socket file.
    pub mode: u32,
    /// Owner; `None`: this process's user.
    pub owner: Option<u32>,
    /// Group; `None`: this process's group.
    pub group: Option<u32>,
}

impl Default for Access {
    fn default() -> Self {
        Self { mode: 0o660, owner: None, group: None }
    }
}

/// A listening socket's file. Removed when dropped, if it is still the one that was published.
#[derive(Debug)]
pub struct Published {
    place: Place,
    id: (u64, u64),
}

/// Renames the new socket into place.
fn move_into(place: &Place, from: &OwnedFd, name: &Path) -> Result<(), EndpointError> {
    let rename = |flags| fs::renameat_with(from, name, &place.dir, &place.name, flags);
    match rename(RenameFlags::NOREPLACE) {
        Ok(()) => return Ok(()),
        Err(Errno::EXIST) => {}
        Err(e) => return Err(place.error("publish", e)),
    }
    let Some(stale) = place.check()? else { return Err(EndpointError::Raced(place.path.clone())) };
    rename(RenameFlags::EXCHANGE).map_err(|e| place.error("replace", e))?;
    let replaced = fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW);
    if replaced.is_ok_and(|replaced| identity(&replaced) == identity(&stale)) {
        return Ok(());
    }
    // Not what was checked a moment ago: give it back.
    rename(RenameFlags::EXCHANGE).map_err(|e| place.error("give back", e))?;
    Err(EndpointError::Raced(place.path.clone()))
}

impl Drop for Published {
    fn drop(&mut self) {
        let ours = self.place.stat().ok().flatten().is_some_and(|stat| identity(&stat) == self.id);
        if ours && let Err(error) = fs::unlinkat(&self.place.dir, &self.place.name, AtFlags::empty()) {
            tracing::warn!(path = %self.place.path.display(), %error, "socket file cannot be removed");
        }
    }
}

/// A directory that only we can enter, beside the socket's final place.
struct PrivateDir<'a> {
    place: &'a Place,
    name: String,
    dir: OwnedFd,
}

impl<'a> PrivateDir<'a> {
    fn make(place: &'a Place) -> Result<Self, EndpointError> {
        let name = format!(".vhost-user-{:016x}", random());
        let failed = |e| place.error("make a private directory beside", e);
        fs::mkdirat(&place.dir, &name, Mode::RWXU).map_err(failed)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = fs::openat(&place.dir, &name, flags, Mode::empty()).map_err(failed)?;
        Ok(Self { place, name, dir })
    }
}

impl Drop for PrivateDir<'_> {
    fn drop(&mut self) {
        // What is left in it is a failed attempt, or the stale socket that was exchanged.
        let _ = fs::unlinkat(&self.dir, "socket", AtFlags::empty());
        let _ = fs::unlinkat(&self.place.dir, &self.name, AtFlags::REMOVEDIR);
    }
}

/// Any random number; the standard library's hash keys are the source.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Accepts one connection; `None` if none waits. Never waits.
pub(crate) fn accept(listener: impl AsFd) -> io::Result<Option<OwnedFd>> {
    loop {
        match acceptfrom_with(&listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok((socket, _)) => return Ok(Some(socket)),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Checks that `path` can be dialled at all.
pub(crate) fn check_path(path: &Path) -> Result<(), EndpointError> {
    split(path).map(drop)
}

/// Directory and file name of a socket.
pub(crate) fn split(path: &Path) -> Result<(PathBuf, PathBuf), EndpointError> {
    let len = path.as_os_str().len();
    if len > PATH_MAX {
        return Err(EndpointError::PathTooLong { path: path.to_owned(), len });
    }
    let bytes = path.as_os_str().as_bytes();
    let named = !bytes.ends_with(b"/") && !bytes.ends_with(b"/.") && !bytes.contains(&0);
    let name = path.file_name().filter(|_| named).ok_or_else(|| EndpointError::Path(path.to_owned()))?;
    let dir = path.parent().filter(|dir| *dir != Path::new("")).unwrap_or_else(|| Path::new("."));
    Ok((dir.to_owned(), PathBuf::from(name)))
}

/// Connects to the socket at `path`. Never waits: a full backlog is an error like no listener.
pub(crate) fn dial(path: &Path) -> io::Result<OwnedFd> {
    Ok(connected(&SocketAddrUnix::new(path)?)?)
}

/// Who is at the other end, as of when the connection was made.
pub(crate) fn peer(socket: impl AsFd) -> io::Result<Peer> {
    // Not rustix's, whose process id cannot be zero: a peer in a process namespace that we do not see has id zero.
    let cred = nix::sys::socket::getsockopt(&socket, PeerCredentials)?;
    Ok(Peer { pid: cred.pid(), uid: cred.uid(), gid: cred.gid() })
}

fn dial_at(dir: &OwnedFd, name: &Path) -> Result<OwnedFd, Errno> {
    connected(&address_at(dir, name)?)
}

fn connected(address: &SocketAddrUnix) -> Result<OwnedFd, Errno> {
    let socket = socket()?;
    connect(&socket, address)?;
    Ok(socket)
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// A name in an open directory as a socket address; there is no `bindat`.
fn address_at(dir: &OwnedFd, name: &Path) -> Result<SocketAddrUnix, Errno> {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    path.push(name);
    SocketAddrUnix::new(path)
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn failed(path: &Path, what: &'static str, cause: Errno) -> EndpointError {
    EndpointError::Io { path: path.to_owned(), what, cause: cause.into() }
}
