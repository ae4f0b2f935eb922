//! Pure: which of the available units a container gets, when the kubelet asks.
//!
//! What must be included is. The rest is chosen for the fewest PCIe switches, then the fewest root ports, then the fewest
//! NUMA nodes, then the fewest free units left over beside the chosen ones, so that big requests find whole switches and
//! nodes later, then the lowest IDs. Up to [`EXHAUSTIVE`] sets that is the best of them all; above, a choice of switch by
//! switch that is good and quick. The same question gets the same answer, in whatever order it is asked.
//!
//! In protected PCIe the domain is all of a node's GPUs and switches, and cc-manager lets them be offered together or not at
//! all: a node has no second domain that a choice could mix with it. A request for all of them gets all of them, and what a
//! smaller one is worth is decided when it is allocated ([`crate::server`]).

use std::collections::{BTreeMap, BTreeSet};

use hw_probe::Bdf;

use crate::units::{Unit, order_of};

/// So many sets are compared with each other: all choices of 8 out of 16.
const EXHAUSTIVE: u64 = 12_870;

/// Among more units than this, not even all pairs are compared.
const SMALL: usize = 64;

/// Above so many groups, a coarser grouping is used.
const GROUPS: usize = 1024;

/// A question without an answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unanswerable {
    /// Less than nothing.
    #[error("The allocation size is {0}")]
    Size(i32),
    /// What must be included is not among what is available.
    #[error("Device {} must be included but is not available", crate::server::shown(.0))]
    NotAvailable(String),
    /// The numbers do not fit.
    #[error("{size} devices are asked for, {must} must be included, {available} are available")]
    Numbers {
        /// Asked for.
        size: usize,
        /// To be included.
        must: usize,
        /// To choose from.
        available: usize,
    },
}

/// Where a unit sits; each level is a number, equal for those that share it.
#[derive(Clone, Copy, Debug, Default)]
struct Seat<'a> {
    id: &'a str,
    /// Whether it is none of ours: the last resort.
    unknown: bool,
    switch: usize,
    port: usize,
    numa: usize,
}

/// Chooses `size` of the IDs in `available`, with all of `must`. The answer is in the order of IDs.
pub fn preferred<'a>(
    units: &[Unit],
    available: &'a [String],
    must: &'a [String],
    size: i32,
) -> Result<Vec<&'a str>, Unanswerable> {
    let size = usize::try_from(size).map_err(|_| Unanswerable::Size(size))?;
    let available: BTreeSet<&str> = available.iter().map(String::as_str).collect();
    let must: BTreeSet<&str> = must.iter().map(String::as_str).collect();
    if let Some(id) = must.difference(&available).next() {
        return Err(Unanswerable::NotAvailable((*id).to_owned()));
    }
    if must.len() > size || available.len() < size {
        return Err(Unanswerable::Numbers { size, must: must.len(), available: available.len() });
    }
    let mut ids: Vec<&str> = available.into_iter().collect();
    ids.sort_by(|a, b| order_of(a).cmp(&order_of(b)));
    let (chosen, free): (Vec<Seat<'_>>, Vec<Seat<'_>>) =
        seats(units, &ids).into_iter().partition(|seat| must.contains(seat.id));
    let wanted = size - chosen.len();
    let mut chosen = if free.len() <= SMALL && sets(free.len(), wanted) <= EXHAUSTIVE {
        best(&chosen, &free, wanted)
    } else {
        by_groups(&chosen, &free, wanted)
    };
    chosen.sort_by(|a, b| order_of(a.id).cmp(&order_of(b.id)));
    Ok(chosen.into_iter().map(|seat| seat.id).collect())
}

fn seats<'a>(units: &[Unit], ids: &[&'a str]) -> Vec<Seat<'a>> {
    let known: BTreeMap<&str, &Unit> = units.iter().map(|unit| (unit.id.as_str(), unit)).collect();
    let mut levels: [BTreeMap<Option<Bdf>, usize>; 2] = Default::default();
    let mut numas: BTreeMap<Option<u32>, usize> = BTreeMap::new();
    let mut number = |level: usize, bridge: Option<Bdf>| {
        let next = levels[level].len();
        *levels[level].entry(bridge).or_insert(next)
    };
    ids.iter()
        .map(|id| {
            let unit = known.get(id);
            // Nearest is the port that is the unit's alone; above it is the switch with the port, or the root port.
            let above =
                unit.map(|unit| (unit.upstream.get(1).or(unit.upstream.first()), unit.upstream.last(), unit.bdf));
            let switch = above.map(|(switch, _, own)| *switch.unwrap_or(&own));
            let port = above.map(|(_, port, own)| *port.unwrap_or(&own));
            let next = numas.len();
            let numa = unit.and_then(|unit| unit.numa.first().copied());
            Seat {
                id,
                unknown: unit.is_none(),
                switch: number(0, switch),
                port: number(1, port),
                numa: *numas.entry(numa).or_insert(next),
            }
        })
        .collect()
}

/// How many sets of `size` there are among `count`, and no more than a limit above [`EXHAUSTIVE`].
fn sets(count: usize, size: usize) -> u64 {
    let few = size.min(count.saturating_sub(size));
    let mut sets: u64 = 1;
    for step in 0..few {
        let (more, by) = ((count - step) as u64, step as u64 + 1);
        sets = sets.saturating_mul(more) / by;
        if sets > EXHAUSTIVE {
            return u64::MAX;
        }
    }
    sets
}

/// What a set costs, the most important first: IDs that are not ours, switches, root ports, NUMA nodes, and what is left
/// free beside the chosen in their switches and in their NUMA nodes.
fn cost(chosen: &[Seat<'_>], free: &[Seat<'_>], taken: &[usize]) -> [usize; 6] {
    let set = || chosen.iter().chain(taken.iter().filter_map(|&at| free.get(at)));
    let distinct = |level: fn(&Seat<'_>) -> usize| set().map(level).collect::<BTreeSet<usize>>();
    let (switches, numas) = (distinct(|seat| seat.switch), distinct(|seat| seat.numa));
    let left = || free.iter().enumerate().filter(|(at, _)| taken.binary_search(at).is_err()).map(|(_, seat)| seat);
    [
        set().filter(|seat| seat.unknown).count(),
        switches.len(),
        distinct(|seat| seat.port).len(),
        numas.len(),
        left().filter(|seat| switches.contains(&seat.switch)).count(),
        left().filter(|seat| numas.contains(&seat.numa)).count(),
    ]
}

/// The cheapest of all sets; of equal ones the first in the order of IDs.
fn best<'a>(chosen: &[Seat<'a>], free: &[Seat<'a>], wanted: usize) -> Vec<Seat<'a>> {
    // The positions taken, rising; the next set is the next in dictionary order.
    let mut taken: Vec<usize> = (0..wanted).collect();
    let mut cheapest = (cost(chosen, free, &taken), taken.clone());
    while let Some(at) = (0..wanted).rev().find(|&at| taken[at] < free.len() - wanted + at) {
        let from = taken[at] + 1;
        for (step, place) in taken[at..].iter_mut().enumerate() {
            *place = from + step;
        }
        let cost = cost(chosen, free, &taken);
        if cost < cheapest.0 {
            cheapest = (cost, taken.clone());
        }
    }
    chosen.iter().copied().chain(cheapest.1.iter().filter_map(|&at| free.get(at).copied())).collect()
}

/// Group by group: those that the chosen are in already, then the tightest that is large enough, else the largest.
fn by_groups<'a>(chosen: &[Seat<'a>], free: &[Seat<'a>], wanted: usize) -> Vec<Seat<'a>> {
    let levels: [fn(&Seat<'_>) -> usize; 3] = [|seat| seat.switch, |seat| seat.numa, |_| 0];
    let count = |level: fn(&Seat<'_>) -> usize| free.iter().map(level).collect::<BTreeSet<usize>>().len();
    let level = levels.into_iter().find(|level| count(*level) <= GROUPS).unwrap_or(levels[2]);
    let mut groups: BTreeMap<(bool, usize), Vec<Seat<'a>>> = BTreeMap::new();
    for seat in free {
        groups.entry((seat.unknown, level(seat))).or_default().push(*seat);
    }
    let places = |seat: &Seat<'_>| [(0, seat.switch), (1, seat.port), (2, seat.numa)];
    let mut near: BTreeSet<(usize, usize)> = chosen.iter().flat_map(places).collect();
    let (mut chosen, size) = (chosen.to_vec(), chosen.len() + wanted);
    while chosen.len() < size {
        let wanted = size - chosen.len();
        let best = groups.iter().min_by_key(|(key, seats)| {
            let far = seats.first().map(|seat| places(seat).map(|place| !near.contains(&place))).unwrap_or_default();
            let (short, tight) = if seats.len() >= wanted { (0, seats.len()) } else { (usize::MAX - seats.len(), 0) };
            (key.0, far[0], short, far[1], far[2], tight, key.1)
        });
        let Some(seats) = best.map(|(key, _)| *key).and_then(|key| groups.remove(&key)) else { break };
        near.extend(seats.iter().flat_map(places));
        chosen.extend(seats.into_iter().take(wanted));
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 2-socket node: switches a and b on socket 0, c and d on socket 1, two GPUs each, and their IDs `a0`, `a1`, ...
    fn units() -> Vec<Unit> {
        let unit = |n: u8| {
            let (switch, letter) = (n / 2, char::from(b'a' + n / 2));
            let bridge = |bus: u8| format!("0000:{bus:02x}:00.0").parse().unwrap();
            Unit {
                numa: [u32::from(n / 4)].into(),
                upstream: vec![bridge(0x80 + n), bridge(0x40 + switch), bridge(0x20 + switch)],
                ..Unit::sample(&format!("{letter}{}", n % 2))
            }
        };
        (0..8).map(unit).collect()
    }

    fn ask(units: &[Unit], available: &str, must: &str, size: i32) -> Result<String, Unanswerable> {
        let list = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        preferred(units, &list(available), &list(must), size).map(|ids| ids.join(" "))
    }

    const ALL: &str = "d1 b0 a1 c0 b1 a0 d0 c1";

    #[test]
    fn the_choice_on_a_node_of_two_sockets_four_switches_and_eight_gpus() {
        // Available, must include, how many -> chosen
        let cases: &[(&str, &str, i32, &str)] = &[
            (ALL, "", 0, ""),
            (ALL, "", 1, "a0"),
            (ALL, "", 2, "a0 a1"),
            (ALL, "", 3, "a0 a1 b0"),
            (ALL, "", 4, "a0 a1 b0 b1"),
            (ALL, "", 5, "a0 a1 b0 b1 c0"),
            (ALL, "", 6, "a0 a1 b0 b1 c0 c1"),
            (ALL, "", 7, "a0 a1 b0 b1 c0 c1 d0"),
            (ALL, "", 8, "a0 a1 b0 b1 c0 c1 d0 d1"),
            // What must be draws its switch along, then its socket.
            (ALL, "c1", 1, "c1"),
            (ALL, "c1", 2, "c0 c1"),
            (ALL, "c1", 3, "c0 c1 d0"),
            (ALL, "c1", 4, "c0 c1 d0 d1"),
            (ALL, "d0 b1", 2, "b1 d0"),
            (ALL, "d0 b1", 3, "b0 b1 d0"),
            (ALL, "d0 b1", 4, "b0 b1 d0 d1"),
            (ALL, "d0 b1", 5, "a0 a1 b0 b1 d0"),
            ("c1 a0 a1", "c1", 2, "a0 c1"),
            // Shortage: a whole switch before two halves, near halves before far ones.
            ("a0 b1 c0 c1", "", 2, "c0 c1"),
            ("a0 b1 c0 c1", "", 3, "a0 c0 c1"),
            ("a0 b1 c0 d1", "", 2, "a0 b1"),
            ("b1 c0 d1", "", 2, "c0 d1"),
            ("b1 c0 d1", "", 3, "b1 c0 d1"),
            ("b1 c0", "", 2, "b1 c0"),
            // Fragments: what is broken already, and the node that is.
            ("a0 a1 b0 c0 c1 d0 d1", "", 1, "b0"),
            ("a0 a1 c0 c1 d0 d1", "", 2, "a0 a1"),
            ("a0 a1 b0 b1 c0 c1 d1", "", 3, "c0 c1 d1"),
            ("a0 a1 b0 b1 c0 c1", "", 2, "c0 c1"),
            ("a0 a1 b0 b1 d1", "", 1, "d1"),
            // IDs that are not ours are the last resort; one that is named twice is one.
            ("x0 d1", "", 1, "d1"),
            ("x0 d1 d1", "", 2, "d1 x0"),
            ("x0 x1 a0", "x1", 2, "a0 x1"),
        ];
        let units = units();
        for &(available, must, size, chosen) in cases {
            let asked = format!("{size} of {available} with {must}");
            assert_eq!(ask(&units, available, must, size).unwrap(), chosen, "{asked}");
            let turned: Vec<&str> = available.split_whitespace().rev().collect();
            assert_eq!(ask(&units, &turned.join(" "), must, size).unwrap(), chosen, "{asked}, in another order");
        }
        eprintln!("{} choices", cases.len());
    }

    #[test]
    fn every_question_has_the_best_answer_and_the_quick_way_is_never_far_from_it() {
        let units = units();
        let ids: Vec<&str> = units.iter().map(|unit| unit.id.as_str()).collect();
        let (mut questions, mut worse) = (0, 0);
        for available in 1_u32..256 {
            let free: Vec<Seat<'_>> = seats(&units, &ids)
                .into_iter()
                .enumerate()
                .filter(|(at, _)| available >> at & 1 == 1)
                .map(|(_, seat)| seat)
                .collect();
            for size in 1..=free.len() {
                let cost_of = |chosen: &[Seat<'_>]| {
                    let at = |seat: &Seat<'_>| free.iter().position(|free| free.id == seat.id).unwrap();
                    let mut taken: Vec<usize> = chosen.iter().map(at).collect();
                    taken.sort_unstable();
                    cost(&[], &free, &taken)
                };
                let (best, quick) = (best(&[], &free, size), by_groups(&[], &free, size));
                assert_eq!((best.len(), quick.len()), (size, size));
                assert!(cost_of(&best) <= cost_of(&quick), "{size} of {free:?}");
                assert_eq!(cost_of(&quick)[1], cost_of(&best)[1], "as few switches: {size} of {free:?}");
                questions += 1;
                worse += usize::from(cost_of(&quick) != cost_of(&best));
            }
        }
        eprintln!("{questions} questions; the quick way is not the best in {worse}, and has as few switches in all");
    }

    #[test]
    fn whatever_is_asked_the_answer_is_lawful_and_bounded() {
        let units = units();
        for (available, must, size, error) in [
            ("a0 a1", "", -1, Unanswerable::Size(-1)),
            ("a0 a1", "", 3, Unanswerable::Numbers { size: 3, must: 0, available: 2 }),
            ("a0 a0", "", 2, Unanswerable::Numbers { size: 2, must: 0, available: 1 }),
            ("a0 a1", "a0 a1", 1, Unanswerable::Numbers { size: 1, must: 2, available: 2 }),
            ("a0", "a1", 1, Unanswerable::NotAvailable("a1".into())),
        ] {
            assert_eq!(ask(&units, available, must, size), Err(error), "{available:?} {must:?} {size}");
        }
        // 10,000 units behind 5,000 switches on 8 sockets; 10,000 IDs that nobody knows.
        let many: Vec<Unit> = (0..10_000_u32)
            .map(|n| Unit {
                numa: [n / 1250].into(),
                upstream: vec![format!("{:04x}:00:00.0", n / 2).parse().unwrap()],
                ..Unit::sample(&n.to_string())
            })
            .collect();
        let ids: Vec<String> = many.iter().map(|unit| unit.id.clone()).collect();
        for size in [1, 2, 1250, 1251, 9_999, 10_000] {
            let chosen = preferred(&many, &ids, &ids[7..8], size).unwrap();
            assert_eq!(chosen.len(), usize::try_from(size).unwrap());
            assert!(chosen.contains(&"7"), "what must be included is");
            assert!(chosen.iter().collect::<BTreeSet<_>>().len() == chosen.len(), "each once");
            assert_eq!(preferred(&units, &ids, &ids[7..8], size).unwrap().len(), chosen.len());
        }
        let near = preferred(&many, &ids, &ids[7..8], 1250).unwrap();
        assert_eq!((near[0], near[1249]), ("0", "1249"), "one socket, whole");
    }

    #[test]
    fn so_many_sets() {
        for (count, size, expected) in [(8, 4, 70), (16, 8, 12_870), (8, 0, 1), (8, 8, 1), (17, 8, u64::MAX)] {
            assert_eq!(sets(count, size), expected, "{size} of {count}");
        }
    }
}
