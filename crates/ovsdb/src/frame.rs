//! Messages out of a stream of bytes.
//!
//! RFC 7047 §4 puts one JSON object after another onto the stream, with nothing between them that would tell where one ends.
//! [`Frames`] looks at each byte once: it follows strings, escapes and brackets, and parses an object when its last bracket
//! is there. So half a message costs its bytes and no time, and what a message grows to when it is parsed is known before.

use serde_json::Value;

/// Longest message, bytes: the tables of a host with tens of thousands of ports.
pub const MESSAGE_MAX: usize = 32 << 20;
/// Most values in a message, told by the commas between them: two bytes on the stream may be fifty in memory.
pub const VALUES_MAX: usize = 2 << 20;
/// Deepest nesting; the notation of RFC 7047 needs ten.
pub const DEPTH_MAX: u32 = 64;

/// Why the stream holds no messages.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A byte outside of any object.
    #[error("byte {0:#04x} where a message should start")]
    Start(u8),
    /// Brackets in brackets.
    #[error("a message nested deeper than {DEPTH_MAX}")]
    Depth,
    /// Commas upon commas.
    #[error("a message of more than {VALUES_MAX} values")]
    Values,
    /// No end in sight.
    #[error("a message longer than {MESSAGE_MAX} bytes")]
    Length,
    /// The brackets match, the rest does not.
    #[error("a message that is not JSON: {0}")]
    Json(String),
}

/// The part of the stream that has not been given out.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    /// Bytes of it that were looked at.
    seen: usize,
    commas: usize,
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl Frames {
    /// Adds what was read.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one.
    pub fn message(&mut self) -> Result<Option<Value>, FrameError> {
        if self.depth == 0 {
            let gap = self.bytes.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            self.bytes.drain(..gap);
        }
        while let Some(&byte) = self.bytes.get(self.seen) {
            self.seen += 1;
            if self.ends_with(byte)? {
                let message = serde_json::from_slice(&self.bytes[..self.seen]);
                self.bytes.drain(..std::mem::take(&mut self.seen));
                self.commas = 0;
                return message.map(Some).map_err(|cause| FrameError::Json(cause.to_string()));
            }
        }
        if self.bytes.len() > MESSAGE_MAX { Err(FrameError::Length) } else { Ok(None) }
    }

    /// Whether this byte is the last one of a message.
    fn ends_with(&mut self, byte: u8) -> Result<bool, FrameError> {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return Ok(false);
        }
        match byte {
            b'{' | b'[' if self.depth > 0 || byte == b'{' => {
                self.depth += 1;
                if self.depth > DEPTH_MAX {
                    return Err(FrameError::Depth);
                }
            }
            _ if self.depth == 0 => return Err(FrameError::Start(byte)),
            b'"' => self.in_string = true,
            b',' => {
                self.commas += 1;
                if self.commas >= VALUES_MAX {
                    return Err(FrameError::Values);
                }
            }
            b'}' | b']' => {
                self.depth -= 1;
                return Ok(self.depth == 0);
            }
            _ => {}
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn all(stream: &[u8], piece: usize) -> Result<Vec<Value>, FrameError> {
        let (mut frames, mut messages) = (Frames::default(), Vec::new());
        for bytes in stream.chunks(piece) {
            frames.push(bytes);
            while let Some(message) = frames.message()? {
                messages.push(message);
            }
        }
        Ok(messages)
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![any::<i64>().prop_map(Value::from), ".*".prop_map(Value::from)];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(".*", inner, 0..4)
                    .prop_map(|map| map.into_iter().collect::<serde_json::Map<_, _>>().into()),
            ]
        })
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in_however_they_are_cut(
            values in prop::collection::vec(json_value(), 0..5), piece in 1..40usize, gap in "[ \n]{0,2}",
        ) {
            let messages: Vec<_> = values.into_iter().map(|value| json!({"params": value})).collect();
            let stream: String = messages.iter().map(|m| format!("{gap}{m}")).collect();
            prop_assert_eq!(all(stream.as_bytes(), piece).unwrap(), messages);
        }

        #[test]
        fn any_bytes_give_messages_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = all(&bytes, 7);
        }
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let deep = b"{".repeat(65);
        let long = [b"{\"".to_vec(), b"a".repeat(MESSAGE_MAX)].concat();
        let many = [b"{\"a\":[".to_vec(), b"0,".repeat(VALUES_MAX)].concat();
        for (stream, error) in [
            (&b"HTTP/1.1 400"[..], FrameError::Start(b'H')),
            (b"[1]", FrameError::Start(b'[')),
            (&deep, FrameError::Depth),
            (&long, FrameError::Length),
            (&many, FrameError::Values),
        ] {
            assert_eq!(all(stream, 1 << 16).unwrap_err(), error);
        }
        assert!(matches!(all(b"{]}", 3), Err(FrameError::Json(_))));
    }

    #[test]
    fn half_a_message_is_none() {
        assert_eq!(all(br#"{"id":1,"a":"}"#, 3), Ok(vec![]));
    }
}
