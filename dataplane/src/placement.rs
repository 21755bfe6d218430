//! Which worker polls which queue.
//!
//! Queues are dealt out to workers in turn when ports are made, before anybody knows their load. Later, two [`Sample`]s some
//! time apart tell how busy each worker was, and how many of its frames came from each queue; [`propose`] then moves
//! queues from the busiest worker to the idlest, as long as that makes the two less unequal. A queue's share of its
//! worker's time is taken to be its share of the frames: good enough to decide, and nothing has to be measured frame by
//! frame.
//!
//! A move costs nothing but a cold cache: the ring is its own whole truth, and stands behind a lock that is held for a
//! burst, so the next burst is simply somebody else's.

use crate::report::PortId;

/// Workers whose busy shares differ by less are left alone: moving queues to and fro costs more than it gains.
const UNEVEN: f64 = 0.2;
/// Moves proposed at once.
const MOVES_MAX: usize = 16;

/// How far workers and queues were at one moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// TSC.
    pub(crate) cycles: u64,
    /// Busy TSC cycles of each worker since it started.
    pub(crate) busy: Vec<u64>,
    pub(crate) queues: Vec<QueueSample>,
}

/// One queue in a [`Sample`].
#[derive(Clone, Debug)]
pub(crate) struct QueueSample {
    pub(crate) port: PortId,
    pub(crate) name: String,
    pub(crate) queue: u16,
    pub(crate) worker: usize,
    /// Frames that came from it, since it started.
    pub(crate) frames: u64,
    /// Queues of a TAP stay where they are.
    pub(crate) movable: bool,
}

/// A queue that should be polled by another worker.
#[derive(Clone, Debug, PartialEq)]
pub struct Move {
    /// The port.
    pub port: PortId,
    /// Its name.
    pub port_name: String,
    /// Its queue pair.
    pub queue: u16,
    /// The worker that polls it.
    pub from: usize,
    /// The one that should.
    pub to: usize,
    /// Share of a worker's time that goes with it, 0 to 1.
    pub share: f64,
}

/// A queue and what it takes of its worker's time.
struct Load<'a> {
    queue: &'a QueueSample,
    worker: usize,
    share: f64,
}

/// Moves that make the workers' load more equal, judged by what happened between two samples.
pub fn propose(before: &Sample, after: &Sample) -> Vec<Move> {
    let mut busy = busy_shares(before, after);
    let mut loads = loads(before, after, &busy);
    let mut moves: Vec<Move> = Vec::new();
    while moves.len() < MOVES_MAX {
        let order = |a: &usize, b: &usize| busy[*a].total_cmp(&busy[*b]);
        let (Some(from), Some(to)) = ((0..busy.len()).max_by(order), (0..busy.len()).min_by(order)) else {
            break;
        };
        let gap = busy[from] - busy[to];
        // What is left of the gap if this queue moves.
        let rest = |load: &Load<'_>| (gap - 2.0 * load.share).abs();
        let movable = |load: &&mut Load<'_>| load.worker == from && load.queue.movable && load.share > 0.0;
        let best = loads.iter_mut().filter(movable).min_by(|a, b| rest(a).total_cmp(&rest(b)));
        let Some(load) = best.filter(|load| rest(load) <= gap - UNEVEN) else { break };
        busy[from] -= load.share;
        busy[to] += load.share;
        load.worker = to;
        let QueueSample { port, name, queue, .. } = load.queue;
        // One that moved already goes straight to where it ends.
        moves.retain(|earlier| (earlier.port, earlier.queue) != (*port, *queue));
        let (port_name, from) = (name.clone(), load.queue.worker);
        if from != to {
            moves.push(Move { port: *port, port_name, queue: *queue, from, to, share: load.share });
        }
    }
    moves
}

/// The share of the time that each worker was busy.
fn busy_shares(before: &Sample, after: &Sample) -> Vec<f64> {
    let elapsed = after.cycles.saturating_sub(before.cycles);
    let busy = after.busy.iter().zip(&before.busy).map(|(after, before)| after.saturating_sub(*before));
    busy.map(|busy| ratio(busy, elapsed).min(1.0)).collect()
}

fn loads<'a>(before: &Sample, after: &'a Sample, busy: &[f64]) -> Vec<Load<'a>> {
    let earlier = |queue: &QueueSample| {
        let same = before.queues.iter().find(|b| (b.port, b.queue) == (queue.port, queue.queue));
        same.map_or(0, |b| b.frames)
    };
    let frames: Vec<u64> = after.queues.iter().map(|q| q.frames.saturating_sub(earlier(q))).collect();
    let mut totals = vec![0u64; busy.len()];
    for (queue, frames) in after.queues.iter().zip(&frames) {
        if let Some(total) = totals.get_mut(queue.worker) {
            *total = total.saturating_add(*frames);
        }
    }
    let share = |(queue, frames): (&'a QueueSample, &u64)| {
        let worker = queue.worker;
        let share = ratio(*frames, *totals.get(worker)?) * busy.get(worker)?;
        Some(Load { queue, worker, share })
    };
    after.queues.iter().zip(&frames).filter_map(share).collect()
}

#[allow(clippy::cast_precision_loss)]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Queues as (worker, frames); a worker is busy for as many cycles as its queues have frames.
    fn sample(workers: usize, cycles: u64, queues: &[(usize, u64)]) -> Sample {
        let mut busy = vec![0; workers];
        queues.iter().for_each(|(worker, frames)| busy[*worker] += frames);
        let queue = |(n, (worker, frames)): (u16, &(usize, u64))| QueueSample {
            port: PortId(n.into()),
            name: format!("port{n}"),
            queue: 0,
            worker: *worker,
            frames: *frames,
            movable: true,
        };
        Sample { cycles, busy, queues: (0u16..).zip(queues).map(queue).collect() }
    }

    fn before(workers: usize) -> Sample {
        Sample { cycles: 0, busy: vec![0; workers], queues: Vec::new() }
    }

    #[test]
    fn two_busy_queues_of_one_worker_are_parted() {
        let after = sample(2, 100, &[(0, 45), (0, 45), (1, 0)]);
        let moves = propose(&before(2), &after);
        assert_eq!(moves.len(), 1, "{moves:?}");
        assert_eq!((moves[0].from, moves[0].to), (0, 1));
        assert!((moves[0].share - 0.45).abs() < 1e-9);
    }

    #[test]
    fn what_cannot_get_better_stays() {
        for queues in [&[(0, 90), (1, 0)][..], &[(0, 50), (1, 45)], &[(0, 0), (0, 0)], &[]] {
            assert_eq!(propose(&before(2), &sample(2, 100, queues)), [], "{queues:?}");
        }
        assert_eq!(propose(&before(1), &sample(1, 100, &[(0, 50), (0, 50)])), []);
    }

    #[test]
    fn queues_of_a_tap_stay() {
        let mut after = sample(2, 100, &[(0, 45), (0, 45)]);
        after.queues.iter_mut().for_each(|queue| queue.movable = false);
        assert_eq!(propose(&before(2), &after), []);
    }

    proptest! {
        /// No move makes the busiest worker busier, and all of them together make a difference that is worth it.
        #[test]
        fn the_busiest_worker_gets_less(
            queues in prop::collection::vec((0usize..4, 0u64..40), 0..24),
        ) {
            let after = sample(4, 200, &queues);
            let busy = |at: &dyn Fn(usize) -> usize| {
                let mut busy = [0u64; 4];
                queues.iter().enumerate().for_each(|(n, (_, frames))| busy[at(n)] += frames);
                *busy.iter().max().unwrap()
            };
            let was = busy(&|n| queues[n].0);
            let moves = propose(&before(4), &after);
            let place = |n: usize| {
                let moved = moves.iter().find(|m| m.port == PortId(u32::try_from(n).unwrap()));
                moved.map_or(queues[n].0, |m| m.to)
            };
            prop_assert!(moves.iter().all(|m| m.from != m.to && m.share > 0.0));
            let is = busy(&place);
            if was <= 200 {
                prop_assert!(is <= was, "{was} to {is}: {moves:?}");
            }
        }
    }
}
