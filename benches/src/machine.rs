//! What the figures were measured on.

use serde::Serialize;

/// The machine, as far as it explains figures.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Model of the first processor.
    pub processor: String,
    /// How many there are.
    pub processors: usize,
    /// Release of the kernel.
    pub kernel: String,
    /// Whether DPDK and OVS run in huge pages. Light front ends take them whenever they get any.
    pub huge_pages: bool,
}

/// Huge pages of 2 MiB that three DPDK programs and light front ends need together.
const HUGE_PAGES: usize = 450;

impl Machine {
    /// This one, as it is now.
    pub fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split(':').nth(1)).unwrap_or_default().trim().to_owned()
        };
        let memory = read("/proc/meminfo");
        let free: usize = field(&memory, "HugePages_Free").parse().unwrap_or(0);
        Self {
            processor: field(&read("/proc/cpuinfo"), "model name"),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            huge_pages: free >= HUGE_PAGES && field(&memory, "Hugepagesize") == "2048 kB",
        }
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} x {}, Linux {}; ", self.processors, self.processor, self.kernel)?;
        if self.huge_pages {
            write!(f, "DPDK and OVS in huge pages")
        } else {
            write!(f, "DPDK and OVS without huge pages, which slows them down by a tenth or more: ")?;
            write!(f, "sysctl vm.nr_hugepages=512")
        }
    }
}
