//! Why a document is not an os-vif object: where in it, and what the cause is.

use serde_json::Value as Json;

use crate::version::Version;

/// An object that cannot be read: the place in it and the cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {cause}")]
pub struct DecodeError {
    /// Class and field names from the outermost object inwards: `VIFVHostUser.network.subnets.objects[0].cidr`.
    pub place: String,
    /// What is wrong there.
    pub cause: Cause,
}

/// What is wrong. [`Cause::exception`] tells which of os-vif's exceptions it stands for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cause {
    /// The namespace or class name is none of os-vif's.
    #[error("object type {0} is unknown: it must be a class of namespace os_vif")]
    UnsupportedObject(String),
    /// The class is known, but not in this version.
    #[error(
        "version {found} of {class} is not supported, supported is {supported} or an older one of its major"
    )]
    IncompatibleVersion {
        /// The class.
        class: &'static str,
        /// The sender's version.
        found: String,
        /// Ours.
        supported: Version,
    },
    /// The version is no version at all.
    #[error("{0} is not a version: it must be text of numbers with dots, as \"1.1\"")]
    InvalidVersion(String),
    /// A key that every envelope has is missing.
    #[error("key {0} is missing")]
    MissingKey(&'static str),
    /// Null where neither null nor a default is possible.
    #[error("null is not allowed: leave the field out or give it a value")]
    Null,
    /// A value of the wrong type or form.
    #[error("{found} is not {expected}")]
    Malformed {
        /// The value, shortened.
        found: String,
        /// What the field takes.
        expected: String,
    },
    /// A nested object of a class that the field does not take.
    #[error("an object of class {found} is not of class {expected}")]
    WrongClass {
        /// The class found.
        found: &'static str,
        /// The class that the field takes.
        expected: &'static str,
    },
    /// A limit of [`crate::json`].
    #[error("more than {limit} {what}")]
    Limit {
        /// What is counted.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
}

impl Cause {
    /// The exception that os-vif raises for this. Where Python stumbles over a value of the wrong type and raises
    /// `TypeError` or `AttributeError`, this is `ValueError` too.
    pub fn exception(&self) -> &'static str {
        match self {
            Cause::UnsupportedObject(_) => "UnsupportedObjectError",
            Cause::IncompatibleVersion { .. } => "IncompatibleObjectVersion",
            Cause::InvalidVersion(_) => "InvalidVersion",
            Cause::MissingKey(_) => "KeyError",
            Cause::Null | Cause::Malformed { .. } | Cause::WrongClass { .. } | Cause::Limit { .. } => {
                "ValueError"
            }
        }
    }

    /// This cause at a place.
    pub(crate) fn at(self, step: &str) -> DecodeError {
        DecodeError::from(self).within(step)
    }

    /// `found` is not `expected`.
    pub(crate) fn malformed(found: &Json, expected: impl Into<String>) -> Self {
        Cause::Malformed { found: excerpt(found), expected: expected.into() }
    }
}

impl From<Cause> for DecodeError {
    fn from(cause: Cause) -> Self {
        DecodeError { place: String::new(), cause }
    }
}

impl DecodeError {
    /// The same error seen from one step further out: a class or field name, or an index in brackets.
    pub(crate) fn within(mut self, step: &str) -> Self {
        let dot = if self.place.is_empty() || self.place.starts_with('[') { "" } else { "." };
        self.place = format!("{step}{dot}{}", self.place);
        self
    }
}

/// How much of a hostile value a message repeats, in characters.
const EXCERPT_CHARS: usize = 64;

/// A value as messages show it: on one line and short.
pub(crate) fn excerpt(json: &Json) -> String {
    match json {
        Json::Array(_) => "a list".into(),
        Json::Object(_) => "a map".into(),
        Json::String(text) if text.chars().nth(EXCERPT_CHARS).is_some() => {
            let head: String = text.chars().take(EXCERPT_CHARS).collect();
            format!("{}…", Json::String(head))
        }
        // JSON notation escapes control characters, so a value cannot forge a line of a log.
        short => short.to_string(),
    }
}
