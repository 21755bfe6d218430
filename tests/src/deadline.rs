//! Waiting for a condition, never for a time.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Between two looks at a condition.
const INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `condition` holds; the error names `what` was waited for.
pub fn wait_for(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    wait_for_some(what, timeout, || Ok(condition().then_some(())))
}

/// Waits until `condition` gives something. An error from it ends the wait at once: what is waited for cannot come any more.
pub fn wait_for_some<T>(
    what: &str,
    timeout: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        // Asked before the clock is read, so a slow machine gets at least one look after the deadline.
        let late = start.elapsed() >= timeout;
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if late {
            bail!("waited {timeout:?} for {what}");
        }
        sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_comes_true_ends_the_wait() {
        let mut looks = 0;
        let count = wait_for_some("three looks", Duration::from_secs(5), || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(count.unwrap(), 3);
    }

    #[test]
    fn a_deadline_names_what_did_not_come() {
        let error = wait_for("rain", Duration::from_millis(10), || false).unwrap_err();
        assert_eq!(error.to_string(), "waited 10ms for rain");
    }

    #[test]
    fn a_failed_condition_ends_the_wait() {
        let start = Instant::now();
        let never: Result<()> = wait_for_some("the dead", Duration::from_secs(60), || bail!("it died"));
        assert_eq!(never.unwrap_err().to_string(), "it died");
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
