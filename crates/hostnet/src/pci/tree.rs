//! sysfs, read with suspicion.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::path::{Component, Path, PathBuf};

use sys::fail_point;

use super::{PciAddress, PciError};

/// Longest attribute that is read, bytes: what the kernel has for one.
const TEXT_BYTES_MAX: u64 = 4096;
/// Most entries of a directory: more virtual functions than any device has.
const ENTRIES_MAX: usize = 1 << 16;

/// A mounted sysfs.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    root: PathBuf,
}

/// A directory in it.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    path: PathBuf,
}

impl Tree {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(super) fn dir(&self, path: String) -> Entry {
        Entry { path: self.root.join(path) }
    }

    /// A device's directory, which is what the link of its address leads to.
    pub(super) fn device(&self, address: PciAddress) -> Result<Entry, PciError> {
        let link = self.root.join(format!("bus/pci/devices/{address}"));
        match self.resolved(&link) {
            Err(PciError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Err(PciError::Absent { address })
            }
            resolved => Ok(Entry { path: resolved? }),
        }
    }

    /// The PCI device that a network interface is on: its own, or the one that its virtio device is on.
    pub(super) fn device_behind(&self, link: &Entry) -> Result<Option<PciAddress>, PciError> {
        let path = match self.resolved(&link.path.join("device")) {
            Err(PciError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => return Ok(None),
            resolved => resolved?,
        };
        let address = |path: &Path| path.file_name()?.to_str()?.parse().ok();
        Ok(path.ancestors().find_map(address))
    }

    /// Where a path leads, which has to be within the tree.
    fn resolved(&self, path: &Path) -> Result<PathBuf, PciError> {
        let read = |source| PciError::Read { path: path.into(), source };
        let (root, target) = (self.root.canonicalize().map_err(read)?, path.canonicalize().map_err(read)?);
        if target.starts_with(&root) {
            return Ok(target);
        }
        Err(PciError::Odd { path: path.into(), found: target.display().to_string() })
    }
}

impl Entry {
    pub(super) fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.path.clone() } else { self.path.join(name) }
    }

    pub(super) fn dir(&self, name: &str) -> Self {
        Self { path: self.path(name) }
    }

    /// Last part of what a link says; `None` if there is no such link.
    pub(super) fn link_name(&self, name: &str) -> Result<Option<String>, PciError> {
        let path = self.path(name);
        let target = match fs::read_link(&path) {
            Err(error) if is_absent(&error) => return Ok(None),
            target => target.map_err(|source| PciError::Read { path: path.clone(), source })?,
        };
        match target.components().next_back() {
            Some(Component::Normal(end)) => match end.to_str() {
                Some(end) => Ok(Some(end.to_owned())),
                None => Err(self.odd(name, &target.to_string_lossy())),
            },
            _ => Err(self.odd(name, &target.to_string_lossy())),
        }
    }

    /// An attribute without the line's end; `None` if there is none, or the device does not support it.
    pub(super) fn text(&self, name: &str) -> Result<Option<String>, PciError> {
        let path = self.path(name);
        let mut text = String::new();
        let read = fs::File::open(&path).and_then(|file| file.take(TEXT_BYTES_MAX).read_to_string(&mut text));
        match read {
            Ok(_) => Ok(Some(text.trim_end().to_owned())),
            Err(error) if is_absent(&error) => Ok(None),
            Err(source) => Err(PciError::Read { path, source }),
        }
    }

    /// Names in a directory, sorted; none if it is not there.
    pub(super) fn names(&self, name: &str) -> Result<Vec<String>, PciError> {
        let path = self.path(name);
        let read = |source| PciError::Read { path: path.clone(), source };
        let entries = match fs::read_dir(&path) {
            Err(error) if is_absent(&error) => return Ok(Vec::new()),
            entries => entries.map_err(read)?,
        };
        let name = |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        let names: io::Result<Vec<String>> = entries.take(ENTRIES_MAX).map(name).collect();
        let mut names = names.map_err(read)?;
        names.sort();
        Ok(names)
    }

    /// Overwrites an attribute that is there.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), PciError> {
        let path = self.path(name);
        fail_point::pass(format_args!("write {:?} to {}", text, path.display()));
        let file = fs::OpenOptions::new().write(true).truncate(true).open(&path);
        let written = file.and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()));
        written.map_err(|source| PciError::Write { path, text: text.trim_end().into(), source })
    }

    /// The error for something that the kernel does not write.
    pub(super) fn odd(&self, name: &str, found: &str) -> PciError {
        PciError::Odd { path: self.path(name), found: found.to_owned() }
    }
}

/// Whether the kernel has no such thing, or the device it is about has just gone or does not support it. Not all that is among
/// the interfaces is one: `class/net/bonding_masters` is a file.
fn is_absent(error: &io::Error) -> bool {
    const ENODEV: i32 = 19;
    const EOPNOTSUPP: i32 = 95;
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
        || matches!(error.raw_os_error(), Some(ENODEV | EOPNOTSUPP))
}
