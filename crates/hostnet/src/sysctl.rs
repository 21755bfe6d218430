//! What the kernel's IP stack does on an interface of the host: `/proc/sys/net`, which shows the network namespace of the
//! thread that opens it.

use std::io;

use sys::fail_point;

use crate::Error;

/// IPv4 or IPv6, as the directory is named.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Family {
    V4,
    V6,
}

/// Keeps the host from taking a link-local address on the link: duplicate address detection and router solicitations
/// would reach the guests.
pub(crate) async fn disable_ipv6(name: &str) -> Result<(), Error> {
    set(Family::V6, name, DISABLE_IPV6, "1").await
}

pub(crate) const DISABLE_IPV6: &str = "disable_ipv6";

/// Sets a key of an interface. A kernel without that IP version has nothing to set.
pub(crate) async fn set(family: Family, name: &str, key: &'static str, value: &str) -> Result<(), Error> {
    fail_point::pass(format_args!("set {key} of {name}"));
    match tokio::fs::write(path(family, name, key), value).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|source| Error::Sysctl { name: name.to_owned(), key, source }),
    }
}

/// A key of an interface; `None` in a kernel without that IP version.
pub(crate) async fn get(family: Family, name: &str, key: &'static str) -> Result<Option<String>, Error> {
    match tokio::fs::read_to_string(path(family, name, key)).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Ok(value) => Ok(Some(value.trim_end().to_owned())),
        Err(source) => Err(Error::Sysctl { name: name.to_owned(), key, source }),
    }
}

fn path(family: Family, name: &str, key: &str) -> String {
    let family = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    format!("/proc/sys/net/{family}/conf/{name}/{key}")
}
