//! Reads a document into a plug. What it is, is told by its content.
//!
//! ```text
//! {"vif": …} or an os-vif envelope    os-vif
//! {"id": …, "spec": …}                native, as `show -o json` prints it; YAML of the same is read too
//! <interface …>                       libvirt: not supported yet
//! ```

use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::json;
use crate::names::Name;
use crate::osvif;
use crate::problem::{Kind, Problem};
use crate::spec::{PlugSpec, Socket};

/// A plug as a document describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its id.
    pub id: Name,
    /// What it is asked to be.
    pub spec: PlugSpec,
}

/// The native form. What the daemon adds when it shows a plug is let pass, so that what was shown can be plugged.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Native {
    id: Name,
    spec: PlugSpec,
    #[serde(default, rename = "status")]
    _status: Option<Value>,
}

/// A file's bytes, or standard input's for `-`; at most as many as a document may have, and one.
pub fn read_file(path: &Path) -> Result<Vec<u8>, Problem> {
    let limit = json::BYTES_MAX as u64 + 1;
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        std::io::stdin().take(limit).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    };
    read.map_err(|e| Problem::invalid(format!("cannot read {}: {e}", path.display())))?;
    Ok(bytes)
}

/// Reads a document. A VIF may be served by a `socket` that is named beside it.
pub fn parse(bytes: &[u8], socket: Option<Socket>) -> Result<Document, Problem> {
    let text = std::str::from_utf8(bytes).map_err(|_| Problem::invalid("the document is not UTF-8 text"))?;
    if bytes.len() > json::BYTES_MAX {
        return Err(Problem::new(
            Kind::TooLarge,
            format!("the document is longer than {} bytes", json::BYTES_MAX),
        ));
    }
    match text.trim_start().chars().next() {
        None => Err(Problem::invalid("the document is empty")),
        Some('<') => {
            let problem = Problem::new(Kind::Unsupported, "libvirt's <interface> is not supported yet");
            Err(problem.hint("give the socket and the network on the command line, or a native document"))
        }
        Some('{') => from_json(json::value(bytes)?, socket),
        Some(_) => from_json(from_yaml(text)?, socket),
    }
}

fn from_json(value: Value, socket: Option<Socket>) -> Result<Document, Problem> {
    if vif::Document::is_os_vif(&value) {
        let plug = vif::Document::decode(&value).and_then(|document| document.plug());
        let plug = plug.map_err(|e| Problem::invalid(e.to_string()))?;
        let (id, spec) = osvif::plug_of(&plug, socket)?;
        return Ok(Document { id, spec });
    }
    if socket.is_some() {
        let problem = Problem::invalid("a native document names its socket itself, in spec.socket");
        return Err(problem.hint("leave out the socket, or put it there"));
    }
    let Native { id, spec, .. } = json::typed(value)?;
    Ok(Document { id, spec })
}

fn from_yaml(text: &str) -> Result<Value, Problem> {
    let not_yaml = |e| Problem::invalid(format!("the document is neither JSON nor YAML: {e}"));
    let value: Value = serde_saphyr::from_str(text).map_err(not_yaml)?;
    if value.is_object() {
        return Ok(value);
    }
    let detail = "the document is no plug: it must be an os-vif object, or have the members id and spec";
    Err(Problem::invalid(detail))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> Problem {
        parse(text.as_bytes(), None).unwrap_err()
    }

    #[test]
    fn native_documents_in_json_and_yaml() {
        let json = r#"{"id":"vm1","spec":{"socket":{"role":"listen","path":"/run/vm1.sock"}},"status":{"phase":"linked"}}"#;
        let yaml = "id: vm1\nspec:\n  socket: {role: listen, path: /run/vm1.sock}\n";
        let document = parse(json.as_bytes(), None).unwrap();
        assert_eq!(document, parse(yaml.as_bytes(), None).unwrap());
        assert_eq!(document.id.as_str(), "vm1");
    }

    #[test]
    fn os_vif_documents_bare_and_with_an_instance() {
        let bare = r#"{"versioned_object.name":"VIFVHostUser","versioned_object.namespace":"os_vif",
            "versioned_object.version":"1.1","versioned_object.data":{"id":"v1","path":"/x","mode":"client"}}"#;
        let instance = r#"{"versioned_object.name":"InstanceInfo","versioned_object.namespace":"os_vif",
            "versioned_object.version":"1.0","versioned_object.data":{"uuid":""}}"#;
        let both = format!(r#"{{"vif":{bare},"instance_info":{instance}}}"#);
        assert_eq!(parse(bare.as_bytes(), None).unwrap(), parse(both.as_bytes(), None).unwrap());
    }

    #[test]
    fn what_is_not_a_plug_is_said_to_be_none() {
        assert_eq!(refused("<interface type='vhostuser'/>").kind, Kind::Unsupported);
        assert_eq!(refused(&" ".repeat(70_000)).kind, Kind::TooLarge);
        for (text, expect) in [
            ("", "empty"),
            (" \n", "empty"),
            ("just words", "is no plug"),
            ("- a\n- b\n", "is no plug"),
            ("{", "not valid JSON"),
            (r#"{"id":"a"}"#, "spec"),
            (r#"{"id":"a","spec":{},"specs":1}"#, "specs"),
            (r#"{"id":"../a","spec":{}}"#, "is not a name"),
            (r#"{"vif":{"versioned_object.name":"Nope"}}"#, "versioned_object"),
            ("a: b: c", "neither JSON nor YAML"),
        ] {
            let problem = refused(text);
            assert_eq!(problem.kind, Kind::Invalid, "{text}");
            assert!(problem.detail.contains(expect), "{text:?}: {}", problem.detail);
        }
        assert!(parse(b"\xff", None).is_err());
    }
}
