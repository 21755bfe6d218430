//! os-vif's objects as data: VIFs, port profiles, networks, instances, in their versioned envelope. No I/O.
//!
//! # Theory of operation
//!
//! os-vif describes a VIF as a tree of versioned objects. Each object, also a nested one, travels as an *envelope*:
//! a JSON object with its class name, namespace, version, the fields that are set, and the names of the fields that
//! changed. Reading one goes through the modules in this order:
//!
//! - [`json`]: text to JSON. A document has a size limit and no key twice; a tree has limits of depth and width.
//! - [`schema`]: the tables. What classes there are, in which version, with which fields of which type.
//! - [`version`]: whether a sender's version can be read with ours.
//! - [`value`]: one field's value, coerced as os-vif coerces it.
//! - [`object`]: the envelope. [`decode`] and [`encode`] turn JSON into an [`Object`] of any class and back.
//! - [`field`]: the three states of a field, and how a typed view reads its fields from an [`Object`].
//! - [`network`], [`profile`], [`vif`]: the typed views, for code that acts on a VIF and does not care for envelopes.
//! - [`document`]: what a file or request may hold: one envelope, or `{"vif": …, "instance_info": …}`.
//!
//! A field is *unset*, *null* or a *value*, and the three stay distinct: os-vif does not apply a field's default on
//! decoding, and a plug-in asks whether a field is set. No field is required here; who acts on a VIF says what it
//! misses. The exception is `Network`, whose constructor fills five fields.
//!
//! An object keeps its sender's version label and is written back under it, with every field it came with. Keys that
//! a class does not know are ignored.
//!
//! # Where this is stricter than os-vif
//!
//! What os-vif accepts is accepted and what it refuses is refused, with an error of the same kind
//! ([`Cause::exception`]), except that the following is refused here and not there:
//!
//! - anything beyond the limits in [`json`], and a document with the same key twice;
//! - a boolean given as text, list or map (`"false"` would read as true); numbers are taken by truth value;
//! - a fraction as text or UUID, and a list or map as UUID (os-vif would keep Python's notation of it);
//! - an integer that does not fit 64 bits, or in text with digits other than ASCII's, and a number of more bits as an
//!   IP address;
//! - text with a lone surrogate (`"\ud800"`), which is not Unicode;
//! - a list field given as text or map (os-vif would take its characters or keys);
//! - a PCI address without the dot before the function, and any address with a line feed behind it;
//! - an abbreviated network (`10.1`), which netaddr before 1.0 reads, and later ones refuse;
//! - a version that is not plain numbers with dots (`1.0a1`, `v1.0`, blanks around it);
//! - `versioned_object.data` that is no map; `versioned_object.changes` that is no list.
//!
//! A nested object of a class that its field does not take is refused before it is read, so what else is wrong inside
//! it is not reported; os-vif reads it first.
//!
//! UUIDs are not checked, as in os-vif: agents that know no instance send an empty one.

#![forbid(unsafe_code)]

pub mod document;
pub mod error;
pub mod field;
pub mod json;
pub mod network;
pub mod object;
pub mod profile;
pub mod schema;
pub mod value;
pub mod version;
pub mod vif;

pub use document::{Document, DocumentError, Plug};
pub use error::{Cause, DecodeError};
pub use field::Field;
pub use network::{FixedIp, InstanceInfo, Network, Route, Subnet};
pub use object::{Object, decode, encode};
pub use profile::{DatapathOffload, PortProfile, ProfileKind};
pub use value::{IpNetwork, MacAddress, PciAddress, Value};
pub use vif::{Vif, VifKind};
