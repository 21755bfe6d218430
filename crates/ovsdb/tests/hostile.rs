//! A server that is broken or means harm: each costs an error that says so, within its time, and the next request works.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

use std::path::Path;
use std::time::Duration;

use ovsdb::{Address, Client, Error, Monitor, PortSpec, Switch};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, timeout};

/// For anything that must end; the client's own limits are far below.
const PATIENCE: Duration = Duration::from_secs(60);

fn address(path: &Path) -> Address {
    format!("unix:{}", path.display()).parse().unwrap()
}

/// Asks a server that serves each connection with `serve`.
async fn asked<F: Future<Output = ()> + Send + 'static>(
    serve: impl Fn(UnixStream, Value) -> F + Send + 'static,
) -> Result<bool, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let request = read_request(&mut stream).await;
            tokio::spawn(serve(stream, request));
        }
    });
    let switch = Switch::new(Client::new(address(&path)));
    let answer = timeout(PATIENCE, switch.has_bridge("br0")).await.expect("it ends in time");
    server.abort();
    answer
}

async fn read_request(stream: &mut UnixStream) -> Value {
    let mut bytes = Vec::new();
    loop {
        if let Ok(request) = serde_json::from_slice(&bytes) {
            return request;
        }
        assert_ne!(stream.read_buf(&mut bytes).await.unwrap(), 0, "the client sends a whole request");
    }
}

fn empty_answer(id: &Value) -> Value {
    let none = json!({"rows": []});
    json!({"id": id, "error": null, "result": [none, none, none, none, none]})
}

#[tokio::test]
async fn what_is_no_answer_is_an_error_that_says_what_it_is() {
    let deep = format!("{{\"id\":0,\"result\":{}", "[".repeat(100));
    for (said, expected) in [
        ("HTTP/1.1 400 Bad Request\r\n", "should start"),
        ("{\"id\":0]", "not JSON"),
        (deep.as_str(), "nested deeper"),
        ("{\"id\":7,\"result\":[],\"error\":null}", "nothing that was asked"),
        ("{\"id\":\"x\",\"result\":[],\"error\":null}", "nothing that was asked"),
        ("{\"id\":0,\"result\":{},\"error\":null}", "no array"),
        ("{\"id\":0,\"result\":[7],\"error\":null}", "no object"),
        ("{\"id\":0,\"result\":[],\"error\":null}", "lacks an operation"),
        ("{\"id\":0,\"method\":7}", "no string"),
    ] {
        let bytes = said.to_owned();
        let error = asked(move |mut stream, _| {
            let bytes = bytes.clone();
            async move {
                stream.write_all(bytes.as_bytes()).await.unwrap();
                let _ = stream.read_buf(&mut Vec::new()).await;
            }
        })
        .await
        .unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{said}: {error}");
        assert!(error.to_string().contains(expected), "{said}: {error}");
    }
}

#[tokio::test]
async fn rows_that_make_no_sense_are_rows_that_are_not_there() {
    for odd in [json!({}), json!({"rows": 7}), json!({"rows": [7, []]}), json!({"rows": {"a": 1}})] {
        let answer = asked(move |mut stream, request| {
            let answer = json!({"id": request["id"], "error": null, "result": [odd, odd, odd, odd, odd]});
            async move {
                stream.write_all(answer.to_string().as_bytes()).await.unwrap();
                let _ = stream.read_buf(&mut Vec::new()).await;
            }
        });
        assert!(!answer.await.unwrap());
    }
}

#[tokio::test]
async fn refusals_are_passed_on() {
    for (answer, expected) in [
        (json!({"id": 0, "result": null, "error": "unknown database"}), "unknown database"),
        (
            json!({"id": 0, "error": null, "result": [{"error": "not owner", "details": "why"}]}),
            "not owner: why",
        ),
    ] {
        let error = asked(move |mut stream, _| {
            let answer = answer.to_string();
            async move { stream.write_all(answer.as_bytes()).await.unwrap() }
        });
        let error = error.await.unwrap_err();
        assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn an_end_in_the_middle_is_told() {
    for said in ["", "{\"id\":0,\"resu"] {
        let error =
            asked(move |mut stream, _| async move { stream.write_all(said.as_bytes()).await.unwrap() });
        let error = error.await.unwrap_err();
        assert!(matches!(error, Error::Closed { .. }), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn silence_and_half_a_message_end_at_the_limit() {
    for said in ["", "{\"id\":0,\"resu", "{\"method\":\"echo\",\"params\":[],\"id\":\"probe\"}"] {
        let start = Instant::now();
        let error = asked(move |mut stream, _| async move {
            stream.write_all(said.as_bytes()).await.unwrap();
            while stream.read_buf(&mut Vec::new()).await.is_ok_and(|length| length > 0) {}
        });
        let error = error.await.unwrap_err();
        assert!(matches!(error, Error::Silent { .. }), "{error}");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn an_endless_message_ends_at_its_length() {
    let error = asked(|mut stream, _| async move {
        let piece = vec![b'a'; 1 << 20];
        stream.write_all(b"{\"").await.unwrap();
        while stream.write_all(&piece).await.is_ok() {}
    });
    let error = error.await.unwrap_err();
    assert!(error.to_string().contains("longer than"), "{error}");
}

#[tokio::test]
async fn probes_are_answered_and_other_news_passed_over() {
    let answered = asked(|mut stream, request| async move {
        let before = [
            json!({"method": "echo", "params": [1, "two"], "id": "probe"}),
            json!({"method": "locked", "params": ["x"], "id": null}),
            json!({"method": "update", "params": [null, {}], "id": null}),
        ];
        for message in before {
            stream.write_all(message.to_string().as_bytes()).await.unwrap();
        }
        let answer = read_request(&mut stream).await;
        assert_eq!(answer, json!({"id": "probe", "result": [1, "two"], "error": null}));
        stream.write_all(empty_answer(&request["id"]).to_string().as_bytes()).await.unwrap();
        let _ = stream.read_buf(&mut Vec::new()).await;
    });
    assert!(!answered.await.unwrap());
}

#[tokio::test]
async fn a_broken_connection_fails_who_waits_on_it_and_the_next_request_has_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let switch = Switch::new(Client::new(address(&path)));
    let error = switch.has_bridge("br0").await.unwrap_err();
    assert!(matches!(&error, Error::Connect { address, .. } if address.contains("db.sock")), "{error}");

    let listener = UnixListener::bind(&path).unwrap();
    let server = tokio::spawn(async move {
        let (mut first, _) = listener.accept().await.unwrap();
        // Both requests are there before it breaks.
        let mut bytes = Vec::new();
        while bytes.windows(8).filter(|word| word == b"transact").count() < 2 {
            assert_ne!(first.read_buf(&mut bytes).await.unwrap(), 0);
        }
        drop(first);
        let (mut second, _) = listener.accept().await.unwrap();
        let request = read_request(&mut second).await;
        second.write_all(empty_answer(&request["id"]).to_string().as_bytes()).await.unwrap();
    });
    let (a, b) = tokio::join!(switch.has_bridge("br0"), switch.has_bridge("br1"));
    assert!(matches!((&a, &b), (Err(Error::Closed { .. }), Err(Error::Closed { .. }))), "{a:?} {b:?}");
    assert_eq!(timeout(PATIENCE, switch.has_bridge("br0")).await.unwrap(), Ok(false));
    server.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_monitor_asks_a_silent_server_whether_it_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let monitor = read_request(&mut stream).await;
        let answer = json!({"id": monitor["id"], "error": null, "result": {"Interface": {"u": {"new": 7}}}});
        stream.write_all(answer.to_string().as_bytes()).await.unwrap();
        // The first probe is answered, the second is not.
        let probe = read_request(&mut stream).await;
        assert_eq!(probe["method"], "echo");
        let answer = json!({"id": probe["id"], "error": null, "result": []});
        stream.write_all(answer.to_string().as_bytes()).await.unwrap();
        assert_eq!(read_request(&mut stream).await["method"], "echo");
        stream
    });
    let (mut monitor, view) = Monitor::open(&address(&path)).await.unwrap();
    assert_eq!(view.interface("u"), None);
    let error = timeout(PATIENCE, monitor.next()).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Silent { .. }), "{error}");
    server.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_monitor_does_not_wait_longer_for_a_server_that_says_other_things() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let news = json!({"method": "update", "params": [null, {}], "id": null}).to_string();
        while stream.write_all(news.as_bytes()).await.is_ok() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    let error = timeout(PATIENCE, Monitor::open(&address(&path))).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Silent { .. }), "{error}");
    server.await.unwrap();
}

#[tokio::test]
async fn a_change_that_is_never_taken_is_told_in_the_servers_words() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("db.sock");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        loop {
            let request = read_request(&mut stream).await;
            let refusal = json!({"error": "constraint violation", "details": "no such name"});
            let answer = if request["params"].to_string().contains("insert") {
                json!({"id": request["id"], "error": null, "result": [refusal]})
            } else {
                empty_answer(&request["id"])
            };
            stream.write_all(answer.to_string().as_bytes()).await.unwrap();
        }
    });
    let spec = PortSpec { bridge: "br0".into(), ..PortSpec::default() };
    let error = Switch::new(Client::new(address(&path))).ensure_bridge(&spec).await.unwrap_err();
    assert!(matches!(&error, Error::Raced { cause, .. } if cause.contains("no such name")), "{error}");
}
