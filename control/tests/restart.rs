//! What survives: SIGKILL, SIGTERM, a second daemon, a damaged store.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod support;

use redb::ReadableTable;
use serde_json::{Value, json};
use support::Place;

fn plug(place: &Place, id: &str, role: &str, name: &str) {
    let body = json!({"spec": {"socket": {"role": role, "path": place.path(name)}}}).to_string();
    let answer = place.http("PUT", &format!("/v1/plugs/{id}"), &body);
    assert_eq!(answer.status, 201, "{answer:?}");
}

fn specs(place: &Place) -> Vec<(Value, Value)> {
    let plugs = place.http("GET", "/v1/plugs", "").json();
    plugs.as_array().unwrap().iter().map(|plug| (plug["id"].clone(), plug["spec"].clone())).collect()
}

#[test]
fn plugs_are_back_after_a_kill_without_anyone_asking() {
    let place = Place::default();
    let daemon = place.serve();
    for i in 0..20 {
        plug(&place, &format!("vm{i}"), if i % 2 == 0 { "listen" } else { "connect" }, &format!("{i}.sock"));
    }
    place.http("DELETE", "/v1/plugs/vm3", "");
    let before = specs(&place);
    daemon.kill();
    let mut daemon = place.serve();
    assert_eq!(specs(&place), before);
    assert_eq!(place.phase("vm0"), "attached");
    assert!(std::os::unix::net::UnixStream::connect(place.path("0.sock")).is_ok());

    assert_eq!(daemon.terminate(), 0);
    assert!(!place.api().exists(), "the API's socket outlives its daemon");
    let _daemon = place.serve();
    assert_eq!(specs(&place), before);
}

#[test]
fn a_plug_that_cannot_come_back_yet_comes_back_later() {
    let place = Place::default();
    let dir = place.path("dir");
    std::fs::create_dir(&dir).unwrap();
    let daemon = place.serve();
    plug(&place, "a", "listen", "dir/a.sock");
    plug(&place, "b", "listen", "b.sock");
    daemon.kill();
    std::fs::remove_dir_all(&dir).unwrap();
    let _daemon = place.serve();
    assert_eq!(place.phase("b"), "attached");
    let plug = place.http("GET", "/v1/plugs/a", "").json();
    assert_eq!(plug["status"]["phase"], "pending");
    assert_eq!(plug["status"]["conditions"][0]["whose"], "host", "{plug}");
    std::fs::create_dir(&dir).unwrap();
    place.until("a is attached", || place.phase("a") == "attached");
}

#[test]
fn an_unplug_that_was_begun_is_finished() {
    let place = Place::default();
    let daemon = place.serve();
    plug(&place, "a", "listen", "a.sock");
    daemon.kill();
    // As a crash between the two halves of an unplug leaves it.
    let path = place.path("state/plugs.redb");
    let table = redb::TableDefinition::<&str, &[u8]>::new("plugs");
    let database = redb::Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut table = transaction.open_table(table).unwrap();
        let record = String::from_utf8(table.get("a").unwrap().unwrap().value().to_vec()).unwrap();
        table.insert("a", record.replace("\"plugged\"", "\"unplugged\"").as_bytes()).unwrap();
    }
    transaction.commit().unwrap();
    drop(database);
    let _daemon = place.serve();
    assert_eq!(specs(&place), []);
}

#[test]
fn one_daemon_a_state_directory_and_a_socket() {
    let place = Place::default();
    let _daemon = place.serve();
    let elsewhere = Place::default();
    std::os::unix::fs::symlink(place.path("state"), elsewhere.path("state")).unwrap();
    let mut same_state = elsewhere.spawn(&[]);
    assert_eq!(same_state.wait(), 4);
    assert!(same_state.log().contains("is in use by another vhostd"), "{}", same_state.log());
    assert!(!elsewhere.api().exists());

    let state = elsewhere.path("own-state").display().to_string();
    let mut same_api = place.spawn(&["--state-dir", &state]);
    assert_eq!(same_api.wait(), 4);
    assert!(same_api.log().contains("is served by a running process"), "{}", same_api.log());
    assert_eq!(place.http("GET", "/healthz", "").status, 200);
}

#[test]
fn a_damaged_store_is_not_taken_for_an_empty_one() {
    let place = Place::default();
    let daemon = place.serve();
    plug(&place, "a", "listen", "a.sock");
    daemon.kill();
    let path = place.path("state/plugs.redb");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 3]).unwrap();
    let mut daemon = place.spawn(&[]);
    assert_eq!(daemon.wait(), 7);
    assert!(daemon.log().contains("plugs.redb cannot be read"), "{}", daemon.log());
    std::fs::write(&path, &whole).unwrap();
    let _daemon = place.serve();
    assert_eq!(specs(&place).len(), 1);
}

#[test]
fn a_disk_that_takes_no_more_changes_nothing() {
    let place = Place::default();
    let daemon = place.serve_limited();
    plug(&place, "a", "listen", "a.sock");
    daemon.limit_file_size("4096");
    let body = json!({"spec": {"socket": {"role": "listen", "path": place.path("b.sock")}}}).to_string();
    for (method, id) in [("PUT", "b"), ("DELETE", "a"), ("PUT", "b")] {
        let answer = place.http(method, &format!("/v1/plugs/{id}"), &body);
        assert_eq!((answer.status, answer.json()["retryable"].as_bool()), (500, Some(true)), "{answer:?}");
    }
    assert!(!place.path("b.sock").exists());
    assert_eq!(place.phase("a"), "attached");
    daemon.limit_file_size("unlimited");
    plug(&place, "b", "listen", "b.sock");
    let before = specs(&place);
    assert_eq!(before.len(), 2);
    daemon.kill();
    let _daemon = place.serve();
    assert_eq!(specs(&place), before);
}

#[test]
fn a_bad_configuration_is_refused() {
    let place = Place::default();
    let config = place.path("vhostd.toml");
    std::fs::write(&config, "[api]\nmode = \"rw\"\n").unwrap();
    let mut daemon = place.spawn(&["--config", config.to_str().unwrap()]);
    assert_eq!(daemon.wait(), 2);
    assert!(daemon.log().contains("is not a mode"), "{}", daemon.log());
}

#[test]
fn a_service_manager_is_told_and_fed() {
    let place = Place::default();
    let notify = std::os::unix::net::UnixDatagram::bind(place.path("notify")).unwrap();
    notify.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    let next = || {
        let mut message = [0; 4096];
        let length = notify.recv(&mut message).unwrap();
        String::from_utf8(message[..length].to_vec()).unwrap()
    };
    let mut daemon = place.spawn_as_service(std::time::Duration::from_millis(100));
    assert_eq!(next(), "READY=1\nSTATUS=0 plugs\n");
    assert_eq!(next(), "WATCHDOG=1\n");
    assert_eq!(next(), "WATCHDOG=1\n");
    daemon.terminate();
    let mut rest = std::iter::repeat_with(next);
    assert!(rest.any(|message| message == "STOPPING=1\n"));
}
