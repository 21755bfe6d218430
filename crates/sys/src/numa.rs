//! Which NUMA node a processor or a page of memory belongs to.

use std::ffi::{c_int, c_void};

/// The node of a processor, as sysfs has it.
#[must_use]
pub fn node_of_cpu(cpu: usize) -> Option<u32> {
    let entries = std::fs::read_dir(format!("/sys/devices/system/cpu/cpu{cpu}")).ok()?;
    entries.flatten().find_map(|entry| entry.file_name().to_str()?.strip_prefix("node")?.parse().ok())
}

/// The node of the page at `address` of this process. `None` if there is no page, because nobody has touched it yet, or
/// if the kernel does not tell (it is built without NUMA, or a filter of system calls forbids the question).
#[must_use]
pub fn node_of_page(address: *const u8) -> Option<u32> {
    let page = address.map_addr(|address| address & !(rustix::param::page_size() - 1));
    let (pages, mut status): ([*const c_void; 1], c_int) = ([page.cast()], -1);
    // SAFETY: move_pages(2) without nodes to move to moves nothing. For this process (0) it reads one address, which it
    // looks up and does not follow, and writes one status; there is room for both.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            1_usize,
            pages.as_ptr(),
            std::ptr::null::<c_int>(),
            &raw mut status,
            0,
        )
    };
    // A status below 0 is an error, such as that there is no page.
    u32::try_from(status).ok().filter(|_| done == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_a_node_of_the_machine_once_they_are_touched() {
        let memory = vec![1u8; 8192];
        // Not every kernel tells.
        if let Some(node) = node_of_page(memory.as_ptr()) {
            assert!(std::path::Path::new(&format!("/sys/devices/system/node/node{node}")).exists());
        }
        assert_eq!(node_of_page(std::ptr::null()), None);
        assert_eq!(node_of_page(std::ptr::without_provenance(usize::MAX)), None);
    }

    #[test]
    fn processors_that_are_not_there_have_no_node() {
        assert_eq!(node_of_cpu(usize::MAX), None);
        let node = node_of_cpu(0);
        assert_eq!(node.is_some(), std::path::Path::new("/sys/devices/system/node/node0").exists());
    }
}
