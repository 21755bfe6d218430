//! The commands that speak with a daemon: one request each, its answer printed.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use crate::api::{FdbRow, PortDrops, PortStats, QueueMove, Unplugged, Worker};
use crate::cli::{self, ApiArgs, Cli, Command, Format, PlugArgs, UnplugArgs, WorkersAction};
use crate::client::{Client, ClientError};
use crate::demo::{self, DemoError};
use crate::document::{self, Document};
use crate::events::{Event, EventKind};
use crate::names::Name;
use crate::plug::duration_text;
use crate::problem::{Kind, Problem};
use crate::status::Plug;
use crate::table;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The daemon, or the way to it.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// A document or argument.
    #[error("{0}")]
    Input(#[from] Problem),
    /// The demo.
    #[error("demo: {0}")]
    Demo(#[from] DemoError),
    /// Standard output.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

impl CommandError {
    /// What the command line exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Client(error) => error.exit_code(),
            Self::Demo(_) => 1,
            Self::Input(problem) => problem.kind.exit_code(),
            // Whoever read our output has seen enough.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Output(_) => 1,
        }
    }
}

/// Runs a command that is not `serve`.
pub async fn run(cli: Cli) -> Result<(), CommandError> {
    let path = cli.api.unwrap_or_else(|| cli::API_DEFAULT.into());
    let session = Session { client: Client::new(path), format: cli.output };
    match cli.command {
        Command::Plug(args) => session.plug(&args).await,
        Command::Unplug(args) => session.unplug(&args).await,
        Command::Ls => session.list::<Plug>("/v1/plugs").await,
        Command::Show { name } => session.show(&name).await,
        Command::Stats { name: None } => session.list::<PortStats>("/v1/stats").await,
        Command::Stats { name: Some(name) } => {
            session.list::<PortStats>(&format!("/v1/stats?plug={name}")).await
        }
        Command::Drops => session.list::<PortDrops>("/v1/drops").await,
        Command::Fdb => session.list::<FdbRow>("/v1/fdb").await,
        Command::Workers { action: None } => session.list::<Worker>("/v1/workers").await,
        Command::Workers { action: Some(WorkersAction::Rebalance { dry_run }) } => {
            session.rebalance(dry_run).await
        }
        Command::Events { since } => session.events(since.as_deref()).await,
        Command::Api(args) => session.api(&args).await,
        Command::Vif { file } => vif(&file, cli.output),
        Command::Demo => print(&demo::run(cli.output).await?),
        Command::Completion { .. } | Command::Man | Command::Serve(_) => {
            unreachable!("main runs these without a daemon")
        }
    }
}

/// Where to ask, and how to print.
struct Session {
    client: Client,
    format: Format,
}

impl Session {
    async fn plug(&self, args: &PlugArgs) -> Result<(), CommandError> {
        let Document { id, spec } = match (&args.file, &args.name) {
            (Some(file), _) => document::parse(&document::read_file(file)?, args.socket())?,
            (None, name) => Document {
                id: name.clone().expect("the grammar asks for a name or a file"),
                spec: args.spec()?,
            },
        };
        let mut query = vec![format!("timeout={}", duration_text(args.timeout))];
        query.extend(args.wait.map(|phase| format!("wait={}", phase.name())));
        query.extend(args.dry_run.then(|| "dry_run=true".to_owned()));
        let path = format!("/v1/plugs/{id}?{}", query.join("&"));
        let plug: Plug =
            self.client.json(Method::PUT, &path, Some(&json!({ "spec": spec })), args.timeout).await?;
        print(&table::plugged(&plug, self.format))
    }

    async fn rebalance(&self, dry_run: bool) -> Result<(), CommandError> {
        let path = format!("/v1/workers/rebalance?dry_run={dry_run}");
        let moves: Vec<QueueMove> =
            self.client.json(Method::POST, &path, None, Duration::from_secs(1)).await?;
        print(&table::list(&moves, self.format))
    }

    async fn unplug(&self, args: &UnplugArgs) -> Result<(), CommandError> {
        let id = match (&args.file, &args.name) {
            (Some(file), _) => document::parse(&document::read_file(file)?, None)?.id,
            (None, name) => name.clone().expect("the grammar asks for a name or a file"),
        };
        let path = format!("/v1/plugs/{id}?must_exist={}", args.must_exist);
        let unplugged: Unplugged = self.client.json(Method::DELETE, &path, None, Duration::ZERO).await?;
        let was = if unplugged.existed { "unplugged" } else { "was not plugged" };
        match self.format {
            Format::Json => print(&table::json(&unplugged)),
            Format::Yaml => print(&table::yaml(&unplugged)),
            Format::Name => print(&format!("{id}\n")),
            Format::Table | Format::Wide => print(&format!("{id} {was}\n")),
        }
    }

    async fn show(&self, name: &Name) -> Result<(), CommandError> {
        let plug: Plug = self.get(&format!("/v1/plugs/{name}")).await?;
        print(&table::plug(&plug, self.format))
    }

    async fn list<T: table::Row + serde::de::DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<(), CommandError> {
        let rows: Vec<T> = self.get(path).await?;
        print(&table::list(&rows, self.format))
    }

    async fn get<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.client.json(Method::GET, path, None, Duration::ZERO).await
    }

    async fn events(&self, since: Option<&str>) -> Result<(), CommandError> {
        let safe = |id: &str| id.bytes().all(|b| b.is_ascii_digit() || b == b'-');
        let path = match since {
            None => "/v1/events".to_owned(),
            Some(id) if safe(id) => format!("/v1/events?since={id}"),
            Some(id) => return Err(Problem::invalid(format!("{id:?} is not an event's id")).into()),
        };
        let mut printed = Ok(());
        let mut lines = Lines::default();
        let take = |piece: &[u8]| {
            printed = lines.take(piece).iter().try_for_each(|line| self.event_line(line));
            printed.is_ok()
        };
        self.client.stream(&path, take).await?;
        printed
    }

    /// One line of the stream; only those with data are of interest, the data has everything.
    fn event_line(&self, line: &str) -> Result<(), CommandError> {
        let Some(data) = line.strip_prefix("data:") else { return Ok(()) };
        if matches!(self.format, Format::Json | Format::Yaml) {
            return print(&format!("{}\n", data.trim_start()));
        }
        // A resync carries the plugs as they are instead of an event.
        let Ok(event) = serde_json::from_str::<Event>(data) else {
            return print(&format!(
                "{}: events were missed, `vhostd ls` tells how things are\n",
                EventKind::Resync.name()
            ));
        };
        let Event { id, time, kind, plug, message } = event;
        match self.format {
            Format::Name => print(&format!("{id}\n")),
            _ => print(
                format!("{time}  {:<12}  {}  {message}", kind.name(), plug.unwrap_or_default()).trim_end(),
            )
            .and_then(|()| print("\n")),
        }
    }

    async fn api(&self, args: &ApiArgs) -> Result<(), CommandError> {
        let method: Method = args
            .method
            .to_ascii_uppercase()
            .parse()
            .map_err(|_| Problem::invalid(format!("{:?} is not an HTTP method", args.method)))?;
        if !args.path.starts_with('/') {
            return Err(Problem::invalid(format!("path {:?} must begin with '/'", args.path)).into());
        }
        let body = match args.data.as_deref() {
            Some("-") => document::read_file(&PathBuf::from("-"))?,
            Some(data) => data.as_bytes().to_vec(),
            None => Vec::new(),
        };
        let answer = self.client.bytes(method, &args.path, body.into(), Duration::ZERO).await?;
        match serde_json::from_slice::<Value>(&answer) {
            Ok(value) if self.format == Format::Yaml => print(&table::yaml(&value)),
            Ok(value) => print(&table::json(&value)),
            Err(_) => print(&String::from_utf8_lossy(&answer)),
        }
    }
}

/// Prints an os-vif object of any class as it is understood.
fn vif(file: &Path, format: Format) -> Result<(), CommandError> {
    let bytes = document::read_file(file)?;
    let document = vif::Document::parse(&bytes).map_err(|e| Problem::new(Kind::Invalid, e.to_string()))?;
    let encoded = document.encode();
    print(&if format == Format::Yaml { table::yaml(&encoded) } else { table::json(&encoded) })
}

fn print(text: &str) -> Result<(), CommandError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Cuts a stream of bytes into lines.
#[derive(Default)]
struct Lines {
    begun: Vec<u8>,
}

impl Lines {
    fn take(&mut self, piece: &[u8]) -> Vec<String> {
        self.begun.extend_from_slice(piece);
        let Some(end) = self.begun.iter().rposition(|b| *b == b'\n') else { return Vec::new() };
        let rest = self.begun.split_off(end + 1);
        let whole = std::mem::replace(&mut self.begun, rest);
        String::from_utf8_lossy(&whole).lines().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_the_stream_is_cut() {
        let mut lines = Lines::default();
        assert_eq!(lines.take(b"da"), [] as [&str; 0]);
        assert_eq!(lines.take(b"ta: 1\n\nda"), ["data: 1", ""]);
        assert_eq!(lines.take(b"ta: 2\n"), ["data: 2"]);
    }
}
