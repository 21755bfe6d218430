//! What the end-to-end tests stand on: processes that die with the test, network namespaces, QEMU guests and DPDK.
//!
//! Everything here is real. A part starts, says what it waits for and for how long, and is gone when its value is dropped
//! or the test dies, however it dies.
#![forbid(unsafe_code)]

pub mod canary;
pub mod daemon;
pub mod deadline;
pub mod exchange;
pub mod flipper;
pub mod hand;
pub mod inproc;
pub mod kill;
pub mod netns;
pub mod oracle;
pub mod osvif;
pub mod ovn;
pub mod ovs;
pub mod peer;
pub mod process;
pub mod qemu;
pub mod stage;
#[path = "../../crates/hostnet/src/pci/tests/sysfs.rs"]
pub mod sysfs;
pub mod testpmd;
pub mod traffic;
