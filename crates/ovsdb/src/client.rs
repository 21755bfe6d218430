//! Requests to the database, many at a time over one connection.
//!
//! A task owns the connection and gives each answer to whoever asked, in whatever order they come: a transaction that waits
//! for something holds up no other. When the connection breaks, or an answer does not come, every request on it fails and
//! the next one connects anew: reconnecting needs no timer of its own, since whoever needs the database tries again.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};
use sys::fail_point;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::Error;
use crate::connection::{Address, Connection, LIMIT, Message};
use crate::value::{self, Row};

/// The database that is spoken of.
pub const DATABASE: &str = "Open_vSwitch";
/// Requests on their way to the connection.
const QUEUE: usize = 64;

/// A client of one database server. Connects when it is first needed.
#[derive(Debug)]
pub struct Client {
    address: Address,
    link: Mutex<Option<Link>>,
}

#[derive(Debug)]
struct Link {
    requests: mpsc::Sender<Request>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Request {
    operations: Vec<Value>,
    answer: oneshot::Sender<Result<Value, Error>>,
}

impl Client {
    /// A client that has not connected yet.
    pub fn new(address: Address) -> Self {
        Self { address, link: Mutex::default() }
    }

    /// Where the server is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Runs a transaction (RFC 7047 §4.1.3): all of its operations or none. Gives the result of each.
    ///
    /// `waits` is how long its `wait` operations may take beside the server's own time.
    pub async fn transact(&self, operations: Vec<Value>, waits: Duration) -> Result<Vec<Row>, Error> {
        let count = operations.len();
        // What waits for a change stands behind it.
        if let Some(change) = operations.iter().find(|operation| operation["op"] != "select") {
            fail_point::pass(format_args!("{} {}", change["op"], change["table"]));
        }
        // Whoever waits for another's attempt to connect waits no longer than one attempt takes.
        let late = |_| Err(Error::Connect { address: self.address.to_string(), cause: "timed out".into() });
        let requests = timeout(LIMIT, self.requests()).await.unwrap_or_else(late)?;
        let (answer, answered) = oneshot::channel();
        let asked = async {
            requests.send(Request { operations, answer }).await.ok()?;
            answered.await.ok()
        };
        let result = match timeout(LIMIT.saturating_add(waits), asked).await {
            Ok(Some(result)) => result?,
            Ok(None) => {
                let (address, cause) = (self.address.to_string(), "it broke before the request".into());
                return Err(Error::Closed { address, cause });
            }
            Err(_) => {
                // Whatever it answers later would come to a request that has gone.
                self.forget(&requests).await;
                return Err(Error::Silent { address: self.address.to_string(), limit: LIMIT });
            }
        };
        self.results(result, count)
    }

    /// The way to the connection, made if there is none.
    async fn requests(&self) -> Result<mpsc::Sender<Request>, Error> {
        let mut link = self.link.lock().await;
        if let Some(link) = link.as_ref().filter(|link| !link.requests.is_closed()) {
            return Ok(link.requests.clone());
        }
        let connection = Connection::open(&self.address).await?;
        let (requests, queue) = mpsc::channel(QUEUE);
        *link = Some(Link { requests: requests.clone(), task: tokio::spawn(serve(connection, queue)) });
        Ok(requests)
    }

    async fn forget(&self, requests: &mpsc::Sender<Request>) {
        let mut link = self.link.lock().await;
        if link.as_ref().is_some_and(|link| link.requests.same_channel(requests)) {
            *link = None;
        }
    }

    /// §4.1.3: one object an operation; of a failed transaction the first that failed has `error`, and one more object may
    /// follow with an error of the commit.
    fn results(&self, result: Value, count: usize) -> Result<Vec<Row>, Error> {
        let protocol =
            |cause: &str| Error::Protocol { address: self.address.to_string(), cause: cause.into() };
        let Value::Array(results) = result else {
            return Err(protocol("a transaction's result is no array"));
        };
        let mut rows = Vec::with_capacity(count);
        for result in results {
            match result {
                Value::Object(row) => match row.get("error") {
                    Some(error) if !error.is_null() => return Err(refused(&row)),
                    _ => rows.push(row),
                },
                // An operation that was not tried after one that failed.
                Value::Null => {}
                _ => return Err(protocol("an operation's result is no object")),
            }
        }
        if rows.len() < count {
            return Err(protocol("a transaction's result lacks an operation's"));
        }
        Ok(rows)
    }
}

fn refused(row: &Row) -> Error {
    let text = |name: &str| value::text(row, name).unwrap_or_default().to_owned();
    Error::Refused { error: text("error"), details: text("details") }
}

/// Serves requests until nobody can ask any more, or the connection breaks.
async fn serve(mut connection: Connection, mut queue: mpsc::Receiver<Request>) {
    let mut pending = HashMap::new();
    let broken = loop {
        tokio::select! {
            request = queue.recv() => {
                let Some(Request { operations, answer }) = request else { return };
                let params = std::iter::once(json!(DATABASE)).chain(operations).collect();
                match connection.request("transact", Value::Array(params)).await {
                    Ok(id) => drop(pending.insert(id, answer)),
                    Err(error) => {
                        let _ = answer.send(Err(error.clone()));
                        break error;
                    }
                }
            }
            message = connection.receive() => match message {
                Ok(Message::Reply(id, result)) => {
                    let Some(answer) = pending.remove(&id) else {
                        break connection.protocol(&"two replies to one request");
                    };
                    // Whoever asked may have gone.
                    let _: Result<(), _> = answer.send(result.map_err(Error::of_request));
                }
                Ok(Message::Probe(answer)) => {
                    if let Err(error) = connection.answer(&answer).await {
                        break error;
                    }
                }
                Ok(Message::Update(_) | Message::Other) => {}
                Err(error) => break error,
            }
        }
    };
    queue.close();
    for answer in pending.into_values() {
        let _ = answer.send(Err(broken.clone()));
    }
    while let Ok(request) = queue.try_recv() {
        let _ = request.answer.send(Err(broken.clone()));
    }
}
