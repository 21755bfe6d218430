//! Makes a UNIX socket appear at its path in one step, with its mode and group, and takes it away again if it is ours.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why a socket cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A daemon is there.
    #[error("{0} is served by a running process: stop it, or give this one another --api")]
    InUse(PathBuf),
    /// Something that is not a socket of ours is at the path.
    #[error("{path} is in the way: it is {what}; remove it, or give another --api")]
    Foreign {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: String,
    },
    /// Somebody else could replace the socket.
    #[error("{0} can be written by everybody, who could then pose as the daemon: use a directory of its own")]
    Exposed(PathBuf),
    /// No such group.
    #[error("there is no group {0:?}")]
    Group(String),
    /// The system.
    #[error("cannot publish socket {path}: {cause}")]
    System {
        /// The path.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

/// A socket at its path; dropping it takes it away.
pub struct PublishedSocket {
    path: PathBuf,
    device_inode: (u64, u64),
}

impl PublishedSocket {
    /// Publishes a listening socket at `path`, replacing a stale one of our own.
    pub fn new(path: &Path, mode: u32, gid: Option<u32>) -> Result<(UnixListener, Self), PublishError> {
        let system = |cause| PublishError::System { path: path.into(), cause };
        let dir = path.parent().unwrap_or_else(|| Path::new("/"));
        fs::create_dir_all(dir).map_err(system)?;
        refuse_exposed(dir)?;
        refuse_occupied(path)?;
        // Bound under a name of its own first: nobody can connect before mode and group are set.
        let hidden = dir.join(format!(".{}", std::process::id()));
        let _ = fs::remove_file(&hidden);
        let listener = UnixListener::bind(&hidden).map_err(system)?;
        let publish = || {
            chown(&hidden, None, gid)?;
            fs::set_permissions(&hidden, fs::Permissions::from_mode(mode))?;
            fs::rename(&hidden, path)?;
            fs::symlink_metadata(path)
        };
        let metadata = publish().map_err(|cause| {
            let _ = fs::remove_file(&hidden);
            system(cause)
        })?;
        Ok((listener, Self { path: path.into(), device_inode: (metadata.dev(), metadata.ino()) }))
    }
}

impl Drop for PublishedSocket {
    fn drop(&mut self) {
        let now = fs::symlink_metadata(&self.path).map(|m| (m.dev(), m.ino()));
        if now.is_ok_and(|now| now == self.device_inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A directory that everybody can write is acceptable only if it is sticky, as /tmp.
fn refuse_exposed(dir: &Path) -> Result<(), PublishError> {
    for parent in dir.ancestors() {
        let mode = fs::metadata(parent).map_or(0, |m| m.mode());
        if mode & 0o1002 == 0o0002 {
            return Err(PublishError::Exposed(parent.into()));
        }
    }
    Ok(())
}

fn refuse_occupied(path: &Path) -> Result<(), PublishError> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    let foreign = |what: &str| Err(PublishError::Foreign { path: path.into(), what: what.into() });
    if !metadata.file_type().is_socket() {
        return foreign("not a socket");
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return foreign(&format!("a socket of user {}", metadata.uid()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(PublishError::InUse(path.into())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => foreign(&format!("a socket that does not say whether it is in use ({error})")),
    }
}

/// Number of a group, from /etc/group.
pub fn group_id(name: &str) -> Result<u32, PublishError> {
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let entry = groups.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|entry| entry[0] == name);
    entry
        .and_then(|entry| entry.get(2)?.parse().ok())
        .or_else(|| name.parse().ok())
        .ok_or_else(|| PublishError::Group(name.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_appears_with_its_mode_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/api.sock");
        let (_listener, socket) = PublishedSocket::new(&path, 0o640, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        assert!(UnixStream::connect(&path).is_ok());
        assert!(matches!(PublishedSocket::new(&path, 0o640, None), Err(PublishError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (_listener, _socket) = PublishedSocket::new(&path, 0o600, None).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let refused =
            || matches!(PublishedSocket::new(&path, 0o600, None), Err(PublishError::Foreign { .. }));
        fs::write(&path, b"precious").unwrap();
        assert!(refused());
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/nowhere", &path).unwrap();
        assert!(refused());
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(refused());
    }

    #[test]
    fn a_replaced_socket_is_not_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (_listener, socket) = PublishedSocket::new(&path, 0o600, None).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"somebody else's").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn an_open_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let refused = PublishedSocket::new(&dir.path().join("api.sock"), 0o600, None);
        assert!(matches!(refused, Err(PublishError::Exposed(_))));
    }

    #[test]
    fn groups_by_name_and_number() {
        assert_eq!(group_id("root").unwrap(), 0);
        assert_eq!(group_id("4242").unwrap(), 4242);
        assert!(matches!(group_id("no-such-group"), Err(PublishError::Group(_))));
    }
}
