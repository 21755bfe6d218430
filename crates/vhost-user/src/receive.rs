//! Puts messages together from whatever pieces a stream socket gives, without blocking.
//!
//! A read never goes beyond the header, or beyond the payload, of the message in progress. So descriptors that come
//! with a read belong to that header or that payload and to no other message: the kernel ends a read behind the bytes
//! that carried descriptors. [`Assembler`] holds the state and needs no socket; [`Receiver`] feeds it from one.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use crate::descriptor::{Grave, Received};
use crate::message::{DESCRIPTORS_MAX, HEADER_LEN, Header, Message, PAYLOAD_MAX, Violation};

/// A message in progress.
#[derive(Debug)]
pub struct Assembler {
    head: [u8; HEADER_LEN],
    header: Option<Header>,
    payload: Vec<u8>,
    /// Bytes of the header, or of the payload once there is a header.
    have: usize,
    descriptors: Vec<Received>,
}

impl Default for Assembler {
    fn default() -> Self {
        Self { head: [0; HEADER_LEN], header: None, payload: Vec::new(), have: 0, descriptors: Vec::new() }
    }
}

impl Assembler {
    /// Whether a message has begun and is not complete.
    pub fn in_progress(&self) -> bool {
        self.header.is_some() || self.have > 0
    }

    /// Where the next bytes go; never empty.
    pub fn space(&mut self) -> &mut [u8] {
        match self.header {
            None => &mut self.head[self.have..],
            Some(_) => &mut self.payload[self.have..],
        }
    }

    /// Takes note of `len` bytes put into [`Self::space`] and the descriptors that came with them; returns the message
    /// if that completes one.
    pub fn advance(&mut self, len: usize, descriptors: Vec<Received>) -> Result<Option<Message>, Violation> {
        self.have += len;
        if let Some(header) = self.header {
            if !descriptors.is_empty() {
                return Err(Violation::DescriptorsInPayload(header.name()));
            }
            return Ok(self.complete(header));
        }
        self.descriptors.extend(descriptors);
        if self.have < HEADER_LEN {
            return Ok(None);
        }
        let header = Header::parse(&self.head);
        header.check(self.descriptors.len())?;
        // At most PAYLOAD_MAX, as checked.
        self.payload = vec![0; usize::try_from(header.size).unwrap_or(PAYLOAD_MAX)];
        self.header = Some(header);
        self.have = 0;
        Ok(self.complete(header))
    }

    fn complete(&mut self, header: Header) -> Option<Message> {
        if self.have < self.payload.len() {
            return None;
        }
        let done = std::mem::take(self);
        Some(Message { header, payload: done.payload, descriptors: done.descriptors })
    }
}

/// How a read ended.
#[derive(Debug)]
pub enum Progress {
    /// A whole message.
    Message(Message),
    /// Nothing more for now.
    Pending,
    /// The peer is gone. True: in the middle of a message.
    End(bool),
}

/// Why nothing can be received any more.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The peer broke the protocol.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// Descriptors were lost: this process is at its limit (RLIMIT_NOFILE).
    #[error("descriptors of a message were lost: this process has too many open, raise its limit")]
    DescriptorPressure,
    /// The socket failed.
    #[error("receiving failed: {0}")]
    Io(#[from] io::Error),
}

/// An [`Assembler`] that reads a socket.
#[derive(Debug)]
pub struct Receiver {
    assembler: Assembler,
    grave: Grave,
    /// When the message in progress began.
    began: Option<Instant>,
}

impl Receiver {
    /// Descriptors that turn out to be unwanted go to `grave`.
    pub fn new(grave: Grave) -> Self {
        Self { assembler: Assembler::default(), grave, began: None }
    }

    /// When the message in progress began, if there is one.
    pub fn began(&self) -> Option<Instant> {
        self.began
    }

    /// Reads until a message is complete or nothing is there. Never waits.
    pub fn receive(&mut self, socket: impl AsFd, now: Instant) -> Result<Progress, ReceiveError> {
        loop {
            let (len, descriptors) = match read(&socket, self.assembler.space(), &self.grave) {
                Ok(read) => read,
                Err(ReceiveError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Progress::Pending);
                }
                Err(e) => return Err(e),
            };
            if len == 0 {
                return Ok(Progress::End(self.assembler.in_progress()));
            }
            let message = self.assembler.advance(len, descriptors)?;
            if let Some(message) = message {
                self.began = None;
                return Ok(Progress::Message(message));
            }
            self.began.get_or_insert(now);
        }
    }
}

/// One recvmsg.
fn read(socket: impl AsFd, space: &mut [u8], grave: &Grave) -> Result<(usize, Vec<Received>), ReceiveError> {
    let mut control = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut control);
    let mut space = [IoSliceMut::new(space)];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let read = loop {
        match recvmsg(&socket, &mut space, &mut control, flags) {
            Err(Errno::INTR) => {}
            other => break other.map_err(io::Error::from)?,
        }
    };
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds.map(|fd: OwnedFd| grave.receive(fd)));
        }
    }
    if read.flags.contains(ReturnFlags::CTRUNC) {
        return Err(ReceiveError::DescriptorPressure);
    }
    Ok((read.bytes, descriptors))
}
