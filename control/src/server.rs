//! The API's socket: published safely, its callers known and counted, none of them able to hold it up.
//!
//! Each connection is one task. Who connected is read from the kernel (SO_PEERCRED) before a byte of theirs is, and holds
//! for the life of the connection. Beyond the bounds below a caller is told so and closed; a few places are kept for
//! root and the daemon's own user, so that an operator always gets in.

mod deadline;
mod publish;

use std::collections::HashMap;
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener as StdListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::response::IntoResponse;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper::{Request, server::conn::http1};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use self::deadline::{Deadlines, Patient};
pub use self::publish::{PublishError, group_id, publish};
use crate::problem::{CONTENT_TYPE, Kind, Problem};

/// Connections at once.
const CONNECTIONS_MAX: usize = 64;
/// Of these, kept for operators.
const CONNECTIONS_RESERVED: usize = 4;
/// Connections of one user that is no operator.
const CONNECTIONS_PER_UID: usize = 16;
/// Refused callers that are told so at once; more are just closed.
const REFUSALS_MAX: usize = 16;
/// For a refused caller to begin its request.
const REFUSAL_TIME: Duration = Duration::from_millis(500);
/// Pause after accept failed for want of descriptors: they come back by themselves, spinning does not help.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// Who is at the other end.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Process; 0 if it is in another pid namespace.
    pub pid: i32,
}

/// Who may connect, beyond what the socket's mode and group allow.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Users; empty: whoever can open the socket.
    pub uids: Vec<u32>,
}

/// Serves `router` on the socket until the process ends.
pub async fn serve(listener: StdListener, router: Router, access: Access) -> std::io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let door = Arc::new(Door::new(rustix::process::geteuid().as_raw(), access));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => admit(&door, stream, &router),
            Err(error) => {
                tracing::warn!("cannot accept on the API's socket: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn admit(door: &Arc<Door>, stream: UnixStream, router: &Router) {
    let caller = match stream.peer_cred() {
        Ok(cred) => Caller { uid: cred.uid(), pid: cred.pid().unwrap_or(0) },
        Err(error) => {
            tracing::warn!("a caller without credentials: {error}");
            return;
        }
    };
    match door.enter(caller.uid) {
        Ok(place) => {
            let router = router.clone();
            tokio::spawn(async move {
                converse(stream, caller, router).await;
                drop(place);
            });
        }
        Err(problem) => {
            tracing::warn!(uid = caller.uid, pid = caller.pid, "refused a connection: {}", problem.detail);
            if let Ok(place) = door.lobby.clone().try_acquire_owned() {
                tokio::spawn(async move {
                    refuse(stream, problem).await;
                    drop(place);
                });
            }
        }
    }
}

async fn converse(stream: UnixStream, caller: Caller, router: Router) {
    let deadlines = Arc::new(Deadlines::default());
    let Ok(line) = stream.as_fd().try_clone_to_owned() else { return };
    let io = TokioIo::new(Patient::new(stream, deadlines.clone()));
    let inner = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        deadlines.answering();
        request.extensions_mut().insert(caller);
        // Who hung up before we got to read the request takes it for failed, and may have asked for the opposite since.
        let answer = (!hung_up(&line)).then(|| inner.call(request));
        let deadlines = deadlines.clone();
        async move {
            let answer = match answer {
                Some(answer) => answer.await,
                None => Ok(Problem::new(Kind::Unavailable, "the caller has hung up").into_response()),
            };
            deadlines.answered();
            answer as Result<_, Infallible>
        }
    });
    // Our own deadlines know the difference between idle and slow; hyper's would need a timer for both.
    let connection = http1::Builder::new()
        .header_read_timeout(None)
        .max_header_size(HEAD_BYTES_MAX)
        .serve_connection(io, service);
    if let Err(error) = connection.await {
        tracing::debug!(uid = caller.uid, pid = caller.pid, "API connection ended: {error}");
    }
}

/// Whether the other end of a connection is closed.
fn hung_up(line: &OwnedFd) -> bool {
    // POLLHUP is told without being asked for (poll(2)).
    let mut line = [PollFd::new(line, PollFlags::empty())];
    poll(&mut line, Some(&Timespec::default())).is_ok_and(|ready| ready == 1)
}

/// Reads what the caller begins to say, since one that cannot say it does not listen either, and answers.
async fn refuse(mut stream: UnixStream, problem: Problem) {
    let _ = tokio::time::timeout(REFUSAL_TIME, stream.read(&mut [0; 4096])).await;
    let body = serde_json::to_string(&problem).expect("a problem is plain JSON");
    let Problem { status, title, .. } = problem;
    let head = format!("HTTP/1.1 {status} {title}\r\nconnection: close\r\ncontent-type: {CONTENT_TYPE}");
    // What the socket's buffer does not take at once is lost.
    let _ = stream.try_write(format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes());
}

/// Counts who is inside.
struct Door {
    own_uid: u32,
    access: Access,
    inside: Mutex<HashMap<u32, usize>>,
    lobby: Arc<Semaphore>,
}

/// A place inside, given back when dropped.
struct Place {
    door: Arc<Door>,
    uid: u32,
}

impl Door {
    fn new(own_uid: u32, access: Access) -> Self {
        Self { own_uid, access, inside: Mutex::default(), lobby: Arc::new(Semaphore::new(REFUSALS_MAX)) }
    }

    fn enter(self: &Arc<Self>, uid: u32) -> Result<Place, Problem> {
        let operator = uid == 0 || uid == self.own_uid;
        if !operator && !self.access.uids.is_empty() && !self.access.uids.contains(&uid) {
            return Err(Problem::new(Kind::Denied, format!("user {uid} is not in api.uids")));
        }
        let mut inside = self.inside.lock().expect("no holder of the door's lock panics");
        let (all, own) = (inside.values().sum::<usize>(), inside.get(&uid).copied().unwrap_or(0));
        let room = if operator { CONNECTIONS_MAX } else { CONNECTIONS_MAX - CONNECTIONS_RESERVED };
        if all >= room || (!operator && own >= CONNECTIONS_PER_UID) {
            let detail = format!("too many connections: {all} in all, {own} of user {uid}");
            return Err(Problem::new(Kind::Unavailable, detail));
        }
        *inside.entry(uid).or_default() += 1;
        Ok(Place { door: self.clone(), uid })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.door.inside.lock().expect("no holder of the door's lock panics");
        if let Some(count) = inside.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                inside.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream as StdStream;

    use super::*;

    fn door(uids: Vec<u32>) -> Arc<Door> {
        Arc::new(Door::new(500, Access { uids }))
    }

    #[test]
    fn one_user_cannot_take_every_place() {
        let door = door(vec![]);
        let mut places: Vec<_> = (0..CONNECTIONS_PER_UID).map(|_| door.enter(1000).unwrap()).collect();
        assert_eq!(door.enter(1000).err().unwrap().kind, Kind::Unavailable);
        places.pop();
        assert!(door.enter(1000).is_ok());
    }

    #[test]
    fn places_are_kept_for_operators() {
        let door = door(vec![]);
        let users = 1000..;
        let mut places: Vec<_> = users.map_while(|uid| door.enter(uid).ok()).collect();
        assert_eq!(places.len(), CONNECTIONS_MAX - CONNECTIONS_RESERVED);
        for uid in [0, 500, 0, 500] {
            places.push(door.enter(uid).unwrap());
        }
        assert_eq!(door.enter(0).err().unwrap().kind, Kind::Unavailable);
        drop(places);
        assert!(door.inside.lock().unwrap().is_empty());
    }

    #[test]
    fn a_closed_line_is_known_with_bytes_still_in_it() {
        let (mut near, far) = StdStream::pair().unwrap();
        near.write_all(b"POST /").unwrap();
        let line = far.as_fd().try_clone_to_owned().unwrap();
        assert!(!hung_up(&line));
        near.shutdown(Shutdown::Write).unwrap();
        assert!(!hung_up(&line));
        drop(near);
        assert!(hung_up(&line));
    }

    #[test]
    fn unlisted_users_are_denied() {
        let door = door(vec![1000]);
        assert!(door.enter(1000).is_ok());
        assert!(door.enter(0).is_ok());
        assert_eq!(door.enter(1001).err().unwrap().kind, Kind::Denied);
    }
}
