//! What a file or a request may hold: the envelope of one object, or a VIF with the guest it belongs to.

use serde_json::{Value as Json, json};

use crate::error::{DecodeError, excerpt};
use crate::json::{self, JsonError};
use crate::network::InstanceInfo;
use crate::object::{self, Object};
use crate::vif::{NotA, Vif};

/// A document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// A bare envelope, of any class.
    Object(Object),
    /// `{"vif": …, "instance_info": …}`, the second optional.
    Plug {
        /// The VIF.
        vif: Object,
        /// The guest.
        instance_info: Option<Object>,
    },
}

/// What os-vif's `plug` and `unplug` are called with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plug {
    /// The VIF.
    pub vif: Vif,
    /// The guest it belongs to.
    pub instance_info: Option<InstanceInfo>,
}

/// A document that is none of ours, or with something wrong in it.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not JSON as we take it.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// Neither an envelope nor with a key `vif`.
    #[error("not an os-vif document: it must be an os-vif object or {{\"vif\": …, \"instance_info\": …}}")]
    NotOsVif,
    /// A key beside `vif` and `instance_info`.
    #[error("key {0} is unknown: beside vif there may be instance_info only")]
    UnknownKey(String),
    /// The object of a bare envelope cannot be read.
    #[error(transparent)]
    Object(#[from] DecodeError),
    /// The object under `vif` or `instance_info` cannot be read.
    #[error("{0}: {1}")]
    Member(&'static str, #[source] DecodeError),
    /// Not a VIF, or not an `InstanceInfo`, where there must be one.
    #[error(transparent)]
    NotA(#[from] NotA),
}

impl Document {
    /// Reads a document's text.
    ///
    /// # Errors
    /// It is not JSON, not one of the two forms, or os-vif would refuse an object in it.
    pub fn parse(document: &[u8]) -> Result<Self, DocumentError> {
        Self::decode(&json::parse(document)?)
    }

    /// Reads a document.
    ///
    /// # Errors
    /// It is not one of the two forms, or os-vif would refuse an object in it.
    pub fn decode(document: &Json) -> Result<Self, DocumentError> {
        if !Self::is_os_vif(document) {
            return Err(DocumentError::NotOsVif);
        }
        let Some(vif) = document.get(VIF) else { return Ok(Document::Object(object::decode(document)?)) };
        if let Some(key) =
            document.as_object().and_then(|map| map.keys().find(|key| !KEYS.contains(&key.as_str())))
        {
            return Err(DocumentError::UnknownKey(excerpt(&key.as_str().into())));
        }
        let member = |name, json| object::decode(json).map_err(|e| DocumentError::Member(name, e));
        let instance_info = document.get(INSTANCE_INFO).filter(|json| !json.is_null());
        Ok(Document::Plug {
            vif: member(VIF, vif)?,
            instance_info: instance_info.map(|json| member(INSTANCE_INFO, json)).transpose()?,
        })
    }

    /// Whether a document is meant for this reader, be it right or wrong. Tells it from other documents in JSON.
    pub fn is_os_vif(document: &Json) -> bool {
        document.as_object().is_some_and(|map| map.contains_key(VIF) || object::is_envelope(map))
    }

    /// The document as os-vif would write its objects.
    pub fn encode(&self) -> Json {
        match self {
            Document::Object(object) => object::encode(object),
            Document::Plug { vif, instance_info: None } => json!({ VIF: object::encode(vif) }),
            Document::Plug { vif, instance_info: Some(instance) } => {
                json!({ VIF: object::encode(vif), INSTANCE_INFO: object::encode(instance) })
            }
        }
    }

    /// The VIF to plug or unplug, and the guest it belongs to. A bare VIF belongs to none.
    ///
    /// # Errors
    /// An object is of another class.
    pub fn plug(&self) -> Result<Plug, DocumentError> {
        let (vif, instance_info) = match self {
            Document::Object(vif) => (vif, None),
            Document::Plug { vif, instance_info } => (vif, instance_info.as_ref()),
        };
        Ok(Plug {
            vif: Vif::try_from(vif)?,
            instance_info: instance_info.map(InstanceInfo::try_from).transpose()?,
        })
    }
}

const VIF: &str = "vif";
const INSTANCE_INFO: &str = "instance_info";
const KEYS: [&str; 2] = [VIF, INSTANCE_INFO];
