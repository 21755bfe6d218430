#![no_main]

use fuzz::Input;
use libfuzzer_sys::fuzz_target;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user::message::{Config, PAYLOAD_MAX, Request};
use vhost_user::receive::Assembler;

/// What becomes of the bytes when they come in pieces of at most `piece`.
fn messages(bytes: &[u8], piece: usize, active: VhostUserProtocolFeatures) -> Vec<String> {
    let (mut assembler, mut found, mut rest) = (Assembler::default(), Vec::new(), bytes);
    while !rest.is_empty() {
        let space = assembler.space();
        assert!(!space.is_empty() && space.len() <= PAYLOAD_MAX);
        let len = space.len().min(rest.len()).min(piece);
        space[..len].copy_from_slice(&rest[..len]);
        rest = &rest[len..];
        match assembler.advance(len, Vec::new()) {
            Ok(None) => assert!(assembler.in_progress()),
            Ok(Some(message)) => {
                assert!(!assembler.in_progress());
                assert_eq!(message.payload.len(), message.header.size as usize);
                let header = [message.header.request, message.header.flags, message.header.size];
                let request = message.decode(active);
                if let Ok(Request::GetConfig(config) | Request::SetConfig(config)) = &request {
                    check_range(config);
                }
                found.push(format!("{header:?} {request:?}"));
            }
            Err(violation) => {
                found.push(format!("{violation}"));
                return found;
            }
        }
    }
    found
}

fn check_range(config: &Config) {
    if let Some(range) = config.range() {
        assert!(range.end <= 256 && range.len() == config.data.len());
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let piece = 1 + usize::from(input.byte());
    let active = VhostUserProtocolFeatures::from_bits_retain(u64::MAX >> (input.byte() % 64));
    let whole = messages(input.0, usize::MAX, active);
    assert_eq!(messages(input.0, piece, active), whole);
});
