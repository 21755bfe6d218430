#![no_main]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;

use fuzz::Input;
use fuzz::support::{NEED_REPLY, PLAIN, Recorder, event, memfd};
use libfuzzer_sys::fuzz_target;
use vhost_user::Device;
use vhost_user::descriptor::Grave;
use vhost_user::receive::Assembler;
use vhost_user::session::Session;

/// One descriptor of each kind, to be duplicated.
static STOCK: LazyLock<[OwnedFd; 4]> = LazyLock::new(|| {
    let null = std::fs::File::open("/dev/null").expect("there is always /dev/null");
    [event(), memfd(4 << 20), null.into(), UnixStream::pair().expect("a socket pair").0.into()]
});

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc is mounted").count()
}

struct Peer {
    device: Recorder,
    grave: Grave,
    assembler: Assembler,
    session: Option<Session>,
    replies: Vec<u8>,
}

impl Peer {
    /// A record: id, flags, descriptors, payload length, payload.
    fn send(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let id = u32::from(input.byte());
        let flags = match input.byte() {
            0 => PLAIN,
            1 => NEED_REPLY,
            other => u32::from(other),
        };
        let about = input.byte();
        let len = usize::from(input.byte());
        let payload = input.bytes(len);
        let size = if about & 0x80 == 0 { payload.len() as u32 } else { u32::from(input.word()) << 8 };
        let bytes: Vec<u8> =
            [id, flags, size].iter().flat_map(|word| word.to_ne_bytes()).chain(payload).collect();
        let kind = &STOCK[usize::from(about >> 3 & 3)];
        let copies = (0..about & 7).map(|_| kind.try_clone().expect("there are descriptors left"));
        let mut descriptors: Vec<_> = copies.map(|fd| self.grave.receive(fd)).collect();
        let piece = if about & 0x40 == 0 { usize::MAX } else { 1 };
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let space = self.assembler.space();
            let len = space.len().min(rest.len()).min(piece);
            space[..len].copy_from_slice(&rest[..len]);
            rest = &rest[len..];
            // With the header, or with what comes next.
            let late = about & 0x20 != 0 && rest.len() + len == bytes.len();
            let with = if late { Vec::new() } else { std::mem::take(&mut descriptors) };
            if let Some(message) = self.assembler.advance(len, with).map_err(|e| e.to_string())? {
                self.handle(message)?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, message: vhost_user::message::Message) -> Result<(), String> {
        let device = &mut self.device;
        let session = self.session.get_or_insert_with(|| Session::new(device.offer()));
        let before = self.replies.len();
        let refused = session.handle(device, message, &mut self.replies).map_err(|e| e.to_string())?;
        assert!(refused.is_none() || self.replies.len() == before + 20, "a refusal is answered, once");
        session.config_changed();
        drop((session.take_old_memory(), session.rings(), session.take_trouble()));
        Ok(())
    }

    fn end(&mut self) {
        self.assembler = Assembler::default();
        self.replies.clear();
        if let Some(session) = self.session.take() {
            drop(session.close(&mut self.device));
        }
        assert!(self.device.notes().running.is_empty());
        drop(self.grave.take());
    }
}

fuzz_target!(|bytes: &[u8]| {
    LazyLock::force(&STOCK);
    let before = open_descriptors();
    let mut input = Input(bytes);
    let mut peer = Peer {
        device: Recorder::with_queue_pairs(4),
        grave: Grave::new(),
        assembler: Assembler::default(),
        session: None,
        replies: Vec::new(),
    };
    while !input.is_empty() {
        if peer.send(&mut input).is_err() {
            peer.end();
        }
    }
    peer.end();
    drop(peer);
    assert_eq!(open_descriptors(), before, "descriptors are back at base");
});
