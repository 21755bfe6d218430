//! Socket files and the way in: nothing foreign is ever replaced or removed, nobody waits for a front end that holds us up.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs::DirBuilder;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, RenameFlags, flock, mknodat, renameat_with};
use rustix::net::sockopt;
use support::*;
use vhost_user::socket::{Place, remove_stale};
use vhost_user::{
    Access, Endpoint, EndpointError, Limits, PATH_MAX, Role, SessionState, SessionStatus, Sessions,
};

fn sessions() -> Sessions {
    Sessions::start(Limits::default(), Box::new(|_, _| {})).unwrap()
}

fn listen(sessions: &Sessions, path: &Path) -> Result<vhost_user::EndpointId, EndpointError> {
    sessions.add(Endpoint::listen(path), Box::new(Recorder::default()))
}

fn entries(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(name).collect();
    names.sort();
    names
}

#[test]
fn socket_has_its_mode_and_owner_and_is_removed_with_the_endpoint() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port");
    let sessions = sessions();
    let id = listen(&sessions, &path).unwrap();
    let meta = std::fs::symlink_metadata(&path).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o7777, 0o660);
    assert_eq!(entries(dir.path()), ["port"], "nothing else is left in the directory");
    sessions.remove(id);
    assert!(entries(dir.path()).is_empty());
    sessions.remove(id);

    let access = Access { mode: 0o606, owner: None, group: Some(meta.gid()) };
    let endpoint = Endpoint { role: Role::Listen(access), ..Endpoint::listen(&path) };
    sessions.add(endpoint, Box::new(Recorder::default())).unwrap();
    assert_eq!(std::fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o7777, 0o606);
    drop(sessions);
    assert!(entries(dir.path()).is_empty(), "the end of all sessions removes sockets too");
}

#[test]
fn stale_socket_is_replaced() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port");
    drop(UnixListener::bind(&path).unwrap());
    let before = std::fs::symlink_metadata(&path).unwrap().ino();
    let sessions = sessions();
    let id = listen(&sessions, &path).unwrap();
    assert_ne!(std::fs::symlink_metadata(&path).unwrap().ino(), before);
    assert_eq!(entries(dir.path()), ["port"]);
    assert_eq!(Raw::connect(&path).ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    sessions.remove(id);
}

#[test]
fn stale_socket_is_removed_and_nothing_else() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port");
    assert!(!remove_stale(&path, None).unwrap());
    let listener = UnixListener::bind(&path).unwrap();
    assert!(matches!(remove_stale(&path, None), Err(EndpointError::InUse(_))));
    drop(listener);
    assert!(remove_stale(&path, Some(dir.path())).unwrap());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(remove_stale(&path, None), Err(EndpointError::Foreign { .. })));
    assert_eq!(entries(dir.path()), ["port"]);
}

#[test]
fn what_a_killed_process_left_of_a_socket_that_it_made_is_cleared_away() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (path, private) = (dir.path().join("port"), dir.path().join(".port.new"));
    let leave = |mode| {
        DirBuilder::new().mode(mode).create(&private).unwrap();
        drop(UnixListener::bind(private.join("socket")).unwrap());
    };
    leave(0o700);
    assert!(!remove_stale(&path, None).unwrap());
    assert!(entries(dir.path()).is_empty());
    leave(0o700);
    let sessions = sessions();
    let id = listen(&sessions, &path).unwrap();
    assert_eq!(entries(dir.path()), ["port"]);
    sessions.remove(id);
    // Somebody is at work in it, or it is somebody else's.
    leave(0o700);
    let handle = std::fs::File::open(&private).unwrap();
    flock(&handle, FlockOperation::LockExclusive).unwrap();
    assert!(matches!(listen(&sessions, &path), Err(EndpointError::InUse(_))));
    assert!(matches!(remove_stale(&path, None), Err(EndpointError::InUse(_))));
    drop(handle);
    std::fs::set_permissions(&private, PermissionsExt::from_mode(0o755)).unwrap();
    let error = listen(&sessions, &path).unwrap_err();
    assert!(matches!(&error, EndpointError::Foreign { path, .. } if *path == private), "{error}");
    assert!(remove_stale(&path, None).is_err());
    assert_eq!(entries(&private), ["socket"]);
}

#[test]
fn whatever_else_has_the_name_stays() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("file"), "precious").unwrap();
    std::fs::create_dir(at("directory")).unwrap();
    symlink(at("file"), at("link to file")).unwrap();
    symlink(at("nowhere"), at("dangling link")).unwrap();
    drop(UnixListener::bind(at("stale")).unwrap());
    symlink(at("stale"), at("link to socket")).unwrap();
    let _live = UnixListener::bind(at("live")).unwrap();
    std::fs::hard_link(at("live"), at("hard link to live")).unwrap();
    mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let before = entries(dir.path());
    let inode = |name: &str| std::fs::symlink_metadata(at(name)).unwrap().ino();
    let inodes: Vec<_> = before.iter().map(|name| inode(name)).collect();

    let sessions = sessions();
    for name in ["file", "directory", "link to file", "dangling link", "link to socket", "fifo"] {
        let error = listen(&sessions, &at(name)).unwrap_err();
        assert!(matches!(error, EndpointError::Foreign { .. }), "{name}: {error}");
    }
    for name in ["live", "hard link to live"] {
        let error = listen(&sessions, &at(name)).unwrap_err();
        assert!(matches!(error, EndpointError::InUse(_)), "{name}: {error}");
    }
    assert_eq!(entries(dir.path()), before);
    assert_eq!(before.iter().map(|name| inode(name)).collect::<Vec<_>>(), inodes);

    // Our own, too: one path, one endpoint.
    listen(&sessions, &at("port")).unwrap();
    assert!(matches!(listen(&sessions, &at("port")).unwrap_err(), EndpointError::InUse(_)));
}

#[test]
fn stale_socket_of_another_user_stays() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port");
    drop(UnixListener::bind(&path).unwrap());
    if std::os::unix::fs::chown(&path, Some(12345), None).is_err() {
        eprintln!("skipped: only root can give a file away");
        return;
    }
    let error = listen(&sessions(), &path).unwrap_err();
    assert!(matches!(error, EndpointError::NotOurs { uid: 12345, .. }), "{error}");
    assert!(path.exists());
}

#[test]
fn socket_that_is_not_ours_any_more_is_not_removed() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port");
    let sessions = sessions();
    let id = listen(&sessions, &path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    sessions.remove(id);
    assert!(path.exists());
}

/// A directory in which a tenant may do anything, one outside of it with a live socket, and that socket.
fn allowed_and_outside(dir: &Path) -> (PathBuf, PathBuf, UnixListener) {
    let (allowed, outside) = (dir.join("allowed"), dir.join("outside"));
    std::fs::create_dir(&allowed).unwrap();
    std::fs::create_dir(&outside).unwrap();
    let victim = UnixListener::bind(outside.join("port")).unwrap();
    victim.set_nonblocking(true).unwrap();
    (allowed, outside, victim)
}

#[test]
fn sockets_stay_beneath_their_directory() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (allowed, outside, victim) = allowed_and_outside(dir.path());
    std::fs::create_dir(allowed.join("deep")).unwrap();
    symlink(&outside, allowed.join("link")).unwrap();
    symlink("deep", allowed.join("inner")).unwrap();
    let sessions = sessions();
    let add = |endpoint, path: &Path| {
        let endpoint = Endpoint { beneath: Some(allowed.clone()), path: path.to_owned(), ..endpoint };
        sessions.add(endpoint, Box::new(Recorder::default()))
    };
    for path in [
        allowed.join("link/port"),
        allowed.join("inner/port"),
        allowed.join("../outside/port"),
        outside.join("port"),
    ] {
        for endpoint in [Endpoint::listen(""), Endpoint::connect("")] {
            let error = add(endpoint, &path).unwrap_err();
            assert!(matches!(error, EndpointError::Strays { .. }), "{}: {error}", path.display());
        }
    }
    assert!(victim.accept().is_err(), "nobody may dial it");
    assert_eq!(entries(&outside), ["port"]);
    for path in ["port", "deep/port", "deep/../other"] {
        let path = allowed.join(path);
        add(Endpoint::listen(""), &path).unwrap();
        assert_eq!(Raw::connect(&path).ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    }
    // A link that the administrator made, above.
    symlink(&allowed, dir.path().join("alias")).unwrap();
    let alias = dir.path().join("alias");
    let endpoint = Endpoint { beneath: Some(alias.clone()), ..Endpoint::listen(alias.join("third")) };
    sessions.add(endpoint, Box::new(Recorder::default())).unwrap();
    assert_eq!(entries(&allowed), ["deep", "inner", "link", "other", "port", "third"]);
}

#[test]
fn directory_swapped_for_a_link_does_not_move_the_socket() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (allowed, outside, _victim) = allowed_and_outside(dir.path());
    let (tenant, away) = (allowed.join("tenant"), allowed.join("away"));
    std::fs::create_dir(&tenant).unwrap();
    let place = Place::open(&tenant.join("new"), Some(&allowed)).unwrap();
    std::fs::rename(&tenant, &away).unwrap();
    symlink(&outside, &tenant).unwrap();
    let (_socket, published) = place.publish(Access::default(), 1).unwrap();
    assert_eq!((entries(&away), entries(&outside)), (vec!["new".to_owned()], vec!["port".to_owned()]));
    drop(published);
    assert!(entries(&away).is_empty());
}

#[test]
fn directory_that_becomes_a_link_is_not_dialled_through() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (allowed, outside, victim) = allowed_and_outside(dir.path());
    let (tenant, sessions) = (allowed.join("tenant"), sessions());
    std::fs::create_dir(&tenant).unwrap();
    let endpoint = Endpoint { beneath: Some(allowed.clone()), ..Endpoint::connect(tenant.join("port")) };
    let id = sessions.add(endpoint, Box::new(Recorder::default())).unwrap();
    let refused = |what| {
        wait_until(what, || match sessions.status(id).unwrap().state {
            SessionState::Dialling { last_error: Some(error), .. } => error.contains("does not stay"),
            _ => false,
        });
    };
    // The socket's own name as a link, then the directory's.
    symlink(outside.join("port"), tenant.join("port")).unwrap();
    refused("a link to a socket");
    std::fs::remove_file(tenant.join("port")).unwrap();
    wait_until("nothing there", || match sessions.status(id).unwrap().state {
        SessionState::Dialling { last_error: Some(error), .. } => error.contains("No such file"),
        _ => false,
    });
    std::fs::remove_dir(&tenant).unwrap();
    symlink(&outside, &tenant).unwrap();
    refused("a link to a directory");
    assert!(victim.accept().is_err(), "nobody may dial it");
    std::fs::remove_file(&tenant).unwrap();
    std::fs::create_dir(&tenant).unwrap();
    let listener = UnixListener::bind(tenant.join("port")).unwrap();
    let mut front_end = Raw::new(listener.accept().unwrap().0);
    assert_eq!(front_end.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
}

/// Whoever compares names first and uses them afterwards loses this race within a few rounds.
#[test]
fn swapping_all_the_time_does_not_help_either() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (allowed, outside, victim) = allowed_and_outside(dir.path());
    let (tenant, link) = (allowed.join("tenant"), allowed.join("link"));
    std::fs::create_dir(&tenant).unwrap();
    symlink(&outside, &link).unwrap();
    let (done, sessions) = (AtomicBool::new(false), sessions());
    let (mut made, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                renameat_with(CWD, &tenant, CWD, &link, RenameFlags::EXCHANGE).unwrap();
            }
        });
        let deadline = Instant::now() + SOON;
        while (made < 100 || refused < 100) && Instant::now() < deadline {
            for endpoint in [Endpoint::listen(tenant.join("new")), Endpoint::connect(tenant.join("port"))] {
                let endpoint = Endpoint { beneath: Some(allowed.clone()), ..endpoint };
                match sessions.add(endpoint, Box::new(Recorder::default())) {
                    Ok(id) => {
                        made += 1;
                        sessions.remove(id);
                    }
                    Err(EndpointError::Strays { .. }) => refused += 1,
                    Err(error) => panic!("{error}"),
                }
            }
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(made >= 100 && refused >= 100, "{made} made, {refused} refused");
    assert!(victim.accept().is_err(), "nobody may dial it");
    assert_eq!(entries(&outside), ["port"]);
}

#[test]
fn paths_that_cannot_be_sockets_are_refused_with_the_reason() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let sessions = sessions();
    let longest = |len: usize| dir.path().join("x".repeat(len - dir.path().as_os_str().len() - 1));
    let id = listen(&sessions, &longest(PATH_MAX)).unwrap();
    assert_eq!(Raw::connect(&longest(PATH_MAX)).ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    sessions.remove(id);
    let error = listen(&sessions, &longest(PATH_MAX + 1)).unwrap_err();
    assert!(matches!(error, EndpointError::PathTooLong { len, .. } if len == PATH_MAX + 1), "{error}");
    let add = |endpoint| sessions.add(endpoint, Box::new(Recorder::default()));
    let error = add(Endpoint::connect(longest(PATH_MAX + 1))).unwrap_err();
    assert!(matches!(error, EndpointError::PathTooLong { .. }));
    for path in ["", "/", "..", "/run/", "/run/.", "a\0b"] {
        assert!(matches!(add(Endpoint::listen(path)).unwrap_err(), EndpointError::Path(_)), "{path:?}");
        assert!(matches!(add(Endpoint::connect(path)).unwrap_err(), EndpointError::Path(_)), "{path:?}");
    }
    let error = listen(&sessions, &dir.path().join("missing/port")).unwrap_err();
    assert!(error.to_string().contains("No such file or directory"), "{error}");
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn dialling_finds_a_socket_as_soon_as_it_appears() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port");
    // Pauses so long that only the directory watch can be what finds it.
    let minute = Duration::from_secs(60);
    let limits = Limits { dial_pause_min: minute, dial_pause_max: minute, ..Limits::default() };
    let sessions = Sessions::start(limits, Box::new(|_, _| {})).unwrap();
    let id = sessions.add(Endpoint::connect(&path), Box::new(Recorder::default())).unwrap();
    wait_until("the first attempt", || {
        matches!(sessions.status(id).unwrap().state, SessionState::Dialling { attempts: 1, .. })
    });
    // Bound elsewhere and renamed: listening when it appears.
    let listener = UnixListener::bind(dir.path().join("hidden")).unwrap();
    let began = Instant::now();
    std::fs::rename(dir.path().join("hidden"), &path).unwrap();
    let mut front_end = Raw::new(listener.accept().unwrap().0);
    assert_eq!(front_end.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    assert!(began.elapsed() < Duration::from_secs(1), "found after {:?}", began.elapsed());
}

#[test]
fn dialling_waits_for_directory_listener_and_handshake() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let later = dir.path().join("later");
    let path = later.join("port");
    let states: Arc<Mutex<Vec<SessionState>>> = Arc::default();
    let seen = Arc::clone(&states);
    let note = move |_, status: &SessionStatus| seen.lock().unwrap().push(status.state.clone());
    let sessions = Sessions::start(Limits::default(), Box::new(note)).unwrap();
    let id = sessions.add(Endpoint::connect(&path), Box::new(Recorder::default())).unwrap();
    let error = |text: &str| match sessions.status(id).unwrap().state {
        SessionState::Dialling { last_error: Some(error), .. } => error.contains(text),
        _ => false,
    };
    wait_until("no directory", || error("No such file"));
    std::fs::create_dir(&later).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    wait_until("no listener", || error("refused"));
    std::fs::remove_file(&path).unwrap();
    // Connecting can succeed against an owner that dies; only a message proves a front end.
    let listener = UnixListener::bind(&path).unwrap();
    for _ in 0..3 {
        drop(listener.accept().unwrap());
    }
    wait_until("closed at once", || error("closed the connection"));
    let mut front_end = Raw::new(listener.accept().unwrap().0);
    assert_eq!(front_end.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    assert_eq!(sessions.status(id).unwrap().state, SessionState::Negotiating);
    drop(front_end);
    let _again = listener.accept().unwrap();
    sessions.remove(id);
    assert!(states.lock().unwrap().contains(&SessionState::Negotiating), "changes are told");
}

#[test]
fn dialling_survives_a_full_backlog() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("port");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let waiting = UnixStream::connect(&path).unwrap();
    let sessions = sessions();
    let id = sessions.add(Endpoint::connect(&path), Box::new(Recorder::default())).unwrap();
    wait_until("attempts that fail at once", || {
        matches!(sessions.status(id).unwrap().state, SessionState::Dialling { attempts: 3.., .. })
    });
    drop((listener.accept().unwrap(), waiting));
    let mut front_end = Raw::new(listener.accept().unwrap().0);
    assert_eq!(front_end.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
}

/// A TCP socket whose last close waits for its peer, and that peer.
fn lingering() -> (OwnedFd, std::net::TcpStream) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    sockopt::set_socket_linger(&socket, Some(Duration::from_secs(60))).unwrap();
    socket.set_nonblocking(true).unwrap();
    while std::io::Write::write(&mut &socket, &[0; 65536]).is_ok() {}
    (socket.into(), peer)
}

#[test]
fn descriptor_whose_close_blocks_stops_its_own_port_only() {
    let bench = Bench::new();
    let (poison, cure) = lingering();
    // Refused, when the back end's reference to it is the last.
    let mut raw = bench.negotiated();
    let kick = message(id::SET_VRING_KICK, NEED_REPLY, &[0; 8]);
    raw.send_bytes(&kick[..12], &[poison.as_fd()]);
    drop(poison);
    raw.send_bytes(&kick[12..], &[]);
    assert_eq!(raw.reply(id::SET_VRING_KICK), NACK);
    bench.check_canary();
    // The session itself goes on ...
    assert_eq!(raw.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    drop(raw);
    // ... but the next one has to wait until the poison is gone.
    let mut next = bench.raw();
    next.send(id::GET_FEATURES, &[], &[]);
    bench.check_canary();
    next.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(std::io::Read::read(&mut next.stream, &mut [0]).is_err(), "answered too early");
    drop(cure);
    next.stream.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(next.reply(id::GET_FEATURES), OFFERED.to_ne_bytes());
    drop(next);
    bench.check_recovered();
}

#[test]
fn endpoint_with_a_descriptor_whose_close_blocks_can_be_removed() {
    let bench = Bench::new();
    let path = bench.path.with_file_name("poisoned");
    let memory = Memory::new(0);
    let mut cures = Vec::new();
    // The second time the path is free again, though nothing of the first is closed yet.
    for _ in 0..2 {
        let id = listen(&bench.sessions, &path).unwrap();
        let mut raw = Raw::connect(&path);
        raw.number(id::SET_PROTOCOL_FEATURES, REPLY_ACK);
        let (poison, cure) = lingering();
        let kick = message(id::SET_VRING_KICK, NEED_REPLY, &[0; 8]);
        raw.send_bytes(&kick[..12], &[poison.as_fd()]);
        drop(poison);
        raw.send_bytes(&kick[12..], &[]);
        assert_eq!(raw.reply(id::SET_VRING_KICK), NACK);
        memory.give(&mut raw);
        bench.sessions.remove(id);
        assert_eq!(Holdings::now().mappings, 0);
        assert!(!path.exists());
        cures.push(cure);
    }
    drop((cures, memory));
    bench.check_recovered();
}

#[test]
fn descriptors_in_unread_messages_block_nobody_either() {
    let bench = Bench::new();
    let kick = message(id::SET_VRING_KICK, PLAIN, &[0; 8]);
    let (poison, cure) = lingering();
    let raw = bench.raw();
    // So many replies wait that the message with the descriptor is never read.
    raw.send_bytes(&message(id::GET_FEATURES, PLAIN, &[]).repeat(1000), &[]);
    raw.send_bytes(&kick, &[poison.as_fd()]);
    drop(poison);
    drop(raw);
    bench.wait_for_state(&SessionState::Listening);
    bench.check_canary();
    // Meanwhile two wait for their turn; the second will be turned away with a message unread.
    let (poison, second_cure) = lingering();
    let (mut first, second) = (bench.raw(), bench.raw());
    second.send_bytes(&kick, &[poison.as_fd()]);
    drop(poison);
    drop(second);
    bench.check_canary();
    drop(cure);
    assert_eq!(first.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    wait_until("the second", || bench.status().rejected == 1);
    bench.check_canary();
    assert_eq!(first.ask(id::GET_FEATURES, &[]), OFFERED.to_ne_bytes());
    drop((first, second_cure));
    bench.check_recovered();
}

#[test]
fn endpoint_is_removed_in_the_middle_of_everything() {
    let bench = Bench::new();
    let memory = Memory::new(0);
    let path = bench.path.with_file_name("second");
    for _ in 0..50 {
        let device = Recorder::default();
        let id = bench.sessions.add(Endpoint::listen(&path), Box::new(device.clone())).unwrap();
        let mut raw = Raw::connect(&path);
        raw.number(id::SET_PROTOCOL_FEATURES, PROTOCOL_OFFERED & !STATUS);
        raw.number(id::SET_FEATURES, OFFERED);
        memory.give(&mut raw);
        let kick = raw.start_ring(0, &memory);
        // Half a message.
        raw.send_bytes(&[1], &[]);
        bench.sessions.remove(id);
        // All of it has happened when it returns.
        assert_eq!(device.calls().last(), Some(&Call::Disconnected));
        assert!(!path.exists());
        assert_eq!(Holdings::now().mappings, 0);
        assert!(bench.sessions.status(id).is_none());
        raw.closed();
        drop(kick);
    }
    drop(memory);
    bench.check_recovered();
}

#[test]
fn many_endpoints_in_one_thread() {
    let _alone = alone();
    let base = Holdings::now();
    let dir = tempfile::tempdir().unwrap();
    let sessions = sessions();
    let count = 512;
    let began = Instant::now();
    let ids: Vec<_> =
        (0..count).map(|n| listen(&sessions, &dir.path().join(format!("port-{n}"))).unwrap()).collect();
    assert!(began.elapsed() < Duration::from_secs(2), "{count} endpoints took {:?}", began.elapsed());
    assert_eq!(Holdings::now().threads, base.threads + 1);
    let mut peers: Vec<_> = (0..count).map(|n| Raw::connect(&dir.path().join(format!("port-{n}")))).collect();
    for peer in &peers {
        peer.send(id::GET_FEATURES, &[], &[]);
    }
    for peer in &mut peers {
        assert_eq!(peer.reply(id::GET_FEATURES), OFFERED.to_ne_bytes());
    }
    drop(peers);
    for id in ids {
        sessions.remove(id);
    }
    assert!(entries(dir.path()).is_empty());
    drop(sessions);
    base.wait_for_return();
}
