//! Which worker polls which queue.
//!
//! Queues are dealt out to workers in turn when ports are made, before anybody knows their load. Later, two [`Sample`]s some
//! time apart tell how busy each worker was, and how many of its frames came from each queue; [`propose`] then moves
//! queues from busy workers to idle ones, as long as that makes the two less unequal. A queue's share of its
//! worker's time is taken to be its share of the frames: good enough to decide, and nothing has to be measured frame by
//! frame.
//!
//! On a machine of several NUMA nodes a worker counts as somewhat busier for a queue whose memory is of another node than
//! the worker's lcore. So a queue goes to its own node when that costs nothing, stays there when loads differ a little,
//! and leaves it when they differ much. Only a guest's memory has a node: that of a front-end port is touched by both sides.
//!
//! A move costs nothing but a cold cache: the ring is its own whole truth, and stands behind a lock that is held for a
//! burst, so the next burst is simply somebody else's.

use crate::report::PortId;

/// A queue moves if its new worker, the queue included, is less busy by this share of the time than the old one was:
/// moving queues to and fro costs more than it gains.
const GAIN_MIN: f64 = 0.1;
/// A worker of another node counts as so much busier. More than [`GAIN_MIN`], so that queues come home.
const FAR: f64 = 0.15;
/// Queues that take less of a worker's time are left alone.
const SHARE_MIN: f64 = 0.01;
/// Moves proposed at once.
const MOVES_MAX: usize = 16;

/// How far workers and queues were at one moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// TSC.
    pub(crate) cycles: u64,
    /// Busy TSC cycles of each worker since it started.
    pub(crate) busy: Vec<u64>,
    /// NUMA node of each worker's lcore, if it is known.
    pub(crate) nodes: Vec<Option<u32>>,
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
    /// NUMA node of its memory, if it is known.
    pub(crate) node: Option<u32>,
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
    for _ in 0..MOVES_MAX {
        let Some((best, to)) = best(&loads, &busy, &after.nodes) else { break };
        let load = &mut loads[best];
        busy[load.worker] -= load.share;
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

/// The load to be moved, and where to, so that two workers become as equal as possible.
fn best(loads: &[Load<'_>], busy: &[f64], nodes: &[Option<u32>]) -> Option<(usize, usize)> {
    let gain = |load: &Load<'_>, to: usize| {
        let cost = |worker: usize| busy[worker] + far(load.queue.node, nodes.get(worker).copied().flatten());
        cost(load.worker) - load.share - cost(to)
    };
    let targets = |(at, load)| (0..busy.len()).map(move |to| (at, to, load));
    let all = loads.iter().enumerate().flat_map(targets).map(|(at, to, load)| (at, to, load, gain(load, to)));
    let worth_it = all.filter(|(_, _, load, gain)| *gain >= GAIN_MIN && load.share >= SHARE_MIN);
    // More than the rest of the gap cannot be gained.
    let gained = |load: &Load<'_>, gain: f64| load.share.min(gain);
    let best = worth_it.max_by(|a, b| gained(a.2, a.3).total_cmp(&gained(b.2, b.3)));
    best.map(|(at, to, ..)| (at, to))
}

/// What it costs that memory and worker are of different nodes.
fn far(memory: Option<u32>, worker: Option<u32>) -> f64 {
    match (memory, worker) {
        (Some(memory), Some(worker)) if memory != worker => FAR,
        _ => 0.0,
    }
}

/// The share of the time that each worker was busy.
fn busy_shares(before: &Sample, after: &Sample) -> Vec<f64> {
    let elapsed = after.cycles.saturating_sub(before.cycles);
    let busy = after.busy.iter().zip(&before.busy).map(|(after, before)| after.saturating_sub(*before));
    busy.map(|busy| ratio(busy, elapsed).min(1.0)).collect()
}

/// Those that can be moved.
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
    after.queues.iter().zip(&frames).filter(|(queue, _)| queue.movable).filter_map(share).collect()
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
        let queues: Vec<_> = queues.iter().map(|(worker, frames)| (*worker, *frames, None)).collect();
        sample_of(&vec![None; workers], cycles, &queues)
    }

    /// The same with the nodes of the workers and, behind each queue, of its memory.
    fn sample_of(nodes: &[Option<u32>], cycles: u64, queues: &[(usize, u64, Option<u32>)]) -> Sample {
        let mut busy = vec![0; nodes.len()];
        queues.iter().for_each(|(worker, frames, _)| busy[*worker] += frames);
        let queue = |(n, (worker, frames, node)): (u16, &(usize, u64, Option<u32>))| QueueSample {
            port: PortId(n.into()),
            name: format!("port{n}"),
            queue: 0,
            worker: *worker,
            frames: *frames,
            movable: true,
            node: *node,
        };
        Sample { cycles, busy, nodes: nodes.into(), queues: (0u16..).zip(queues).map(queue).collect() }
    }

    fn before(workers: usize) -> Sample {
        Sample { cycles: 0, busy: vec![0; workers], nodes: vec![None; workers], queues: Vec::new() }
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

    #[test]
    fn many_queues_with_little_to_do_are_parted() {
        let moves = propose(&before(2), &sample(2, 100, &[(0, 5); 20]));
        assert!((8..=10).contains(&moves.len()), "{moves:?}");
        assert!(moves.iter().all(|m| (m.from, m.to) == (0, 1)));
    }

    /// Where the queue of the first worker goes, with its memory on the node of the second.
    fn goes_home(frames: u64, others: &[(usize, u64, Option<u32>)]) -> bool {
        let queues: Vec<_> = [(0, frames, Some(1))].into_iter().chain(others.iter().copied()).collect();
        let moves = propose(&before(2), &sample_of(&[Some(0), Some(1)], 100, &queues));
        moves.iter().any(|m| (m.port, m.to) == (PortId(0), 1))
    }

    #[test]
    fn a_queue_goes_to_the_node_of_its_memory_unless_that_is_too_busy() {
        assert!(goes_home(60, &[]));
        assert!(goes_home(60, &[(1, 4, Some(1))]));
        assert!(!goes_home(60, &[(1, 6, Some(1))]));
    }

    #[test]
    fn a_queue_leaves_the_node_of_its_memory_only_if_loads_differ_much() {
        let stays = |queues: &[(usize, u64, Option<u32>)]| {
            propose(&before(2), &sample_of(&[Some(0), Some(1)], 100, queues)).is_empty()
        };
        let crowd = |frames| [(0, frames, Some(0)), (0, 20, Some(0)), (1, 0, None)];
        assert!(stays(&crowd(24)) && !stays(&crowd(26)));
        assert!(!stays(&[(0, 24, None), (0, 20, None)]), "memory that nobody knows the node of");
    }

    /// Workers' nodes and queues as in [`sample_of`].
    type Topology = (Vec<Option<u32>>, Vec<(usize, u64, Option<u32>)>);

    fn topology() -> impl Strategy<Value = Topology> {
        let node = || prop::option::of(0u32..3);
        let queues = prop::collection::vec((0usize..4, 0u64..40, node()), 0..24);
        (prop::collection::vec(node(), 4), queues)
    }

    /// A prime, so that no share is exactly at a limit.
    const TIME: u64 = 1009;

    proptest! {
        /// Carried out, the moves leave nothing to propose, and make the load, distances included, more equal.
        #[test]
        fn what_is_proposed_is_enough((nodes, mut queues) in topology()) {
            let unequal = |queues: &[(usize, u64, Option<u32>)]| {
                let sample = sample_of(&nodes, TIME, queues);
                let squares: f64 = sample.busy.iter().map(|busy| ratio(*busy, TIME).powi(2)).sum();
                let away = |q: &QueueSample| 2.0 * ratio(q.frames, TIME) * far(q.node, nodes[q.worker]);
                squares + sample.queues.iter().map(away).sum::<f64>()
            };
            let was = unequal(&queues);
            let moves = propose(&before(4), &sample_of(&nodes, TIME, &queues));
            for m in &moves {
                prop_assert!(m.from != m.to && m.share > 0.0);
                queues[m.port.0 as usize].0 = m.to;
            }
            prop_assert!(moves.is_empty() || unequal(&queues) < was, "{moves:?}");
            let more = propose(&before(4), &sample_of(&nodes, TIME, &queues));
            prop_assert!(more.is_empty() || moves.len() >= MOVES_MAX / 2, "{moves:?} and then {more:?}");
        }

        /// One node is as good as none.
        #[test]
        fn one_node_changes_nothing((_, queues) in topology()) {
            let one: Vec<_> = queues.iter().map(|q| (q.0, q.1, q.2.map(|_| 0))).collect();
            let none: Vec<_> = queues.iter().map(|q| (q.0, q.1)).collect();
            let moves = propose(&before(4), &sample_of(&[Some(0); 4], 300, &one));
            prop_assert_eq!(moves, propose(&before(4), &sample(4, 300, &none)));
        }

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
