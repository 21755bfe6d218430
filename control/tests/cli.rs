//! The command line as people and scripts meet it: what it prints, and what it exits with.

mod support;

use serde_json::json;
use support::Place;

#[test]
fn plugs_are_listed_in_every_format() {
    let place = Place::default();
    let _daemon = place.serve();
    insta::assert_snapshot!("ls_empty", place.vhostd(&["ls"]).ok().out);
    let socket = |name: &str| place.path(name).to_str().unwrap().to_owned();
    place.vhostd(&["plug", "vm1", "--listen", &socket("vm1.sock")]).ok();
    let vm2 =
        ["plug", "vm2", "--connect", &socket("vm2.sock"), "--network", "blue", "--mac", "52:54:00:00:00:02"];
    place.vhostd(&[&vm2[..], &["--mtu", "9000", "--queues", "4"]].concat()).ok();
    // The dialled socket's error comes with the first attempt.
    place.until("vm2 was dialled", || place.vhostd(&["show", "vm2"]).out.contains("No such file"));
    for format in ["table", "wide", "json", "yaml", "name"] {
        insta::assert_snapshot!(format!("ls_{format}"), place.vhostd(&["ls", "-o", format]).ok().out);
    }
    for format in ["table", "json", "yaml", "name"] {
        insta::assert_snapshot!(
            format!("show_{format}"),
            place.vhostd(&["show", "vm2", "-o", format]).ok().out
        );
    }
    for format in ["table", "wide", "json", "name"] {
        insta::assert_snapshot!(format!("stats_{format}"), place.vhostd(&["stats", "-o", format]).ok().out);
    }
    assert_eq!(place.vhostd(&["stats", "vm2", "-o", "name"]).ok().out, "vm2\n");
    let networks = place.http("GET", "/v1/networks", "").json();
    assert_eq!(networks[0], json!({"name": "blue", "ports": ["vm2"], "uplink": null}));
}

#[test]
fn what_is_looked_at_has_the_promised_members() {
    let place = Place::default();
    let _daemon = place.serve();
    let workers = place.vhostd(&["workers", "-o", "json"]).ok().json();
    let worker = workers[0].as_object().unwrap();
    for member in ["cpu", "turns", "busy_ratio", "frames", "frames_per_burst", "cycles_per_frame", "vrings"] {
        assert!(worker.contains_key(member), "{member}");
    }
    for table in ["workers", "drops", "fdb"] {
        let out = place.vhostd(&[table]).ok().out;
        insta::assert_snapshot!(format!("titles_{table}"), out.lines().next().unwrap());
    }
    // Nobody is busy, so nothing is to be moved.
    assert_eq!(place.vhostd(&["workers", "rebalance", "--dry-run", "-o", "json"]).ok().json(), json!([]));
    assert_eq!(place.http("POST", "/v1/workers/rebalance?dry=1", "").json()["status"], 400);
    let info = place.vhostd(&["api", "GET", "/v1/info"]).ok().json();
    assert_eq!((&info["api"], &info["poll"]), (&json!(["v1"]), &json!("adaptive")));
}

#[test]
fn every_exit_code_has_its_cause() {
    let place = Place::default();
    // 6: nobody answers.
    for command in
        [&["ls"][..], &["show", "x"], &["stats"], &["unplug", "x"], &["events"], &["api", "GET", "/"]]
    {
        assert_eq!(place.vhostd(command).code, 6, "{command:?}");
    }
    let _daemon = place.serve();
    let socket = place.path("vm1.sock");
    let socket = socket.to_str().unwrap();
    let foreign = place.path("foreign");
    std::fs::write(&foreign, "precious").unwrap();
    let foreign = foreign.to_str().unwrap();
    let long = format!("/{}", "x".repeat(107));
    let nowhere = place.path("no/such/dir/vm.sock");
    let nowhere = nowhere.to_str().unwrap();
    let cases: &[(i32, &[&str])] = &[
        (0, &["plug", "vm1", "--listen", socket]),
        (0, &["plug", "vm1", "--listen", socket]),
        (0, &["plug", "vm9", "--listen", foreign, "--dry-run"]),
        (2, &["plug"]),
        (2, &["plug", "vm2"]),
        (2, &["plug", "vm2", "--listen", "relative.sock"]),
        (2, &["plug", "vm2", "--listen", "/tmp/../etc/x"]),
        (2, &["plug", "vm2", "--listen", &long]),
        (2, &["plug", "../vm2", "--listen", socket]),
        (2, &["plug", "vm2", "--listen", socket, "--connect", socket]),
        (2, &["plug", "vm2", "--listen", "/x", "--mtu", "67"]),
        (2, &["plug", "vm2", "--listen", "/x", "--mac", "ff:ff:ff:ff:ff:ff"]),
        (2, &["plug", "vm2", "--listen", "/x", "--to", "tap:t", "--network", "n"]),
        (2, &["plug", "vm2", "--listen", "/x", "--wait", "pending"]),
        (2, &["plug", "vm2", "--listen", "/x", "--wait", "linked", "--timeout", "1y"]),
        (2, &["plug", "-f", "/nowhere.json"]),
        (2, &["events", "--since", "x y"]),
        (2, &["api", "GET", "v1"]),
        (2, &["api", "POST", "/v1/plugs"]),
        (3, &["show", "nope"]),
        (3, &["stats", "nope"]),
        (3, &["unplug", "nope", "--must-exist"]),
        (3, &["api", "GET", "/v2"]),
        (4, &["plug", "vm1", "--listen", "/elsewhere/x.sock"]),
        (4, &["plug", "vm2", "--connect", socket]),
        (4, &["plug", "vm2", "--listen", foreign]),
        (5, &["plug", "vm1", "--listen", socket, "--wait", "linked", "--timeout", "50ms"]),
        (2, &["plug", "vm2", "--to", "ovs:br/int"]),
        (2, &["plug", "vm2", "--to", "bridge:br0", "--iface-id", "lsp1"]),
        (7, &["plug", "vm2", "--listen", nowhere]),
        (0, &["unplug", "vm1", "--must-exist"]),
        (0, &["unplug", "vm1"]),
    ];
    let mut said = String::new();
    for (code, command) in cases {
        let answer = place.vhostd(command);
        assert_eq!(answer.code, *code, "{command:?}: {answer:?}");
        if *code != 2 || !answer.err.starts_with("error:") {
            let words = command.join(" ").replace(place.path("").to_str().unwrap(), "DIR/");
            said += &format!("$ vhostd {words}\n{}{}[{code}]\n\n", answer.out, answer.err);
        }
    }
    insta::assert_snapshot!("said", said);
    assert_eq!(std::fs::read_to_string(foreign).unwrap(), "precious");
    assert_eq!(place.vhostd(&["ls", "-o", "name"]).ok().out, "");
}

#[test]
fn documents_are_plugged_and_unplugged() {
    let place = Place::default();
    let _daemon = place.serve();
    let socket = place.path("vm1.sock");
    let native = json!({"id": "vm1", "spec": {"socket": {"role": "listen", "path": socket}}}).to_string();
    place.vhostd_with_input(&["plug", "-f", "-"], &native).ok();
    let shown = place.vhostd(&["show", "vm1", "-o", "json"]).ok().out;
    // What is shown can be plugged: nothing changes.
    let shown = shown.replace("DIR", place.path("").to_str().unwrap().trim_end_matches('/'));
    place.vhostd_with_input(&["plug", "-f", "-"], &shown).ok();
    place.vhostd_with_input(&["unplug", "-f", "-"], &shown).ok();
    assert_eq!(place.vhostd(&["ls", "-o", "name"]).ok().out, "");

    let libvirt = place.vhostd_with_input(&["plug", "-f", "-"], "<interface type='vhostuser'/>");
    assert_eq!(libvirt.code, 7);
    for bad in ["", "{", "[]", r#"{"id":"a","spec":{"soket":1}}"#, r#"{"id":"a","id":"b","spec":{}}"#] {
        let answer = place.vhostd_with_input(&["plug", "-f", "-"], bad);
        assert_eq!(answer.code, 2, "{bad}: {answer:?}");
    }
}

#[test]
fn events_are_printed_as_they_happen() {
    use std::io::BufRead;

    let place = Place::default();
    let _daemon = place.serve();
    let socket = place.path("vm1.sock").to_str().unwrap().to_owned();
    place.vhostd(&["plug", "vm1", "--listen", &socket]).ok();
    let (since, all) =
        (place.http("GET", "/v1/info", "").json()["epoch"].to_string() + "-0", ["events", "--since"]);
    let lines = |format: &str, count: usize| {
        let mut child = place.spawn_vhostd(&[&all[..], &[&since, "-o", format]].concat());
        let output = std::io::BufReader::new(child.stdout.take().unwrap());
        let lines: Vec<String> = output.lines().take(count).map(Result::unwrap).collect();
        child.kill().unwrap();
        child.wait().unwrap();
        lines
    };
    place.vhostd(&["unplug", "vm1"]).ok();
    let table = lines("table", 2);
    let words = |line: &str| line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!([words(&table[0]), words(&table[1])], [["plugged", "vm1"], ["unplugged", "vm1"]]);
    let event: serde_json::Value = serde_json::from_str(&lines("json", 1)[0]).unwrap();
    assert_eq!((&event["kind"], &event["plug"]), (&json!("plugged"), &json!("vm1")));
    assert_eq!(lines("name", 1), [since.replace("-0", "-1")]);
}

#[test]
fn os_vif_objects_are_printed_as_understood() {
    let place = Place::default();
    let vif = json!({
        "versioned_object.name": "VIFVHostUser", "versioned_object.namespace": "os_vif",
        "versioned_object.version": "1.1",
        "versioned_object.data": {"id": "v1", "path": "/run/x.sock", "mode": "client", "address": "52-54-00-00-00-01"},
    });
    let printed = place.vhostd_with_input(&["vif", "-f", "-"], &vif.to_string()).ok().json();
    assert_eq!(printed["versioned_object.data"]["address"], "52:54:00:00:00:01");
    let newer = vif.to_string().replace("1.1", "1.2");
    let refused = place.vhostd_with_input(&["vif", "-f", "-"], &newer);
    assert_eq!(refused.code, 2);
    insta::assert_snapshot!("vif_refused", refused.err);
}

#[test]
fn help_says_what_there_is() {
    let place = Place::default();
    for command in ["", "serve", "plug", "unplug", "vif", "stats", "events", "api"] {
        let args: Vec<_> = [command, "--help"].into_iter().filter(|a| !a.is_empty()).collect();
        insta::assert_snapshot!(format!("help_{command}"), place.vhostd(&args).ok().out);
    }
    assert!(place.vhostd(&["completion", "bash"]).ok().out.contains("_vhostd"));
    assert!(place.vhostd(&["man"]).ok().out.contains(".TH vhostd"));
}
