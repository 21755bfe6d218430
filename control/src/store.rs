//! The plugs' records on disk: what was asked for survives any crash.
//!
//! One redb file in the state directory, one JSON value a plug. A write is answered when it is durable. All writes go
//! through one thread, which commits whatever has queued up in a single transaction: a durable commit costs the disk's
//! latency once, however many plugs wait for it.
//!
//! redb locks the file, so a second daemon on the same directory is refused at open.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sys::fail_point;
use tokio::sync::oneshot;

use crate::names::Name;
use crate::spec::PlugSpec;

/// File in the state directory.
const FILE: &str = "plugs.redb";
/// Its name while it is being made.
const NEW_FILE: &str = "plugs.redb.new";
/// Plug id to JSON record.
const PLUGS: TableDefinition<&str, &[u8]> = TableDefinition::new("plugs");
/// Layout of a record that this release writes and reads.
const FORMAT: u32 = 1;
/// Most that redb keeps in memory of the file.
const CACHE_BYTES: usize = 1 << 20;
/// Writes in one transaction.
const BATCH_MAX: usize = 256;

/// What is remembered of a plug.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    format: u32,
    /// What was decided; written before it is done.
    pub intent: Intent,
    /// What it is, completed.
    pub spec: PlugSpec,
}

/// Whether a plug is to be or not to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Intent {
    /// It is to be there.
    Plugged,
    /// It is to go; the record goes last.
    Unplugged,
}

impl Record {
    /// A record in the present format.
    pub fn new(intent: Intent, spec: PlugSpec) -> Self {
        Self { format: FORMAT, intent, spec }
    }
}

/// Why the store cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Another daemon.
    #[error("state directory {0} is in use by another vhostd: stop it, or give this one another --state-dir")]
    InUse(PathBuf),
    /// The directory or file.
    #[error("state directory {path} cannot be used: {cause}; mend it, or give another --state-dir")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// The file's content.
    #[error(
        "{path} cannot be read: {cause}. The plugs recorded in it are needed to serve running guests: restore the file \
         from a backup, or move it away to start without any plug"
    )]
    Corrupt {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// One value in the file.
    #[error("{path}: the record of plug {id:?} cannot be read: {cause}")]
    Record {
        /// File.
        path: PathBuf,
        /// Plug.
        id: String,
        /// Why.
        cause: String,
    },
    /// The disk.
    #[error("cannot write {path}: {cause}; nothing was changed")]
    Write {
        /// File.
        path: PathBuf,
        /// Why.
        cause: String,
    },
}

struct Write {
    id: Name,
    record: Option<Record>,
    done: oneshot::Sender<Result<(), StoreError>>,
}

/// The open store. Its thread ends when it is dropped.
pub struct Store {
    path: PathBuf,
    writes: mpsc::Sender<Write>,
}

impl Store {
    /// Opens or makes the store in `dir` and reads every record in it.
    pub fn open(dir: &Path) -> Result<(Self, Vec<(Name, Record)>), StoreError> {
        let unusable =
            |cause: std::io::Error| StoreError::Directory { path: dir.into(), cause: cause.to_string() };
        make_private_dir(dir).map_err(unusable)?;
        let path = dir.join(FILE);
        let opened = make_file(dir).and_then(|()| open_database(&path));
        let database = opened.map_err(|cause| match cause {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(dir.into()),
            DatabaseError::Storage(redb::StorageError::Io(cause))
                if cause.kind() == std::io::ErrorKind::PermissionDenied =>
            {
                unusable(cause)
            }
            cause => StoreError::Corrupt { path: path.clone(), cause: cause.to_string() },
        })?;
        let records = read_all(&database, &path)?;
        let (writes, queue) = mpsc::channel();
        let thread = std::thread::Builder::new().name("store".into()).stack_size(256 << 10);
        let file = path.clone();
        thread.spawn(move || write_all(database, &file, &queue)).map_err(unusable)?;
        Ok((Self { path, writes }, records))
    }

    /// Writes a plug's record. When this returns, it is durable.
    pub async fn put(&self, id: &Name, record: Record) -> Result<(), StoreError> {
        self.write(id, Some(record)).await
    }

    /// Forgets a plug. When this returns, that is durable.
    pub async fn delete(&self, id: &Name) -> Result<(), StoreError> {
        self.write(id, None).await
    }

    async fn write(&self, id: &Name, record: Option<Record>) -> Result<(), StoreError> {
        let gone =
            || StoreError::Write { path: self.path.clone(), cause: "the store's thread has ended".into() };
        let (done, answer) = oneshot::channel();
        self.writes.send(Write { id: id.clone(), record, done }).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// 0700: records name sockets and bridges of all tenants.
fn make_private_dir(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Makes the file, if it is not there. Under another name: redb does not know one again whose making was cut short.
fn make_file(dir: &Path) -> Result<(), DatabaseError> {
    let storage = |cause: std::io::Error| DatabaseError::from(redb::StorageError::Io(cause));
    let handle = File::open(dir).map_err(storage)?;
    // Two that start at one time do not make two.
    match flock(&handle, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Err(DatabaseError::DatabaseAlreadyOpen),
        locked => locked.map_err(|cause| storage(cause.into()))?,
    }
    let (path, new) = (dir.join(FILE), dir.join(NEW_FILE));
    if path.try_exists().map_err(storage)? {
        return Ok(());
    }
    fail_point::pass(format_args!("make {}", new.display()));
    match std::fs::remove_file(&new) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => return Err(storage(cause)),
        _ => {}
    }
    drop(open_database(&new)?);
    fail_point::pass(format_args!("make {}", path.display()));
    std::fs::rename(&new, &path).and_then(|()| handle.sync_all()).map_err(storage)
}

fn open_database(path: &Path) -> Result<Database, DatabaseError> {
    // A damaged file can trip redb's own assertions while it walks the pages; that is an answer, not a crash.
    let opened = std::panic::catch_unwind(|| Database::builder().set_cache_size(CACHE_BYTES).create(path));
    opened.unwrap_or_else(|_| {
        Err(redb::StorageError::Corrupted("its pages contradict each other".into()).into())
    })
}

fn read_all(database: &Database, path: &Path) -> Result<Vec<(Name, Record)>, StoreError> {
    let corrupt = |cause: redb::Error| StoreError::Corrupt { path: path.into(), cause: cause.to_string() };
    let transaction = database.begin_read().map_err(|e| corrupt(e.into()))?;
    let table = match transaction.open_table(PLUGS) {
        Ok(table) => table,
        Err(TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(cause) => return Err(corrupt(cause.into())),
    };
    let mut records = Vec::new();
    for entry in table.iter().map_err(|e| corrupt(e.into()))? {
        let (id, value) = entry.map_err(|e| corrupt(e.into()))?;
        records.push(read_record(id.value(), value.value(), path)?);
    }
    Ok(records)
}

fn read_record(id: &str, value: &[u8], path: &Path) -> Result<(Name, Record), StoreError> {
    #[derive(Deserialize)]
    struct Envelope {
        format: u32,
    }
    let bad = |cause: String| StoreError::Record { path: path.into(), id: id.into(), cause };
    let envelope: Envelope = serde_json::from_slice(value).map_err(|e| bad(e.to_string()))?;
    if envelope.format != FORMAT {
        let found = envelope.format;
        return Err(bad(format!(
            "it has format {found}, this release reads format {FORMAT}; run the release that wrote it"
        )));
    }
    let record = serde_json::from_slice(value).map_err(|e| bad(e.to_string()))?;
    Ok((id.parse().map_err(|e| bad(format!("{e}")))?, record))
}

fn write_all(database: Database, path: &Path, queue: &mpsc::Receiver<Write>) {
    let mut database = Some(database);
    while let Ok(first) = queue.recv() {
        let batch: Vec<Write> = std::iter::once(first).chain(queue.try_iter().take(BATCH_MAX - 1)).collect();
        // After an error of the disk redb takes no more writes until it is opened anew.
        let open = database.take().map_or_else(|| open_database(path), Ok);
        let written = open.map_err(redb::Error::from).and_then(|open| {
            commit(&open, &batch)?;
            database = Some(open);
            Ok(())
        });
        let written =
            written.map_err(|cause| StoreError::Write { path: path.into(), cause: cause.to_string() });
        for write in batch {
            // Whoever asked may have gone; the record stands nevertheless.
            let _ = write.done.send(written.clone());
        }
    }
}

fn commit(database: &Database, batch: &[Write]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut table = transaction.open_table(PLUGS)?;
        for Write { id, record, .. } in batch {
            match record {
                Some(record) => {
                    let value = serde_json::to_vec(record).expect("a record is plain JSON");
                    table.insert(id.as_str(), value.as_slice())?;
                }
                None => {
                    table.remove(id.as_str())?;
                }
            }
        }
    }
    fail_point::pass(format_args!("commit {} records", batch.len()));
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(path: &str) -> Record {
        let spec = serde_json::from_value(json!({"socket": {"role": "listen", "path": path}})).unwrap();
        Record::new(Intent::Plugged, spec)
    }

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn raw_write(dir: &Path, id: &str, value: &[u8]) {
        let database = Database::create(dir.join(FILE)).unwrap();
        let transaction = database.begin_write().unwrap();
        transaction.open_table(PLUGS).unwrap().insert(id, value).unwrap();
        transaction.commit().unwrap();
    }

    fn reopen(dir: &Path) -> (Store, Vec<(Name, Record)>) {
        // The former store's thread closes the file when it has seen its end.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        loop {
            match Store::open(dir) {
                Err(StoreError::InUse(_)) if std::time::Instant::now() < deadline => std::thread::yield_now(),
                opened => return opened.unwrap(),
            }
        }
    }

    #[tokio::test]
    async fn records_survive_a_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let (store, records) = Store::open(dir.path()).unwrap();
        assert_eq!(records, []);
        store.put(&name("a"), record("/run/a.sock")).await.unwrap();
        store.put(&name("b"), record("/run/b.sock")).await.unwrap();
        store.delete(&name("a")).await.unwrap();
        drop(store);
        let (_store, records) = reopen(dir.path());
        assert_eq!(records, [(name("b"), record("/run/b.sock"))]);
    }

    #[tokio::test]
    async fn a_store_whose_making_was_cut_short_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(dir.path()).unwrap();
        store.put(&name("a"), record("/run/a.sock")).await.unwrap();
        drop(store);
        assert_eq!(reopen(dir.path()).1.len(), 1, "it is made once");
        // As long as it will be, and nothing in it yet.
        let bytes = std::fs::read(dir.path().join(FILE)).unwrap();
        std::fs::remove_file(dir.path().join(FILE)).unwrap();
        std::fs::write(dir.path().join(NEW_FILE), vec![0; bytes.len()]).unwrap();
        assert_eq!(Store::open(dir.path()).unwrap().1, []);
        assert!(!dir.path().join(NEW_FILE).exists());
    }

    #[tokio::test]
    async fn a_second_opener_is_told_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let _store = Store::open(dir.path()).unwrap();
        let error = Store::open(dir.path()).err().unwrap();
        assert!(matches!(error, StoreError::InUse(_)), "{error}");
    }

    #[test]
    fn a_damaged_file_is_named_with_its_reason() {
        for damage in ["garbage", "truncated", "zeroed", "flipped"] {
            let dir = tempfile::tempdir().unwrap();
            raw_write(dir.path(), "a", b"{}");
            let path = dir.path().join(FILE);
            let mut bytes = std::fs::read(&path).unwrap();
            match damage {
                "garbage" => bytes = b"not a database at all".repeat(1000),
                "truncated" => bytes.truncate(bytes.len() / 2 + 7),
                "zeroed" => bytes[..4096].fill(0),
                _ => bytes[4096..].iter_mut().for_each(|b| *b = !*b),
            }
            std::fs::write(&path, bytes).unwrap();
            let error = Store::open(dir.path()).err().unwrap_or_else(|| panic!("{damage} was not noticed"));
            let message = error.to_string();
            assert!(message.contains("plugs.redb"), "{damage}: {message}");
        }
    }

    #[test]
    fn records_of_another_release_and_foreign_records_are_refused() {
        for (value, expect) in [
            (&br#"{"format":2,"anything":1}"#[..], "format 2"),
            (b"no json", "expected"),
            (br#"{"format":1,"intent":"plugged","spec":{"mtuu":1}}"#, "mtuu"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            raw_write(dir.path(), "a", value);
            let error = Store::open(dir.path()).err().unwrap();
            assert!(matches!(&error, StoreError::Record { id, .. } if id == "a"), "{error}");
            assert!(error.to_string().contains(expect), "{error}");
        }
    }

    #[test]
    fn an_unusable_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let error = Store::open(&file.join("state")).err().unwrap();
        assert!(matches!(error, StoreError::Directory { .. }), "{error}");
    }
}
