#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::{Claims, Ethernet, Ip, Offloads, VnetHeader, checksum, flow_hash, segment};

fuzz_target!(|bytes: &[u8]| {
    let Some((header, frame)) = bytes.split_first_chunk() else { return };
    let header = VnetHeader::from_bytes(header);
    let prefix = &frame[..frame.len().min(116)];
    flow_hash(prefix);
    if let Some(view) = Ethernet::checked(prefix) {
        assert!(view.payload_offset() <= prefix.len());
    }
    if let Ok(ip) = Ip::parse(prefix, frame.len()) {
        assert!(ip.l3 < ip.l4 && ip.l4 <= ip.end && ip.end <= frame.len());
    }
    if let Ok(claims) = Claims::of(prefix, frame.len()) {
        assert_eq!(Ok(claims), Claims::of(frame, frame.len()));
    }
    // Unchecked headers do no harm either.
    let _ = segment(frame, &header, true, |_, _, _| ());
    let _ = checksum::complete(&mut frame.to_vec(), &header);

    for allowed in [Offloads::ALL, Offloads::CSUM, Offloads::NONE] {
        let Ok(checked) = header.check(frame.len(), prefix, allowed) else { continue };
        assert!(allowed.contains(checked.needs()));
        assert_eq!(checked.check(frame.len(), prefix, allowed), Ok(checked), "once is enough");
        assert!(checked.flags <= 1 && checked.num_buffers == 1);
        assert!(usize::from(checked.hdr_len) <= frame.len());
        if checked.is_gso() { check_segments(frame, &checked) } else { check_complete(frame, &checked) }
    }
});

/// The payloads of the segments are the frame's, each with a head of the same length.
fn check_segments(frame: &[u8], header: &VnetHeader) {
    for with_checksum in [true, false] {
        let mut payloads = Vec::new();
        let mut count = 0;
        let cut = segment(frame, header, with_checksum, |segment_header, head, payload| {
            assert_eq!(head.len(), usize::from(header.hdr_len));
            assert!(!payload.is_empty() && payload.len() <= usize::from(header.gso_size));
            assert_eq!(segment_header.is_plain(), with_checksum);
            assert!(!segment_header.is_gso());
            payloads.extend_from_slice(payload);
            count += 1;
        });
        if let Ok(segments) = cut {
            assert_eq!(segments, count);
            assert!(payloads == frame[usize::from(header.hdr_len)..]);
        }
    }
}

/// Only the checksum changes, and then the sum over what it covers is right.
fn check_complete(frame: &[u8], header: &VnetHeader) {
    let mut done = frame.to_vec();
    checksum::complete(&mut done, header).expect("what passed the check can be completed");
    if !header.needs_csum() {
        assert!(done == frame);
        return;
    }
    let start = usize::from(header.csum_start);
    let field = start + usize::from(header.csum_offset);
    assert!(done[..field] == frame[..field] && done[field + 2..] == frame[field + 2..]);
}
