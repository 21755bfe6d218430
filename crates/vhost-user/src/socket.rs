//! Socket files: publishing a listening one so that nothing foreign is ever replaced, and dialling one.
//!
//! A socket is bound in a private directory beside its final place, gets its mode and owner there, listens, and is then
//! renamed into place: whoever sees the name can connect, and nobody could connect before. A name that is taken is only
//! replaced if it is a socket of ours that nobody listens on any more, and by an exchange, so that what was replaced can
//! be looked at once more before it is removed.
//!
//! The directory may belong to somebody who wants us to make, replace or dial a socket elsewhere. So it is opened once and
//! everything is done relative to that descriptor; `beneath` a given directory no symbolic link is followed on the way, and
//! nothing leads out of it (openat2(2)); what was looked at is what is dialled, through its descriptor.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::socket::sockopt::PeerCredentials;
use rustix::fs::{
    self, AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Stat, Uid,
};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, connect, listen,
    socket_with,
};
use sys::fail_point;

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
    /// It leads out of the directory that it has to be in.
    #[error(
        "{path:?} does not stay beneath {beneath:?}, where no symbolic link is followed: use the real path"
    )]
    Strays {
        /// The path.
        path: PathBuf,
        /// Where it has to be.
        beneath: PathBuf,
    },
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
    #[error("{0:?} is in use, another process or endpoint listens on it: stop that or choose another path")]
    InUse(PathBuf),
    /// The name changed hands while we looked.
    #[error("{0:?} was replaced while the socket was being published: try again")]
    Raced(PathBuf),
    /// A system call failed.
    #[error("cannot {what} {path:?}: {cause}")]
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
    /// Opens the directory of `path`, which has to stay `beneath` another if one is given.
    ///
    /// # Errors
    /// A path that is no socket's or too long; [`EndpointError::Strays`]; a directory that cannot be opened.
    pub fn open(path: &Path, beneath: Option<&Path>) -> Result<Self, EndpointError> {
        let (dir, name) = split(path)?;
        let dir = open_beneath(&dir, beneath, OFlags::DIRECTORY).map_err(|e| match (e, beneath) {
            (Errno::LOOP | Errno::XDEV, Some(beneath)) => strays(path, beneath),
            (cause, _) => failed(path, "open the directory of", cause),
        })?;
        Ok(Self { path: path.to_owned(), dir, name })
    }

    /// The directory's path in `/proc`, good for as long as this value lives.
    pub(crate) fn directory(&self) -> PathBuf {
        fd_path(&self.dir)
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
        let (dir, name) = (&private.dir, Path::new(PRIVATE_SOCKET));
        let socket = socket().map_err(|e| self.error("make a socket for", e))?;
        let address = address_at(dir, name).map_err(|e| self.error("bind", e))?;
        self.change("bind", || bind(&socket, &address))?;
        let mode = Mode::from_raw_mode(access.mode & 0o777);
        self.change("set the mode of", || fs::chmodat(dir, name, mode, AtFlags::empty()))?;
        if access.owner.is_some() || access.group.is_some() {
            let (owner, group) = (access.owner.map(Uid::from_raw), access.group.map(Gid::from_raw));
            self.change("set the owner of", || {
                fs::chownat(dir, name, owner, group, AtFlags::SYMLINK_NOFOLLOW)
            })?;
        }
        self.change("listen on", || listen(&socket, backlog))?;
        let stat = fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| self.error("look at the new socket for", e))?;
        move_into(&self, dir, name)?;
        drop(private);
        Ok((socket, Published { place: self, id: identity(&stat) }))
    }

    /// Removes the file if the name still stands for this one.
    fn remove(&self, id: (u64, u64)) -> bool {
        if self.look().ok().flatten().is_none_or(|(_, stat)| identity(&stat) != id) {
            return false;
        }
        let removed = self.change("remove", || fs::unlinkat(&self.dir, &self.name, AtFlags::empty()));
        if let Err(error) = &removed {
            tracing::warn!("{error}");
        }
        removed.is_ok()
    }

    fn error(&self, what: &'static str, cause: Errno) -> EndpointError {
        failed(&self.path, what, cause)
    }

    /// Changes something for this socket.
    fn change<T>(
        &self,
        what: &'static str,
        change: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, EndpointError> {
        fail_point::pass(format_args!("{what} {}", self.path.display()));
        change().map_err(|cause| self.error(what, cause))
    }

    /// What the name stands for now, held; symbolic links are not followed.
    fn look(&self) -> Result<Option<(OwnedFd, Stat)>, EndpointError> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match fs::openat(&self.dir, &self.name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(self.error("look at", e)),
        };
        let stat = fs::fstat(&file).map_err(|e| self.error("look at", e))?;
        Ok(Some((file, stat)))
    }

    /// Checks that the name is free (`None`) or a stale socket of ours.
    fn check(&self) -> Result<Option<Stat>, EndpointError> {
        let Some((file, stat)) = self.look()? else { return Ok(None) };
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
        match dial_file(&file) {
            Err(Errno::CONNREFUSED) => Ok(Some(stat)),
            // A full backlog is somebody's, too.
            Ok(_) | Err(Errno::AGAIN) => Err(EndpointError::InUse(path)),
            Err(e) => Err(self.error("probe", e)),
        }
    }
}

/// Removes the file of a listening socket that a process of ours left when it was killed, and what it left of one that it was
/// about to publish. False if there is no such file.
///
/// # Errors
/// What is there is somebody else's, or no socket, or in use.
pub fn remove_stale(path: &Path, beneath: Option<&Path>) -> Result<bool, EndpointError> {
    let place = Place::open(path, beneath)?;
    PrivateDir::remove_left(&place)?;
    let Some(stale) = place.check()? else { return Ok(false) };
    Ok(place.remove(identity(&stale)))
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
    let rename = |flags| {
        fail_point::pass(format_args!("publish {}", place.path.display()));
        fs::renameat_with(from, name, &place.dir, &place.name, flags)
    };
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
        self.place.remove(self.id);
    }
}

/// A directory that only we can enter, beside the socket's final place and named after it: what a process has left there that
/// was killed is found by whoever comes next. Locked while somebody is at work in it.
struct PrivateDir<'a> {
    place: &'a Place,
    name: String,
    dir: OwnedFd,
}

/// The name of a socket in it.
const PRIVATE_SOCKET: &str = "socket";

impl<'a> PrivateDir<'a> {
    fn make(place: &'a Place) -> Result<Self, EndpointError> {
        let name = Self::name(place);
        let what = "make a private directory beside";
        place.change(what, || match fs::mkdirat(&place.dir, &name, Mode::RWXU) {
            Err(Errno::EXIST) => Ok(()),
            made => made,
        })?;
        let dir = open_private(&place.dir, &name).map_err(|e| place.error(what, e))?;
        let found = "directory of somebody else's";
        let foreign = || EndpointError::Foreign { path: place.path.with_file_name(&name), found };
        let dir = dir.ok_or_else(foreign)?;
        match fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(EndpointError::InUse(place.path.clone())),
            locked => locked.map_err(|e| place.error(what, e))?,
        }
        // Whoever had it locked may have removed it meanwhile.
        let now = fs::statat(&place.dir, &name, AtFlags::SYMLINK_NOFOLLOW).ok();
        let ours = fs::fstat(&dir).map_err(|e| place.error(what, e))?;
        if now.is_none_or(|now| identity(&now) != identity(&ours)) {
            return Err(EndpointError::Raced(place.path.clone()));
        }
        let private = Self { place, name, dir };
        private.clear();
        Ok(private)
    }

    /// Removes one that was left.
    fn remove_left(place: &'a Place) -> Result<(), EndpointError> {
        match fs::statat(&place.dir, Self::name(place), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Self::make(place).map(drop),
            Err(_) => Ok(()),
        }
    }

    fn name(place: &Place) -> String {
        format!(".{}.new", place.name.display())
    }

    /// Removes what is in it: a failed attempt, the stale socket that was exchanged.
    fn clear(&self) {
        if fs::statat(&self.dir, PRIVATE_SOCKET, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            let remove = || fs::unlinkat(&self.dir, PRIVATE_SOCKET, AtFlags::empty());
            let _ = self.place.change("clear up beside", remove);
        }
    }
}

/// Opens a directory that we have made; `None` if it is not ours alone: whoever owns the directory above can put one of theirs
/// in its place.
fn open_private(above: &OwnedFd, name: &str) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = fs::openat(above, name, flags, Mode::empty())?;
    let stat = fs::fstat(&dir)?;
    let private = stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & 0o077 == 0;
    Ok(private.then_some(dir))
}

impl Drop for PrivateDir<'_> {
    fn drop(&mut self) {
        self.clear();
        let remove = || fs::unlinkat(&self.place.dir, &self.name, AtFlags::REMOVEDIR);
        let _ = self.place.change("remove the private directory beside", remove);
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

/// Checks that `path` can be dialled at all; its directory may come later.
pub(crate) fn check_path(path: &Path, beneath: Option<&Path>) -> Result<(), EndpointError> {
    match Place::open(path, beneath) {
        Ok(_) | Err(EndpointError::Io { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Directory and file name of a socket.
fn split(path: &Path) -> Result<(PathBuf, PathBuf), EndpointError> {
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

/// Connects to the socket at `path`, which has to stay `beneath` a directory if one is given. Never waits: a full
/// backlog is an error like no listener.
pub(crate) fn dial(path: &Path, beneath: Option<&Path>) -> io::Result<OwnedFd> {
    let file = open_beneath(path, beneath, OFlags::empty()).map_err(|e| match (e, beneath) {
        (Errno::LOOP | Errno::XDEV, Some(beneath)) => io::Error::other(strays(path, beneath)),
        (cause, _) => cause.into(),
    })?;
    Ok(dial_file(&file)?)
}

/// Opens `path`, only to refer to it. `XDEV` or `LOOP`: it does not stay `beneath` that directory.
fn open_beneath(path: &Path, beneath: Option<&Path>, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    let Some(beneath) = beneath else { return fs::open(path, flags, Mode::empty()) };
    // `.` because the kernel has no empty paths.
    let path = Path::new(".").join(path.strip_prefix(beneath).map_err(|_| Errno::XDEV)?);
    let beneath = fs::open(beneath, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    fs::openat2(beneath, path, flags, Mode::empty(), resolve)
}

/// Who is at the other end, as of when the connection was made.
pub(crate) fn peer(socket: impl AsFd) -> io::Result<Peer> {
    // Not rustix's, whose process id cannot be zero: a peer in a process namespace that we do not see has id zero.
    let cred = nix::sys::socket::getsockopt(&socket, PeerCredentials)?;
    Ok(Peer { pid: cred.pid(), uid: cred.uid(), gid: cred.gid() })
}

/// Connects to an open socket file.
fn dial_file(file: &OwnedFd) -> Result<OwnedFd, Errno> {
    let socket = socket()?;
    connect(&socket, &SocketAddrUnix::new(fd_path(file))?)?;
    Ok(socket)
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// A name in an open directory as a socket address; there is no `bindat`.
fn address_at(dir: &OwnedFd, name: &Path) -> Result<SocketAddrUnix, Errno> {
    SocketAddrUnix::new(fd_path(dir).join(name))
}

/// An open file as a path: whatever its name stands for by now.
fn fd_path(file: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn strays(path: &Path, beneath: &Path) -> EndpointError {
    EndpointError::Strays { path: path.to_owned(), beneath: beneath.to_owned() }
}

fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn failed(path: &Path, what: &'static str, cause: Errno) -> EndpointError {
    EndpointError::Io { path: path.to_owned(), what, cause: cause.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_others_can_enter_is_not_private() {
        let above = tempfile::tempdir().unwrap();
        let handle = fs::open(above.path(), OFlags::PATH, Mode::empty()).unwrap();
        fs::mkdirat(&handle, "ours", Mode::RWXU).unwrap();
        assert!(open_private(&handle, "ours").unwrap().is_some());
        fs::chmodat(&handle, "ours", Mode::RWXU | Mode::XOTH, AtFlags::empty()).unwrap();
        assert!(open_private(&handle, "ours").unwrap().is_none());
        fs::symlinkat(above.path(), &handle, "link").unwrap();
        assert_eq!(open_private(&handle, "link").unwrap_err(), Errno::NOTDIR);
    }
}
