//! Where the API's socket may be, and who may replace it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use vhost_user::socket::{Access, EndpointError, Place, Published};

/// Connections that may wait to be accepted. Callers that do not wait (epoll) are turned away beyond it.
const BACKLOG: i32 = 128;

/// Why the API's socket cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A daemon is there.
    #[error("{0} is served by a running process: stop it, or give this one another --api")]
    InUse(PathBuf),
    /// The socket.
    #[error("the API's socket: {0}")]
    Socket(EndpointError),
    /// Somebody else could replace the socket.
    #[error("{0} can be written by everybody, who could then pose as the daemon: use a directory of its own")]
    Exposed(PathBuf),
    /// No such group.
    #[error("there is no group {0:?}")]
    Group(String),
    /// Its directory.
    #[error("the API's socket: cannot make directory {path}: {cause}; give another --api")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
}

/// Publishes the API's socket, replacing a stale one of our own, in a directory that is made if it is not there. The
/// socket goes when the second value is dropped.
pub fn publish(path: &Path, access: Access) -> Result<(UnixListener, Published), PublishError> {
    let dir = path.parent().unwrap_or_else(|| Path::new("/"));
    fs::create_dir_all(dir).map_err(|cause| PublishError::Directory { path: dir.into(), cause })?;
    refuse_exposed(dir)?;
    let published = Place::open(path, None).and_then(|place| place.publish(access, BACKLOG));
    let (socket, published) = published.map_err(|error| match error {
        EndpointError::InUse(path) => PublishError::InUse(path),
        error => PublishError::Socket(error),
    })?;
    Ok((socket.into(), published))
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
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_socket_appears_with_its_mode_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/api.sock");
        let access = Access { mode: 0o640, ..Access::default() };
        let (_listener, socket) = publish(&path, access).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        assert!(UnixStream::connect(&path).is_ok());
        assert!(matches!(publish(&path, access), Err(PublishError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn an_open_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let refused = publish(&dir.path().join("api.sock"), Access::default());
        assert!(matches!(refused, Err(PublishError::Exposed(_))));
    }

    #[test]
    fn what_is_in_the_way_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        fs::write(&path, b"precious").unwrap();
        let refused = publish(&path, Access::default());
        assert!(matches!(refused, Err(PublishError::Socket(EndpointError::Foreign { .. }))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let below = publish(&path.join("api.sock"), Access::default());
        assert!(matches!(below, Err(PublishError::Directory { .. })));
    }

    #[test]
    fn groups_by_name_and_number() {
        assert_eq!(group_id("root").unwrap(), 0);
        assert_eq!(group_id("4242").unwrap(), 4242);
        assert!(matches!(group_id("no-such-group"), Err(PublishError::Group(_))));
    }
}
