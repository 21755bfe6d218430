//! Text to JSON, with limits. JSON readers differ in which of two equal keys they keep, so a document with two is
//! refused: what one program checked would not be what another one does.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value as Json};

use crate::error::{Cause, DecodeError, excerpt};

/// Largest document, bytes.
pub const MAX_DOCUMENT_BYTES: usize = 64 * 1024;
/// Deepest nesting of lists and maps. The deepest of os-vif's own, a floating IP in a VIF, has 15.
pub const MAX_DEPTH: usize = 16;
/// Most items of one list or map.
pub const MAX_ITEMS: usize = 1024;
/// Longest string or key, bytes.
pub const MAX_STRING_BYTES: usize = 4096;

/// A document that is not JSON as we take it.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// Larger than [`MAX_DOCUMENT_BYTES`].
    #[error("the document has {0} bytes, it may have {MAX_DOCUMENT_BYTES}")]
    TooLarge(usize),
    /// Not JSON, or the same key twice in one map; with line and column.
    #[error("the document is not valid JSON: {0}")]
    Syntax(#[from] serde_json::Error),
}

/// Reads one JSON document.
///
/// # Errors
/// The document is too large, not JSON, nested deeper than 128, or has a key twice in one map.
pub fn parse(document: &[u8]) -> Result<Json, JsonError> {
    if document.len() > MAX_DOCUMENT_BYTES {
        return Err(JsonError::TooLarge(document.len()));
    }
    let Unique(json) = serde_json::from_slice(document)?;
    Ok(json)
}

/// Checks a tree against [`MAX_DEPTH`], [`MAX_ITEMS`] and [`MAX_STRING_BYTES`].
pub(crate) fn check_limits(json: &Json) -> Result<(), DecodeError> {
    check_depth(json, MAX_DEPTH)
}

fn check_depth(json: &Json, depth_left: usize) -> Result<(), DecodeError> {
    let inner = || depth_left.checked_sub(1).ok_or_else(|| limit("levels of lists and maps", MAX_DEPTH));
    match json {
        Json::String(text) => check_string(text)?,
        Json::Array(items) => {
            let (inner, ()) = (inner()?, check_items(items.len())?);
            for (index, item) in items.iter().enumerate() {
                check_depth(item, inner).map_err(|e| e.within(&format!("[{index}]")))?;
            }
        }
        Json::Object(map) => {
            let (inner, ()) = (inner()?, check_items(map.len())?);
            for (key, item) in map {
                check_string(key)?;
                check_depth(item, inner).map_err(|e| e.within(&excerpt(&Json::from(key.as_str()))))?;
            }
        }
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
    Ok(())
}

fn check_string(text: &str) -> Result<(), Cause> {
    if text.len() <= MAX_STRING_BYTES { Ok(()) } else { Err(limit("bytes of text", MAX_STRING_BYTES)) }
}

fn check_items(count: usize) -> Result<(), Cause> {
    if count <= MAX_ITEMS { Ok(()) } else { Err(limit("items", MAX_ITEMS)) }
}

fn limit(what: &'static str, limit: usize) -> Cause {
    Cause::Limit { what, limit }
}

/// A JSON value in which no map has a key twice. (`serde_json` itself keeps the last.)
struct Unique(Json);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> Visitor<'de> for UniqueVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Json, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(Unique(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Json, A::Error> {
        let mut map = Map::new();
        while let Some((key, Unique(item))) = access.next_entry::<String, Unique>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format_args!("key {} is there twice", excerpt(&key.into()))));
            }
            map.insert(key, item);
        }
        Ok(Json::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_what_serde_json_reads() {
        let text = r#"{"a": [null, true, -3, 18446744073709551615, 1.5, "xé\n"], "b": {}}"#;
        assert_eq!(parse(text.as_bytes()).unwrap(), serde_json::from_str::<Json>(text).unwrap());
    }

    #[test]
    fn refuses_a_key_that_is_there_twice_at_any_depth() {
        for text in [r#"{"a":1,"a":1}"#, r#"[{"b":{"a":1,"c":2,"\u0061":1}}]"#] {
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(r#"key "a" is there twice at line 1"#), "{error}");
        }
    }

    #[test]
    fn refuses_what_is_not_json() {
        for text in ["", "{", "NaN", "[Infinity]", "1e999", "{} {}", "'a'", "\u{feff}{}"] {
            assert!(matches!(parse(text.as_bytes()), Err(JsonError::Syntax(_))), "{text}");
        }
        assert!(matches!(parse(b"\"\xff\""), Err(JsonError::Syntax(_))));
        assert!(matches!(parse("[".repeat(10_000).as_bytes()), Err(JsonError::Syntax(_))));
    }

    #[test]
    fn refuses_a_document_over_the_size_limit_only() {
        let document = |bytes: usize| [vec![b' '; bytes - 1], vec![b'1']].concat();
        assert!(parse(&document(MAX_DOCUMENT_BYTES)).is_ok());
        assert!(matches!(parse(&document(MAX_DOCUMENT_BYTES + 1)), Err(JsonError::TooLarge(_))));
    }

    #[test]
    fn limits_hold_exactly() {
        let nested = |depth: usize| (0..depth).fold(json!(1), |inner, _| json!([inner]));
        let cases: [(&dyn Fn(usize) -> Json, usize); 5] = [
            (&nested, MAX_DEPTH),
            (&|n| json!(vec![0; n]), MAX_ITEMS),
            (&|n| (0..n).map(|i| (i.to_string(), Json::Null)).collect::<Map<_, _>>().into(), MAX_ITEMS),
            (&|n| json!({"a": "x".repeat(n)}), MAX_STRING_BYTES),
            (&|n| json!({"x".repeat(n): 1}), MAX_STRING_BYTES),
        ];
        for (build, limit) in cases {
            assert_eq!(check_limits(&build(limit)), Ok(()));
            let error = check_limits(&build(limit + 1)).unwrap_err();
            assert!(matches!(error.cause, Cause::Limit { limit: l, .. } if l == limit), "{error}");
        }
    }
}
