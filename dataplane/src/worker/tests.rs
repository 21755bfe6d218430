//! A worker alone, without a dataplane around it.

use std::sync::mpsc;

use super::*;

/// For what takes microseconds, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The command is there before the worker first looks: nobody wakes it afterwards.
#[test]
fn a_worker_that_was_told_to_stop_does_not_sleep() {
    let shared = Arc::new(WorkerShared::new(0, None).unwrap());
    shared.send(Command::Stop);
    let events = Arc::new(Events { sink: Box::new(|_| ()) });
    let worker = Worker::new(shared, Poll::Adaptive, Duration::from_secs(300), now(), events);
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || {
        worker.run();
        ended.send(()).unwrap();
    });
    end.recv_timeout(PATIENCE).expect("it ends");
}
