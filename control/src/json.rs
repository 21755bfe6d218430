//! Hostile JSON into types: at most 64 KiB, no key twice, no unknown member, and the place of an error named.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::problem::{Kind, Problem};

/// Bytes of a request's body or of a document.
pub const BYTES_MAX: usize = vif::json::MAX_DOCUMENT_BYTES;

/// Reads a request's body.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    typed(value(bytes)?)
}

/// Reads JSON of any shape.
pub fn value(bytes: &[u8]) -> Result<Value, Problem> {
    vif::json::parse(bytes).map_err(|error| {
        let kind = match error {
            vif::json::JsonError::TooLarge(_) => Kind::TooLarge,
            vif::json::JsonError::Syntax(_) => Kind::Invalid,
        };
        Problem::new(kind, error.to_string())
    })
}

/// Turns JSON into a type; the problem names the member at fault.
pub fn typed<T: DeserializeOwned>(value: Value) -> Result<T, Problem> {
    serde_path_to_error::deserialize(value).map_err(|error| match error.path().to_string().as_str() {
        "." => Problem::invalid(error.inner().to_string()),
        path => Problem::invalid(format!("{path}: {}", error.inner())).field(path),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::PlugSpec;

    #[test]
    fn the_member_at_fault_is_named() {
        let bad = |body: &str| read::<PlugSpec>(body.as_bytes()).unwrap_err();
        let path = bad(r#"{"socket":{"role":"listen","path":"relative"}}"#);
        assert_eq!(path.field.as_deref(), Some("socket.path"));
        assert!(path.detail.contains("must be absolute"), "{}", path.detail);
        let unknown = bad(r#"{"mtuu":1}"#);
        assert!(unknown.detail.contains("unknown field `mtuu`"), "{}", unknown.detail);
    }

    #[test]
    fn malformed_bodies_are_refused() {
        let too_large = " ".repeat(BYTES_MAX) + "{}";
        let cases = [
            ("", Kind::Invalid),
            ("{} {}", Kind::Invalid),
            (r#"{"mtu":1500,"mtu":1500}"#, Kind::Invalid),
            (r#"{"mtu":NaN}"#, Kind::Invalid),
            (r#"{"mtu":-1}"#, Kind::Invalid),
            (r#"{"mtu":1e400}"#, Kind::Invalid),
            (r#"{"mtu":"1500"}"#, Kind::Invalid),
            (&"[".repeat(10_000), Kind::Invalid),
            (&too_large, Kind::TooLarge),
        ];
        for (body, kind) in cases {
            assert_eq!(read::<PlugSpec>(body.as_bytes()).unwrap_err().kind, kind, "{body:.40}");
        }
        assert_eq!(read::<PlugSpec>(b"\"\xff\xfe\"").unwrap_err().kind, Kind::Invalid);
    }
}
