//! The API on its socket: what it refuses, what can be repeated, what it waits for, and who it lets in.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Http, Place};

fn listen(place: &Place, name: &str) -> Value {
    json!({"spec": {"socket": {"role": "listen", "path": place.path(name)}}})
}

fn put(place: &Place, id: &str, body: &Value) -> Http {
    place.http("PUT", &format!("/v1/plugs/{id}"), &body.to_string())
}

/// Checks that an answer is a problem of this sort.
fn assert_problem(answer: &Http, status: u16, kind: &str) -> Value {
    assert_eq!(answer.status, status, "{answer:?}");
    assert!(answer.head.contains("application/problem+json"), "{answer:?}");
    let problem = answer.json();
    assert_eq!((&problem["type"], &problem["status"]), (&json!(kind), &json!(status)), "{problem}");
    problem
}

#[test]
fn plug_and_unplug_can_be_repeated() {
    let place = Place::default();
    let _daemon = place.serve();
    let body = listen(&place, "a.sock");
    assert_eq!(put(&place, "a", &body).status, 201);
    let again = put(&place, "a", &body);
    assert_eq!((again.status, &again.json()["status"]["phase"]), (200, &json!("attached")));
    // What the daemon filled in, asked for explicitly, is no difference.
    let mut explicit = body.clone();
    explicit["spec"]["network"] = "default".into();
    explicit["spec"]["mtu"] = 1500.into();
    assert_eq!(put(&place, "a", &explicit).status, 200);
    explicit["spec"]["mtu"] = 9000.into();
    let problem = assert_problem(&put(&place, "a", &explicit), 409, "conflict");
    assert_eq!(problem["field"], "spec.mtu");
    for existed in [true, false] {
        let answer = place.http("DELETE", "/v1/plugs/a", "");
        assert_eq!((answer.status, answer.json()), (200, json!({"id": "a", "existed": existed})));
    }
    assert_problem(&place.http("DELETE", "/v1/plugs/a?must_exist=true", ""), 404, "not-found");
    assert!(!place.path("a.sock").exists());
}

#[test]
fn one_name_asked_for_at_once_is_plugged_once() {
    let place = Place::default();
    let _daemon = place.serve();
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let put = |name: &str| put(&place, "a", &listen(&place, name)).status;
        let askers: Vec<_> =
            (0..8).map(|i| scope.spawn(move || put(if i % 2 == 0 { "x.sock" } else { "y.sock" }))).collect();
        askers.into_iter().map(|asker| asker.join().unwrap()).collect()
    });
    let count = |status| statuses.iter().filter(|s| **s == status).count();
    assert_eq!((count(201), count(200), count(409)), (1, 3, 4), "{statuses:?}");
}

#[test]
fn what_another_plug_has_cannot_be_had() {
    let place = Place::default();
    let _daemon = place.serve();
    put(&place, "a", &listen(&place, "a.sock"));
    let problem = assert_problem(&put(&place, "b", &listen(&place, "a.sock")), 409, "conflict");
    assert_eq!(problem["field"], "spec.socket.path");
    assert!(problem["detail"].as_str().unwrap().contains("plug a"), "{problem}");
    assert_eq!(place.http("GET", "/v1/plugs", "").json().as_array().unwrap().len(), 1);
}

#[test]
fn bad_requests_are_refused_with_their_place() {
    let place = Place::default();
    let _daemon = place.serve();
    let plug = |body: &str| place.http("PUT", "/v1/plugs/a", body);
    for (body, expect) in [
        ("", "not valid JSON"),
        ("{} {}", "not valid JSON"),
        (r#"{"spec":{}}"#, "neither a socket nor a host side"),
        (r#"{"spec":{"socket":{"role":"listen","path":"/x"},"sockets":1}}"#, "unknown field `sockets`"),
        (r#"{"spec":{"socket":{"role":"listen","path":"/x"}},"labels":{}}"#, "unknown field `labels`"),
        (r#"{"spec":{"mtu":1500,"mtu":1500}}"#, "twice"),
        (r#"{"spec":{"socket":{"role":"listen","path":"/run/../etc/x"}}}"#, "without '.', '..'"),
        (r#"{"spec":{"socket":{"role":"listen","path":"x"}}}"#, "absolute"),
        (r#"{"spec":{"socket":{"role":"server","path":"/x"}}}"#, "unknown variant `server`"),
        (r#"{"spec":{"socket":{"role":"listen","path":"/x"},"mtu":1e400}}"#, "not valid JSON"),
        (r#"{"spec":{"socket":{"role":"listen","path":"/x"},"mtu":-1}}"#, "invalid value"),
        (r#"{"spec":{"socket":{"role":"listen","path":"/x"},"network":"a/b"}}"#, "not a name"),
        (r#"{"spec":{"to":{"kind":"tap","tap":"a%d"}}}"#, "not an interface name"),
        (r#"{"spec":{"to":{"kind":"ovs","bridge":"br","iface_id":""}}}"#, "not an identifier"),
        (r#"{"spec":{"to":{"kind":"tap","tap":"0123456789abcdef"}}}"#, "not an interface name"),
    ] {
        let problem = assert_problem(&plug(body), 400, "invalid");
        assert!(problem["detail"].as_str().unwrap().contains(expect), "{body}: {problem}");
    }
    assert_problem(&plug(&" ".repeat(65_537)), 413, "too-large");
    assert_problem(&plug(&"[".repeat(60_000)), 400, "invalid");
    let long = "x".repeat(64);
    for id in [
        "..", "%2e%2e", "a%2Fb", "-rf", ".x", "a%0Ab", "a%20b", "%25d", "$(x)", "a;b", "%D1%85", &long, "%FF",
    ] {
        let answer = place.http("PUT", &format!("/v1/plugs/{id}"), &listen(&place, "x").to_string());
        assert_problem(&answer, 400, "invalid");
    }
    for query in ["?wait=soon", "?timeout=1y", "?timeout=x", "?dryrun=true", "?wait=linked&wait=linked"] {
        let answer = place.http("PUT", &format!("/v1/plugs/a{query}"), &listen(&place, "x").to_string());
        assert_problem(&answer, 400, "invalid");
    }
    assert_problem(&place.http("GET", "/v1/nothing", ""), 404, "not-found");
    assert_problem(&place.http("POST", "/v1/plugs", ""), 405, "method-not-allowed");
    assert_eq!(place.http("GET", "/v1/plugs", "").json(), json!([]));
}

#[test]
fn a_dry_run_does_nothing() {
    let place = Place::default();
    let _daemon = place.serve();
    let body = listen(&place, "a.sock").to_string();
    let dry = place.http("PUT", "/v1/plugs/a?dry_run=true", &body);
    assert_eq!((dry.status, &dry.json()["spec"]["mtu"]), (201, &json!(1500)));
    let path = place.path("a.sock").display().to_string();
    let steps = [
        "record plug a, so that a restart brings it back".to_owned(),
        format!("make socket {path}, on which the guest's front end joins network default"),
    ];
    assert_eq!(dry.json()["steps"], json!(steps));
    assert_eq!(place.http("GET", "/v1/plugs", "").json(), json!([]));
    assert!(!place.path("a.sock").exists());
    place.http("PUT", "/v1/plugs/a", &body);
    let again = place.http("PUT", "/v1/plugs/a?dry_run=true", &body);
    assert_eq!((again.status, &again.json()["steps"]), (200, &Value::Null));
    let conflict = place.http("PUT", "/v1/plugs/b?dry_run=true", &body);
    assert_problem(&conflict, 409, "conflict");
    assert_eq!(place.http("DELETE", "/v1/plugs/a?dry_run=true", "").json()["existed"], json!(true));
    assert!(place.path("a.sock").exists());
}

#[test]
fn a_wait_that_is_in_vain_names_what_is_missing() {
    let place = Place::default();
    let _daemon = place.serve();
    let body = listen(&place, "a.sock").to_string();
    let answer = place.http("PUT", "/v1/plugs/a?wait=forwarding&timeout=50ms", &body);
    let problem = assert_problem(&answer, 504, "timeout");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("waiting for a front end to connect"), "{detail}");
    assert_eq!(problem["retryable"], json!(true));
    // The plug is there nevertheless.
    assert_eq!(place.phase("a"), "attached");
}

#[test]
fn sockets_stay_in_their_directories() {
    let place = Place::default();
    let (inside, outside) = (place.path("inside"), place.path("outside"));
    std::fs::create_dir(&inside).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
    let config = place.path("vhostd.toml");
    std::fs::write(&config, format!("[sockets]\ndirs = [{inside:?}]\nmode = \"0600\"\n")).unwrap();
    let _daemon = place.serve_with(&["--config", config.to_str().unwrap()]);
    assert_eq!(put(&place, "a", &listen(&place, "inside/a.sock")).status, 201);
    let mode = std::fs::metadata(inside.join("a.sock")).unwrap().permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600);
    for (path, why) in [
        ("outside/b.sock", "sockets.dirs"),
        ("b.sock", "sockets.dirs"),
        ("inside/link/b.sock", "no symbolic link"),
    ] {
        let problem = assert_problem(&put(&place, "b", &listen(&place, path)), 424, "precondition");
        assert!(problem["detail"].as_str().unwrap().contains(why), "{problem}");
    }
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn what_is_in_a_sockets_way_stays() {
    let place = Place::default();
    let _daemon = place.serve();
    std::fs::write(place.path("file"), "precious").unwrap();
    std::fs::create_dir(place.path("dir")).unwrap();
    std::os::unix::fs::symlink("/nowhere", place.path("dangling")).unwrap();
    let live = std::os::unix::net::UnixListener::bind(place.path("live")).unwrap();
    for name in ["file", "dir", "dangling", "live"] {
        assert_problem(&put(&place, "a", &listen(&place, name)), 409, "conflict");
        assert_eq!(place.http("GET", "/v1/plugs/a", "").status, 404, "{name}");
    }
    drop(live);
    // Its file is still there, but nobody listens: a stale socket of our own user.
    assert_eq!(put(&place, "a", &listen(&place, "live")).status, 201);
    assert_eq!(std::fs::read_to_string(place.path("file")).unwrap(), "precious");
}

#[test]
fn os_vif_is_spoken() {
    let place = Place::default();
    let _daemon = place.serve();
    let object = |class: &str, data: Value| {
        json!({"versioned_object.name": class, "versioned_object.namespace": "os_vif",
            "versioned_object.version": "1.0", "versioned_object.data": data})
    };
    let id = "dc065497-3c8d-4f44-8fb4-e1d33c16a536";
    let data = json!({"id": id, "path": place.path("v.sock"), "mode": "client",
        "network": object("Network", json!({"id": "b82c1929-051e-481d-8110-4669916c7915"}))});
    let instance_info = object("InstanceInfo", json!({"uuid": "u", "name": "vm"}));
    let body = json!({"vif": object("VIFVHostUser", data), "instance_info": instance_info}).to_string();
    let made = place.http("POST", "/v1/os-vif/plug?wait=attached", &body);
    assert_eq!((made.status, &made.json()["id"]), (201, &json!(id)));
    assert_eq!(made.json()["spec"]["network"], "b82c1929-051e-481d-8110-4669916c7915");
    assert_eq!(place.http("POST", "/v1/os-vif/plug", &body).status, 200);

    let generic = json!({"vif": object("VIFBase", json!({"id": "g"}))}).to_string();
    let problem = assert_problem(&place.http("POST", "/v1/os-vif/plug", &generic), 501, "unsupported");
    assert!(problem["hint"].as_str().unwrap().contains("VIFVHostUser"), "{problem}");
    for bad in [
        json!({}),
        json!({"vif": 1}),
        json!({"vif": object("VIFNope", json!({}))}),
        json!({"vif": {}, "x": 1}),
    ] {
        assert_problem(&place.http("POST", "/v1/os-vif/plug", &bad.to_string()), 400, "invalid");
    }
    // At unplug nothing but the id counts.
    let only_id = json!({"vif": object("VIFVHostUser", json!({"id": id}))}).to_string();
    for existed in [true, false] {
        let answer = place.http("POST", "/v1/os-vif/unplug", &only_id);
        assert_eq!(answer.json(), json!({"id": id, "existed": existed}));
    }
}

#[test]
fn the_log_can_be_turned_up_at_run_time() {
    let place = Place::default();
    let daemon = place.serve();
    assert_eq!(place.http("GET", "/v1/log", "").json(), json!({"filter": "info"}));
    let louder = place.http("PUT", "/v1/log", r#"{"filter":"info,vhostd=debug"}"#);
    assert_eq!(louder.json()["filter"], "vhostd=debug,info");
    assert!(daemon.log().contains("log filter changed"), "{}", daemon.log());
    for bad in ["", "vhostd=loud", "=[{"] {
        let body = json!({ "filter": bad }).to_string();
        assert_problem(&place.http("PUT", "/v1/log", &body), 400, "invalid");
    }
}

#[test]
fn metrics_and_health_are_told() {
    let place = Place::default();
    let _daemon = place.serve();
    put(&place, "a", &listen(&place, "a.sock"));
    let metrics = place.http("GET", "/metrics", "");
    assert!(metrics.head.contains("application/openmetrics-text"), "{}", metrics.head);
    for line in [
        r#"vhostd_port_rx_frames_total{port="a",network="default"} 0"#,
        r#"vhostd_port_linked{port="a",network="default"} 0"#,
        r#"vhostd_plugs{phase="attached"} 1"#,
        "# EOF",
    ] {
        assert!(metrics.body.contains(line), "{line}: {}", metrics.body);
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(place.http("GET", path, "").body, "ok\n");
    }
}

#[test]
fn every_described_path_exists() {
    let place = Place::default();
    let _daemon = place.serve();
    let document = place.http("GET", "/openapi.json", "").json();
    assert_eq!(document["openapi"], "3.1.0");
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys().filter(|_| path != "/v1/events") {
            let answer = place.http(&method.to_ascii_uppercase(), &path.replace("{id}", "x"), "{}");
            // Whatever it says of this body: somebody is there to say it.
            let absent = answer.status == 405 || answer.body.contains("there is no /");
            assert!(!absent, "{method} {path}: {answer:?}");
        }
    }
}

/// A reader of server-sent events.
struct Events(BufReader<UnixStream>);

impl Events {
    fn open(place: &Place, more: &str) -> Self {
        let mut stream = UnixStream::connect(place.api()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(stream, "GET /v1/events HTTP/1.1\r\nhost: x\r\n{more}\r\n").unwrap();
        let mut events = Self(BufReader::new(stream));
        while !events.line().is_empty() {}
        events
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        assert!(self.0.read_line(&mut line).unwrap() > 0, "the stream ended");
        line.trim_end().to_owned()
    }

    /// The next event: id, kind, data.
    fn next(&mut self) -> (String, String, Value) {
        let mut event = (String::new(), String::new(), Value::Null);
        loop {
            let line = self.line();
            match line.split_once(": ") {
                Some(("id", id)) => event.0 = id.into(),
                Some(("event", kind)) => event.1 = kind.into(),
                Some(("data", data)) => event.2 = serde_json::from_str(data).unwrap(),
                _ if line.is_empty() && !event.0.is_empty() => return event,
                _ => {}
            }
        }
    }
}

#[test]
fn events_go_on_where_the_reader_left() {
    let place = Place::default();
    let _daemon = place.serve();
    let mut events = Events::open(&place, "");
    put(&place, "a", &listen(&place, "a.sock"));
    place.http("DELETE", "/v1/plugs/a", "");
    let (first, kind, data) = events.next();
    assert_eq!((kind.as_str(), &data["plug"], &data["id"]), ("plugged", &json!("a"), &json!(first)));
    assert_eq!(events.next().1, "unplugged");
    drop(events);

    put(&place, "b", &listen(&place, "b.sock"));
    let mut resumed = Events::open(&place, &format!("last-event-id: {first}\r\n"));
    assert_eq!(resumed.next().1, "unplugged");
    let (_, kind, data) = resumed.next();
    assert_eq!((kind.as_str(), &data["plug"]), ("plugged", &json!("b")));

    // Of another run of the daemon: everything anew.
    let mut foreign = Events::open(&place, "last-event-id: 1-1\r\n");
    let (cursor, kind, data) = foreign.next();
    assert_eq!((kind.as_str(), &data[0]["id"]), ("resync", &json!("b")));
    put(&place, "c", &listen(&place, "c.sock"));
    let (next, kind, _) = foreign.next();
    assert_eq!(kind, "plugged");
    assert_ne!(next, cursor);
}

#[test]
fn a_user_who_is_not_listed_is_denied() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: only root can become somebody else");
        return;
    }
    let place = Place::default();
    let config = place.path("vhostd.toml");
    std::fs::set_permissions(place.path(""), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let write =
        |uids: &str| std::fs::write(&config, format!("[api]\nmode = \"0666\"\nuids = [{uids}]\n")).unwrap();
    write("4242");
    let daemon = place.serve_with(&["--config", config.to_str().unwrap()]);
    let denied = place.vhostd_as_nobody(&["ls"]);
    assert_eq!(denied.code, 1, "{denied:?}");
    assert!(denied.err.contains("user 65534 is not in api.uids"), "{denied:?}");
    assert!(daemon.log().contains("refused a connection"), "{}", daemon.log());
    daemon.kill();
    write("65534");
    let _daemon = place.serve_with(&["--config", config.to_str().unwrap()]);
    place.vhostd_as_nobody(&["ls"]).ok();
    std::fs::set_permissions(place.api(), std::os::unix::fs::PermissionsExt::from_mode(0o660)).unwrap();
    let denied = place.vhostd_as_nobody(&["ls"]);
    assert_eq!(denied.code, 6, "{denied:?}");
    assert!(denied.err.contains("user 65534 may not connect to the daemon"), "{denied:?}");
}

#[test]
fn a_full_house_is_refused_at_the_door() {
    let place = Place::default();
    let daemon = place.serve();
    let descriptors = daemon.descriptors();
    let crowd: Vec<_> = (0..64).map(|_| UnixStream::connect(place.api()).unwrap()).collect();
    let mut refused = UnixStream::connect(place.api()).unwrap();
    let mut answer = String::new();
    refused.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("too many connections"), "{answer}");
    drop(crowd);
    place.until("there is room again", || {
        place.try_http("GET", "/healthz", "").is_some_and(|a| a.status == 200)
    });
    place.until("nothing is left open", || daemon.descriptors() <= descriptors);
}

#[test]
fn a_caller_that_dawdles_does_not_hold_up_others() {
    let place = Place::default();
    let _daemon = place.serve();
    let mut slow = UnixStream::connect(place.api()).unwrap();
    slow.write_all(b"PUT /v1/plugs/a HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{").unwrap();
    assert_eq!(place.http("GET", "/healthz", "").status, 200);
    // Its body never comes: it is told so, not waited for.
    slow.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut answer = [0; 12];
    slow.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 400");
}
