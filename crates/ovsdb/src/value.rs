//! The notation of RFC 7047 §5.1: sets, maps, UUIDs and rows, written and read.
//!
//! A set of one may be written as its element, so each reader takes both. What a reader cannot read is `None`: a column
//! that is absent and one of another type are alike to whoever needs it, and so is a text that is longer than any that
//! the schema is used for: what is read is kept, and shown to people.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// Longest text that is read, bytes.
const TEXT_MAX: usize = 4096;

/// A row as the server sends it: column to value.
pub type Row = serde_json::Map<String, Value>;

/// `["uuid", …]`, a row that is there.
pub fn uuid(uuid: &str) -> Value {
    json!(["uuid", uuid])
}

/// `["named-uuid", …]`, a row that the same transaction inserts under this `uuid-name`.
pub fn named(name: &str) -> Value {
    json!(["named-uuid", name])
}

/// `["set", …]`
pub fn set<V: Into<Value>>(elements: impl IntoIterator<Item = V>) -> Value {
    json!(["set", elements.into_iter().map(Into::into).collect::<Vec<Value>>()])
}

/// `["map", …]`
pub fn map<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Value {
    json!(["map", pairs.into_iter().map(|(key, value)| json!([key, value])).collect::<Vec<_>>()])
}

/// The elements of a set.
pub fn elements(value: Option<&Value>) -> &[Value] {
    match value {
        Some(Value::Array(tagged)) => match tagged.as_slice() {
            [Value::String(tag), Value::Array(elements)] if tag == "set" => elements,
            _ => value.map(std::slice::from_ref).unwrap_or_default(),
        },
        value => value.map(std::slice::from_ref).unwrap_or_default(),
    }
}

/// A string, also as the only element of a set.
pub fn text<'a>(row: &'a Row, column: &str) -> Option<&'a str> {
    short(elements(row.get(column)).first()?)
}

/// A truth value, also as the only element of a set.
pub fn flag(row: &Row, column: &str) -> Option<bool> {
    elements(row.get(column)).first()?.as_bool()
}

/// A whole number, also as the only element of a set.
pub fn integer(row: &Row, column: &str) -> Option<i64> {
    elements(row.get(column)).first()?.as_i64()
}

/// The strings of a set.
pub fn texts(row: &Row, column: &str) -> Vec<String> {
    elements(row.get(column)).iter().filter_map(short).map(Into::into).collect()
}

/// The UUIDs of a set.
pub fn uuids(row: &Row, column: &str) -> Vec<String> {
    let bare = |value: &Value| match value.as_array().map(Vec::as_slice) {
        Some([Value::String(tag), uuid]) if tag == "uuid" => short(uuid).map(Into::into),
        _ => None,
    };
    elements(row.get(column)).iter().filter_map(bare).collect()
}

/// A map of strings.
pub fn pairs(row: &Row, column: &str) -> BTreeMap<String, String> {
    let Some([Value::String(tag), Value::Array(pairs)]) =
        row.get(column).and_then(Value::as_array).map(Vec::as_slice)
    else {
        return BTreeMap::new();
    };
    let pair = |value: &Value| match value.as_array().map(Vec::as_slice) {
        Some([key, value]) => Some((short(key)?.into(), short(value)?.into())),
        _ => None,
    };
    if tag == "map" { pairs.iter().filter_map(pair).collect() } else { BTreeMap::new() }
}

fn short(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| text.len() <= TEXT_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(value: impl Into<Value>) -> Row {
        Row::from_iter([("c".to_owned(), value.into())])
    }

    #[test]
    fn a_set_of_one_may_be_its_element() {
        for one in [json!("a"), json!(["set", ["a"]])] {
            assert_eq!((text(&row(one.clone()), "c"), texts(&row(one), "c")), (Some("a"), vec!["a".into()]));
        }
        for one in [uuid("u"), set([uuid("u")])] {
            assert_eq!(uuids(&row(one), "c"), ["u"]);
        }
        assert_eq!(uuids(&row(set([uuid("u"), uuid("v")])), "c"), ["u", "v"]);
        assert_eq!(integer(&row(json!(["set", []])), "c"), None);
        assert_eq!(integer(&row(json!(-1)), "c"), Some(-1));
        assert_eq!(flag(&row(set([true])), "c"), Some(true));
    }

    #[test]
    fn maps_come_back() {
        let pairs_in = [("a", "1"), ("b", "2")];
        let read = pairs(&row(map(pairs_in)), "c");
        assert_eq!(read.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect::<Vec<_>>(), pairs_in);
    }

    #[test]
    fn what_is_of_another_type_is_not_there() {
        let long = "a".repeat(TEXT_MAX + 1);
        for odd in [
            json!(null),
            json!({}),
            json!(["set"]),
            json!(["map", 1]),
            json!([[]]),
            json!(["uuid", long]),
            map([("a", long.as_str()), (long.as_str(), "a")]),
            set([long.as_str()]),
        ] {
            let row = row(odd);
            assert_eq!((text(&row, "c"), integer(&row, "c"), flag(&row, "c")), (None, None, None));
            assert!(texts(&row, "c").iter().all(|text| text.len() < TEXT_MAX));
            assert!(uuids(&row, "c").is_empty() && pairs(&row, "c").is_empty());
        }
        assert_eq!(text(&Row::new(), "c"), None);
    }
}
