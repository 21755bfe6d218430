//! Fail points: where a test has the process die.
//!
//! Whatever this process changes outside of itself (a link, a row of a database, a file) passes one first. With [`DIE_AT`] set
//! to N, the process kills itself at the Nth that it passes: what it did before stands, what was to come is not done, and
//! nobody has had time to clear anything away. A test that counts N up until the process lives has been at every step, without
//! a list of them. So the points are where changes of one kind meet, not where somebody makes one.
//!
//! Only builds with debug assertions have them. In others passing one is nothing.

use std::fmt;

/// The environment variable with the number of the point to die at, the first being 1.
pub const DIE_AT: &str = "VHOSTD_DIE_AT";

/// Passes one, before this change.
#[inline]
pub fn pass(change: fmt::Arguments<'_>) {
    #[cfg(debug_assertions)]
    counted::pass(change);
    #[cfg(not(debug_assertions))]
    let _ = change;
}

#[cfg(debug_assertions)]
mod counted {
    use std::env;
    use std::fmt;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    /// Counts one more, and tells which; the process ends with the one that it is to die at.
    pub(super) fn pass(change: fmt::Arguments<'_>) {
        static LAST: OnceLock<Option<u64>> = OnceLock::new();
        static PASSED: AtomicU64 = AtomicU64::new(0);
        let Some(last) = *LAST.get_or_init(|| env::var(super::DIE_AT).ok()?.parse().ok()) else { return };
        let number = PASSED.fetch_add(1, Ordering::Relaxed) + 1;
        eprintln!("change {number}: {change}");
        if number == last {
            // The signal is taken when this call would return to the process, which it does not.
            kill_process(getpid(), Signal::KILL).expect("a process may kill itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};

    use rustix::process::Signal;

    use super::*;

    /// Runs the test below in a process of its own.
    fn passes_three(die_at: &str) -> Output {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "fail_point::tests::three_are_passed", "--nocapture", "--test-threads=1"]);
        command.env(DIE_AT, die_at).output().unwrap()
    }

    #[test]
    fn three_are_passed() {
        for change in ["first", "second", "third"] {
            pass(format_args!("{change}"));
            println!("{change} done");
        }
    }

    #[test]
    fn a_process_dies_at_the_one_that_it_is_told_and_only_there() {
        let killed = passes_three("2");
        let (said, told) = (String::from_utf8_lossy(&killed.stdout), String::from_utf8_lossy(&killed.stderr));
        if cfg!(debug_assertions) {
            assert_eq!(killed.status.signal(), Some(Signal::KILL.as_raw()), "{said}");
            assert!(said.contains("first done") && !said.contains("second done"), "{said}");
            assert!(told.ends_with("change 2: second\n"), "{told}");
        } else {
            assert!(killed.status.success() && said.contains("second done"), "{said}");
        }
        for none in ["4", "0", "", "many"] {
            assert!(passes_three(none).status.success(), "{none}");
        }
    }
}
