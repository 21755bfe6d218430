//! One connection: messages out and in.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::Error;
use crate::frame::Frames;

/// For a connection to stand, for a message to be taken, and for an answer to come.
pub const LIMIT: Duration = Duration::from_secs(4);
/// Bytes of one read.
const READ_BYTES: usize = 16 << 10;

/// Where a database is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `unix:PATH`
    Unix(String),
    /// `tcp:HOST:PORT`
    Tcp(String),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text.split_once(':') {
            Some(("unix", path)) if path.starts_with('/') => Ok(Self::Unix(path.into())),
            Some(("tcp", host))
                if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) =>
            {
                Ok(Self::Tcp(host.into()))
            }
            _ => Err(Error::Address(text.into())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{path}"),
            Self::Tcp(host) => write!(f, "tcp:{host}"),
        }
    }
}

/// What the server sends.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// The answer to a request of ours: its number, and the result or the error.
    Reply(u64, Result<Value, Value>),
    /// `update`: its parameters (RFC 7047 §4.1.6).
    Update(Value),
    /// The server's probe (`echo`, §4.1.11): the answer to be given with [`Connection::answer`].
    Probe(Value),
    /// Anything else that needs no answer.
    Other,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// An open connection.
pub struct Connection {
    address: Address,
    stream: Box<dyn Stream>,
    frames: Frames,
    next_id: u64,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({})", self.address)
    }
}

impl Connection {
    /// Connects, within [`LIMIT`].
    pub async fn open(address: &Address) -> Result<Self, Error> {
        let connecting = async {
            Ok(match address {
                Address::Unix(path) => Box::new(UnixStream::connect(path).await?) as Box<dyn Stream>,
                Address::Tcp(host) => Box::new(TcpStream::connect(host).await?),
            })
        };
        let late = |_| Err(std::io::ErrorKind::TimedOut.into());
        let stream: std::io::Result<_> = timeout(LIMIT, connecting).await.unwrap_or_else(late);
        let cause =
            |error: std::io::Error| Error::Connect { address: address.to_string(), cause: error.to_string() };
        Ok(Self {
            address: address.clone(),
            stream: stream.map_err(cause)?,
            frames: Frames::default(),
            next_id: 0,
        })
    }

    /// Sends a request and gives the number under which its answer will come. Not cancel safe.
    pub async fn request(&mut self, method: &str, params: Value) -> Result<u64, Error> {
        let id = self.next_id;
        self.next_id += 1;
        self.send(&json!({"method": method, "params": params, "id": id})).await?;
        Ok(id)
    }

    /// Answers a probe. Not cancel safe.
    pub async fn answer(&mut self, probe: &Value) -> Result<(), Error> {
        self.send(probe).await
    }

    /// The next message. Cancel safe.
    pub async fn receive(&mut self) -> Result<Message, Error> {
        loop {
            if let Some(message) = self.frames.message().map_err(|error| self.protocol(&error))? {
                return self.understood(message);
            }
            let mut bytes = [0; READ_BYTES];
            match self.stream.read(&mut bytes).await {
                Ok(0) => return Err(self.closed("it ended")),
                Ok(length) => self.frames.push(&bytes[..length]),
                Err(error) => return Err(self.closed(&error)),
            }
        }
    }

    /// The error for a server that says nothing.
    pub fn silent(&self) -> Error {
        Error::Silent { address: self.address.to_string(), limit: LIMIT }
    }

    /// The error for a server that says what makes no sense.
    pub fn protocol(&self, cause: &impl ToString) -> Error {
        Error::Protocol { address: self.address.to_string(), cause: cause.to_string() }
    }

    fn closed(&self, cause: &(impl ToString + ?Sized)) -> Error {
        Error::Closed { address: self.address.to_string(), cause: cause.to_string() }
    }

    async fn send(&mut self, message: &Value) -> Result<(), Error> {
        let bytes = message.to_string().into_bytes();
        match timeout(LIMIT, self.stream.write_all(&bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(self.closed(&error)),
            Err(_) => Err(self.silent()),
        }
    }

    fn understood(&self, message: Value) -> Result<Message, Error> {
        let Value::Object(mut fields) = message else { return Err(self.protocol(&"a message is no object")) };
        let mut field = |name: &str| fields.remove(name).unwrap_or_default();
        let id = field("id");
        match field("method") {
            Value::String(method) if method == "echo" && !id.is_null() => {
                Ok(Message::Probe(json!({"id": id, "result": field("params"), "error": null})))
            }
            Value::String(method) if method == "update" => Ok(Message::Update(field("params"))),
            Value::String(_) => Ok(Message::Other),
            Value::Null => {
                let id = id.as_u64().filter(|id| *id < self.next_id);
                let id = id.ok_or_else(|| self.protocol(&"a reply to nothing that was asked"))?;
                Ok(Message::Reply(
                    id,
                    match field("error") {
                        Value::Null => Ok(field("result")),
                        error => Err(error),
                    },
                ))
            }
            _ => Err(self.protocol(&"a method that is no string")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for good in ["unix:/run/openvswitch/db.sock", "tcp:127.0.0.1:6640", "tcp:[::1]:6640"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in ["", "/run/db.sock", "unix:db.sock", "ssl:1.2.3.4:6640", "tcp:host", "tcp:host:port"] {
            assert!(matches!(bad.parse::<Address>(), Err(Error::Address(text)) if text == bad));
        }
    }
}
