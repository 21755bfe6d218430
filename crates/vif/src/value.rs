//! A field's value, and how JSON is coerced to it: as os-vif and the libraries below it do.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Number, Value as Json};

use crate::error::{Cause, DecodeError};
use crate::object::{self, Object};
use crate::schema::{FieldSpec, Kind};

/// A value that is not null.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Text, a UUID, or a word of an enumeration.
    Text(String),
    /// A whole number.
    Integer(i64),
    /// True or false.
    Boolean(bool),
    /// A MAC address.
    Mac(MacAddress),
    /// A PCI address.
    Pci(PciAddress),
    /// An IPv4 or IPv6 address.
    Ip(IpAddr),
    /// An IPv4 or IPv6 address with a prefix length.
    IpNetwork(IpNetwork),
    /// A list.
    List(Vec<Value>),
    /// An object.
    Object(Object),
}

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

/// The address of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PciAddress {
    /// PCI domain.
    pub domain: u16,
    /// Bus in the domain.
    pub bus: u8,
    /// Device on the bus, 0..=31.
    pub device: u8,
    /// Function of the device, 0..=7.
    pub function: u8,
}

/// An address in a network: host bits are kept, as os-vif does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpNetwork {
    /// The address as given.
    pub address: IpAddr,
    /// Length of the network's prefix, 0..=32 or 0..=128 bits.
    pub prefix: u8,
}

impl FieldSpec {
    /// The value that `json` gives this field; `None` is null.
    pub(crate) fn coerce(&self, json: &Json) -> Result<Option<Value>, DecodeError> {
        match (json, self.nullable, self.default) {
            (Json::Null, true, _) => Ok(None),
            (Json::Null, false, Some(default)) => Ok(Some(Value::Boolean(default))),
            _ => self.kind.coerce(json).map(Some),
        }
    }
}

impl Kind {
    fn coerce(&self, json: &Json) -> Result<Value, DecodeError> {
        let value = match *self {
            _ if json.is_null() => return Err(Cause::Null.into()),
            Kind::List(element) => {
                let Json::Array(items) = json else { return Err(Cause::malformed(json, "a list").into()) };
                let coerced = items
                    .iter()
                    .enumerate()
                    .map(|(index, item)| element.coerce(item).map_err(|e| e.within(&format!("[{index}]"))));
                return coerced.collect::<Result<_, _>>().map(Value::List);
            }
            Kind::Object(class) => return object::decode_as(json, class, false).map(Value::Object),
            Kind::Subclass(class) => return object::decode_as(json, class, true).map(Value::Object),
            Kind::Text | Kind::Uuid => text(json).map(Value::Text),
            Kind::Enum(words) => word(json, words).map(Value::Text),
            Kind::Integer => integer(json).map(Value::Integer),
            Kind::Boolean => boolean(json).map(Value::Boolean),
            Kind::Mac => json.as_str().and_then(mac).map(Value::Mac),
            Kind::Pci => json.as_str().and_then(pci).map(Value::Pci),
            Kind::Ip => ip(json).map(Value::Ip),
            Kind::IpNetwork => json.as_str().and_then(ip_network).map(Value::IpNetwork),
        };
        value.ok_or_else(|| Cause::malformed(json, self.to_string()).into())
    }
}

impl fmt::Display for Kind {
    /// What a value of this type is, as messages say it.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Kind::Text | Kind::Uuid => f.write_str("text"),
            Kind::Enum(words) => write!(f, "one of {}", words.join(", ")),
            Kind::Integer => f.write_str("an integer of 64 bits"),
            Kind::Boolean => f.write_str("true or false"),
            Kind::Mac => f.write_str("a MAC address (xx:xx:xx:xx:xx:xx)"),
            Kind::Pci => f.write_str("a PCI address (dddd:bb:dd.f)"),
            Kind::Ip => f.write_str("an IP address"),
            Kind::IpNetwork => f.write_str("an IP network (address/prefix)"),
            Kind::List(element) => write!(f, "a list, each item {element}"),
            Kind::Object(class) | Kind::Subclass(class) => write!(f, "an object of class {}", class.name),
        }
    }
}

/// Text. Whole numbers and booleans become what Python prints for them.
fn text(json: &Json) -> Option<String> {
    match json {
        Json::String(text) => Some(text.clone()),
        Json::Bool(true) => Some("True".into()),
        Json::Bool(false) => Some("False".into()),
        Json::Number(number) if !number.is_f64() => Some(number.to_string()),
        _ => None,
    }
}

fn word(json: &Json, words: &[&str]) -> Option<String> {
    json.as_str().filter(|text| words.contains(text)).map(String::from)
}

/// Numbers are cut to whole ones, as Python's `int` does.
fn integer(json: &Json) -> Option<i64> {
    match json {
        Json::Bool(flag) => Some((*flag).into()),
        Json::Number(number) => number.as_i64().or_else(|| number.as_f64().and_then(whole)),
        Json::String(text) => integer_text(text),
        _ => None,
    }
}

fn whole(number: f64) -> Option<i64> {
    const LIMIT: f64 = 9_223_372_036_854_775_808.0; // 2⁶³
    #[expect(clippy::cast_possible_truncation, reason = "in range, and a fraction is to be cut off")]
    (number.abs() < LIMIT).then_some(number as i64)
}

/// A number in Python's notation: blanks around it, a sign, zeros in front and single underscores between digits.
fn integer_text(text: &str) -> Option<i64> {
    let text = text.trim();
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let is_number = digits.split('_').all(|run| !run.is_empty() && run.bytes().all(|b| b.is_ascii_digit()));
    if is_number { text.replace('_', "").parse().ok() } else { None }
}

fn boolean(json: &Json) -> Option<bool> {
    match json {
        Json::Bool(flag) => Some(*flag),
        Json::Number(number) => Some(number.as_f64() != Some(0.0)),
        _ => None,
    }
}

fn mac(text: &str) -> Option<MacAddress> {
    let mut octets = [0; 6];
    let mut parts = text.split([':', '-']);
    for octet in &mut octets {
        *octet = u8::try_from(hex(parts.next()?, 2)?).ok()?;
    }
    parts.next().is_none().then_some(MacAddress(octets))
}

fn pci(text: &str) -> Option<PciAddress> {
    let (domain, rest) = text.split_once(':')?;
    let (bus, rest) = rest.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let address = PciAddress {
        domain: hex(domain, 4)?,
        bus: hex(bus, 2)?.try_into().ok()?,
        device: hex(device, 2)?.try_into().ok()?,
        function: hex(function, 1)?.try_into().ok()?,
    };
    (address.device < 32 && address.function < 8).then_some(address)
}

/// Exactly that many hexadecimal digits.
fn hex(digits: &str, count: usize) -> Option<u16> {
    let is_hex = digits.len() == count && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_hex { u16::from_str_radix(digits, 16).ok() } else { None }
}

/// An address as text, or as its number: IPv4 if it fits 32 bits.
fn ip(json: &Json) -> Option<IpAddr> {
    let number = match json {
        Json::String(text) => return text.parse().ok(),
        Json::Bool(flag) => (*flag).into(),
        Json::Number(number) => number.as_u64()?,
        _ => return None,
    };
    Some(match u32::try_from(number) {
        Ok(short) => Ipv4Addr::from(short).into(),
        Err(_) => Ipv6Addr::from(u128::from(number)).into(),
    })
}

/// `address`, `address/length`, `address/netmask` or `address/hostmask`.
fn ip_network(text: &str) -> Option<IpNetwork> {
    let (address, suffix) = match text.split_once('/') {
        Some((address, suffix)) => (address, Some(suffix)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().ok()?;
    let width = if address.is_ipv4() { 32 } else { 128 };
    let prefix = match suffix {
        None => width,
        Some(suffix) => match integer_text(suffix) {
            Some(length) => u32::try_from(length).ok()?,
            None => {
                mask_length(suffix.parse().ok().filter(|mask: &IpAddr| mask.is_ipv4() == address.is_ipv4())?)?
            }
        },
    };
    (prefix <= width).then_some(())?;
    Some(IpNetwork { address, prefix: u8::try_from(prefix).ok()? })
}

/// The prefix length that a netmask (ones, then zeros) or a hostmask (zeros, then ones) stands for.
fn mask_length(mask: IpAddr) -> Option<u32> {
    let (mask, all_ones) = match mask {
        IpAddr::V4(mask) => (mask.to_bits().into(), u32::MAX.into()),
        IpAddr::V6(mask) => (mask.to_bits(), u128::MAX),
    };
    let host_bits = [mask ^ all_ones, mask].into_iter().find(|bits| bits & bits.wrapping_add(1) == 0)?;
    Some(all_ones.count_ones() - host_bits.count_ones())
}

impl Value {
    /// As os-vif writes it.
    pub(crate) fn encode(&self) -> Json {
        match self {
            Value::Text(text) => Json::from(text.as_str()),
            Value::Integer(number) => Json::Number(Number::from(*number)),
            Value::Boolean(flag) => Json::Bool(*flag),
            Value::Mac(address) => Json::String(address.to_string()),
            Value::Pci(address) => Json::String(address.to_string()),
            Value::Ip(address) => Json::String(ip_text(*address)),
            Value::IpNetwork(network) => Json::String(network.to_string()),
            Value::List(items) => items.iter().map(Value::encode).collect(),
            Value::Object(object) => object::encode(object),
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

impl fmt::Display for IpNetwork {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", ip_text(self.address), self.prefix)
    }
}

/// os-vif prints addresses as the C library does: the last 32 bits of ::/96 with dots, unless they fit 16.
fn ip_text(address: IpAddr) -> String {
    match address {
        IpAddr::V6(v6) => match u32::try_from(v6.to_bits()) {
            Ok(low) if low > 0xffff => format!("::{}", Ipv4Addr::from(low)),
            _ => v6.to_string(),
        },
        IpAddr::V4(v4) => v4.to_string(),
    }
}
