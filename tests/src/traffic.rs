//! What guests send each other: pings, whose answers are counted, and TCP streams, whose rate is.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::deadline::wait_for_some;
use crate::qemu::{Guest, Job};

/// For a few answers, or the end of a stream beyond its duration.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What busybox's ping printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pings {
    /// Requests.
    pub sent: usize,
    /// Answers.
    pub received: usize,
    /// Unanswered requests between the first answer and the last.
    pub lost: usize,
    /// Longest run of them.
    pub gap: usize,
    /// "min/avg/max = ... ms"
    times: String,
}

impl Pings {
    /// Reads the output of a ping that has ended.
    pub fn parse(text: &str) -> Result<Self> {
        let summary =
            text.lines().find(|line| line.contains("packets transmitted")).context("no end of a ping")?;
        let sent = summary.split(' ').next().unwrap_or_default().parse()?;
        let mut sequences = sequences(text).collect::<Vec<usize>>();
        sequences.sort_unstable();
        let gaps = || sequences.windows(2).map(|pair| (pair[1] - pair[0]).saturating_sub(1));
        let (lost, gap) = (gaps().sum(), gaps().max().unwrap_or(0));
        let times = text.lines().find_map(|line| line.strip_prefix("round-trip ")).unwrap_or("no answer");
        Ok(Self { sent, received: sequences.len(), lost, gap, times: times.into() })
    }
}

impl fmt::Display for Pings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} answered, {}", self.received, self.sent, self.times)
    }
}

/// Pings from a guest, which go on until [`stop`](Self::stop).
#[derive(Debug)]
pub struct PingStream {
    job: Job,
    interval: Duration,
}

impl PingStream {
    /// Starts it and waits until it is answered.
    pub fn start(guest: &Guest, to: &str, interval: Duration) -> Result<Self> {
        let job = guest.spawn(&format!("ping -i {} {to}", interval.as_secs_f32()))?;
        let stream = Self { job, interval };
        stream.wait_for_more(50)?;
        Ok(stream)
    }

    /// Waits for so many more answers.
    pub fn wait_for_more(&self, count: usize) -> Result<()> {
        let wanted = self.answers()? + count;
        wait_for_some(&format!("{wanted} answers to pings"), TIMEOUT, || {
            Ok((self.answers()? >= wanted).then_some(()))
        })
    }

    /// Ends it: what it saw, and the longest time without an answer.
    pub fn stop(self) -> Result<(Pings, Duration)> {
        self.job.signal("INT", TIMEOUT)?;
        let pings = Pings::parse(&self.job.wait(TIMEOUT)?.stdout)?;
        let gap = self.interval * u32::try_from(pings.gap)?;
        Ok((pings, gap))
    }

    fn answers(&self) -> Result<usize> {
        Ok(sequences(&self.job.output(TIMEOUT)?).count())
    }
}

/// Sequence numbers of the answers.
fn sequences(text: &str) -> impl Iterator<Item = usize> {
    text.lines().filter_map(|line| line.split_once(" seq=")?.1.split(' ').next()?.parse().ok())
}

/// A TCP stream from a guest (with `--reverse`, to it).
#[derive(Debug)]
pub struct TcpStream {
    job: Job,
    seconds: u32,
}

impl TcpStream {
    /// Starts it; the server may need a moment to listen, or for the end of another stream, which some versions call success.
    pub fn start(guest: &Guest, to: &str, seconds: u32, options: &str) -> Result<Self> {
        let client = format!("result=$(iperf3 --json --client {to} --time {seconds} {options})");
        let is_done = "case $result in *sum_received*) printf '%s' \"$result\"; exit ;; esac";
        let tries = format!("for try in 1 2 3 4 5 6 7 8 9 10; do {client}; {is_done}; sleep 0.2; done");
        let none = "printf '%s' \"$result\"; exit 1";
        Ok(Self { job: guest.spawn(&format!("{tries}; {none}"))?, seconds })
    }

    /// Waits for its end: what the receiver got, Gbit/s.
    pub fn rate(&self) -> Result<f64> {
        let output = self.job.wait(Duration::from_secs(u64::from(self.seconds)) + TIMEOUT)?;
        ensure!(output.status == 0, "iperf3: {}", output.stdout);
        let result: Value = serde_json::from_str(&output.stdout).context("iperf3's result")?;
        let rate = result["end"]["sum_received"]["bits_per_second"].as_f64();
        Ok(rate.with_context(|| format!("iperf3's result has no rate: {result}"))? / 1e9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pings_are_counted_and_their_gap_found() {
        let text = "PING 10.0.0.1 (10.0.0.1): 56 data bytes
64 bytes from 10.0.0.1: seq=0 ttl=64 time=8.225 ms
64 bytes from 10.0.0.1: seq=1 ttl=64 time=1.275 ms
64 bytes from 10.0.0.1: seq=5 ttl=64 time=8.330 ms
64 bytes from 10.0.0.1: seq=7 ttl=64 time=5.000 ms

--- 10.0.0.1 ping statistics ---
9 packets transmitted, 4 packets received, 55% packet loss
round-trip min/avg/max = 1.275/5.943/8.330 ms
";
        let times = "min/avg/max = 1.275/5.943/8.330 ms".into();
        assert_eq!(Pings::parse(text).unwrap(), Pings { sent: 9, received: 4, lost: 4, gap: 3, times });
        assert!(Pings::parse("PING 10.0.0.1 (10.0.0.1): 56 data bytes\n").is_err());
    }
}
