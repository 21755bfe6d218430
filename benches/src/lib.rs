//! What the benches share: back ends to hold against each other, light front ends with their traffic, and figures.
//!
//! Every back end is a process of its own, pinned to [`BACKEND_CPU`]; the front ends run on [`FRONTEND_CPU`]. A light front
//! end gives used buffers back without looking at them, so the rate is the back end's, as long as that is not faster than
//! about 100 million frames a second.
#![forbid(unsafe_code)]

pub mod backend;
pub mod figures;
mod limit;
pub mod machine;
pub mod plot;
pub mod side;
pub mod traffic;
pub mod watch;

/// Where the back end forwards.
pub const BACKEND_CPU: usize = 0;
/// Where front ends (and a peer's own control thread) run.
pub const FRONTEND_CPU: usize = 1;

/// Pins this thread.
pub fn pin(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    // On a machine with one core everything shares it, and the figures say so by themselves.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}
