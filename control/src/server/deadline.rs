//! A stream that does not wait for ever: for the rest of a request, for the next one, or for a reader that stopped.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::{Instant, Sleep, sleep_until};

/// From the first byte of a request's head to its last.
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Between two requests, or two pieces of a stream of events.
const IDLE_TIME: Duration = Duration::from_secs(300);
/// For the caller to take some of an answer.
const WRITE_TIME: Duration = Duration::from_secs(5);

const IDLE: u8 = 0;
const HEAD: u8 = 1;
const ANSWERING: u8 = 2;

/// Where a connection stands; shared between its stream and its service.
///
/// ```text
/// idle → (a byte) head → (request complete) answering → (answer begun) idle
/// ```
#[derive(Default)]
pub(super) struct Deadlines(AtomicU8);

impl Deadlines {
    /// A request is complete but for its body; whoever reads that has a deadline of its own.
    pub(super) fn answering(&self) {
        self.0.store(ANSWERING, Ordering::Relaxed);
    }

    /// The answer has begun.
    pub(super) fn answered(&self) {
        self.0.store(IDLE, Ordering::Relaxed);
    }
}

pub(super) struct Patient {
    stream: UnixStream,
    deadlines: Arc<Deadlines>,
    read_by: Pin<Box<Sleep>>,
    /// State that `read_by` was set for.
    read_state: u8,
    write_by: Pin<Box<Sleep>>,
    writing: bool,
}

impl Patient {
    pub(super) fn new(stream: UnixStream, deadlines: Arc<Deadlines>) -> Self {
        let idle = Instant::now() + IDLE_TIME;
        Self {
            stream,
            deadlines,
            read_by: Box::pin(sleep_until(idle)),
            read_state: IDLE,
            write_by: Box::pin(sleep_until(idle)),
            writing: false,
        }
    }

    fn enter(&mut self, state: u8) {
        self.read_state = state;
        let time = if state == HEAD { HEAD_TIME } else { IDLE_TIME };
        self.read_by.as_mut().reset(Instant::now() + time);
    }

    /// What a write came to, and whether the caller has been idle in taking it for too long.
    fn written(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if result.is_ready() {
            self.writing = false;
            self.enter(self.read_state);
            return result;
        }
        if !self.writing {
            self.writing = true;
            self.write_by.as_mut().reset(Instant::now() + WRITE_TIME);
        }
        ready!(self.write_by.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the caller does not read its answer")))
    }
}

impl AsyncRead for Patient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let state = self.deadlines.0.load(Ordering::Relaxed);
        if state != self.read_state {
            self.enter(state);
        }
        if let Poll::Ready(result) = Pin::new(&mut self.stream).poll_read(cx, buf) {
            if state == IDLE {
                self.deadlines.0.store(HEAD, Ordering::Relaxed);
                self.enter(HEAD);
            }
            return Poll::Ready(result);
        }
        if state == ANSWERING {
            return Poll::Pending;
        }
        ready!(self.read_by.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the caller does not finish its request")))
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn pair() -> (Patient, UnixStream, Arc<Deadlines>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let deadlines = Arc::new(Deadlines::default());
        (Patient::new(ours, deadlines.clone()), theirs, deadlines)
    }

    // Time stands still until every task waits, then jumps to the next timer.
    #[tokio::test(start_paused = true)]
    async fn a_request_that_never_ends_is_given_up() {
        let (mut patient, mut caller, _) = pair();
        let begun = Instant::now();
        caller.write_all(b"G").await.unwrap();
        let mut byte = [0];
        patient.read_exact(&mut byte).await.unwrap();
        let error = patient.read_exact(&mut byte).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!((HEAD_TIME..HEAD_TIME * 2).contains(&begun.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_caller_is_given_longer() {
        let (mut patient, _caller, deadlines) = pair();
        deadlines.answered();
        let begun = Instant::now();
        assert_eq!(patient.read_exact(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= IDLE_TIME);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_reads_nothing_is_given_up() {
        let (mut patient, _caller, deadlines) = pair();
        deadlines.answering();
        let error = patient.write_all(&vec![0; 8 << 20]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
