//! How a worker gets its commands, though it sleeps when there is nothing to do.
//!
//! ```text
//! sender   push · store mail       · fence · load asleep ──► wake it, or not
//! worker   store asleep            · fence · load mail   ──► wait, or not
//! ```
//!
//! The fences are full ones, so of the two loads at least one sees the other side's store: a worker that waits was seen
//! asleep by whoever sent after it looked.

#[cfg(all(test, loom))]
use loom::sync::{Mutex, MutexGuard, atomic};
use std::sync::PoisonError;
#[cfg(not(all(test, loom)))]
use std::sync::{Mutex, MutexGuard, atomic};

use atomic::{AtomicBool, Ordering, fence};

/// Commands for one worker.
pub(super) struct Mailbox<T> {
    inbox: Mutex<Vec<T>>,
    /// There is something in `inbox`.
    mail: AtomicBool,
    /// The worker waits, or is about to.
    asleep: AtomicBool,
}

impl<T> Mailbox<T> {
    pub(super) fn new() -> Self {
        Self { inbox: Mutex::new(Vec::new()), mail: AtomicBool::new(false), asleep: AtomicBool::new(false) }
    }

    fn inbox(&self) -> MutexGuard<'_, Vec<T>> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sender: true if the worker must be woken.
    #[must_use]
    pub(super) fn put(&self, command: T) -> bool {
        self.inbox().push(command);
        self.mail.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed)
    }

    /// Whether there is something to take: one load, for every turn.
    #[inline]
    pub(super) fn has_mail(&self) -> bool {
        self.mail.load(Ordering::Acquire)
    }

    /// Worker: takes all there is. What comes meanwhile is taken too, or is mail again.
    pub(super) fn take(&self) -> Vec<T> {
        self.mail.store(false, Ordering::Relaxed);
        std::mem::take(&mut *self.inbox())
    }

    /// Worker: is about to wait. False if it must not, because there is mail.
    #[must_use]
    pub(super) fn lie_down(&self) -> bool {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !self.has_mail()
    }

    /// Worker: does not wait any more.
    pub(super) fn get_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Whether the worker waits, or is about to.
    pub(super) fn is_asleep(&self) -> bool {
        self.asleep.load(Ordering::Relaxed)
    }
}

#[cfg(all(test, loom))]
mod models {
    use loom::sync::Notify;
    use loom::thread;

    use super::Mailbox;

    #[derive(Clone, Copy, PartialEq)]
    enum Broken {
        Nothing,
        /// The sender looks whether the worker is asleep, and puts the command afterwards.
        Sender,
        /// The worker looks for mail, and lies down afterwards.
        Worker,
    }

    const COMMANDS: usize = 2;

    /// Every order in which a sender and a worker can run: all commands are taken. A worker that is never woken is reported
    /// as a deadlock.
    fn check(broken: Broken) {
        loom::model(move || {
            // Leaked: the checker's objects cannot be dropped while it unwinds from what it found.
            let mailbox: &Mailbox<usize> = Box::leak(Box::new(Mailbox::new()));
            let wake: &Notify = Box::leak(Box::new(Notify::new()));
            let sender = thread::spawn(move || (0..COMMANDS).for_each(|i| send(mailbox, wake, i, broken)));
            let mut commands = Vec::new();
            while commands.len() < COMMANDS {
                let looked_before = broken == Broken::Worker && !mailbox.has_mail();
                let may_wait = mailbox.lie_down();
                if if broken == Broken::Worker { looked_before } else { may_wait } {
                    wake.wait();
                }
                mailbox.get_up();
                if mailbox.has_mail() {
                    commands.append(&mut mailbox.take());
                }
            }
            sender.join().unwrap();
            assert_eq!(commands, [0, 1]);
        });
    }

    fn send(mailbox: &Mailbox<usize>, wake: &Notify, command: usize, broken: Broken) {
        let asleep_before = broken == Broken::Sender && mailbox.is_asleep();
        let asleep = mailbox.put(command);
        if if broken == Broken::Sender { asleep_before } else { asleep } {
            wake.notify();
        }
    }

    #[test]
    fn every_command_is_taken() {
        check(Broken::Nothing);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn the_sender_looks_after_it_put() {
        check(Broken::Sender);
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn the_worker_looks_after_it_lay_down() {
        check(Broken::Worker);
    }
}
