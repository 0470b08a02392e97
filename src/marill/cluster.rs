//! Equal groups of similar things (MARILL, section 5.3): medoids by FasterPAM (Schubert and Rousseeuw, Information Systems 101, 2021), then a linear
//! sum assignment of everything to them.

use ndarray::{Array2, ArrayView1};
use pathfinding::kuhn_munkres::kuhn_munkres_min;
use pathfinding::matrix::Matrix;

use crate::error::{Error, Result};

/// The Jensen-Shannon divergence of two distributions, in nats: 0 where they are equal, ln 2 where they have nothing in common.
#[must_use]
pub fn jensen_shannon(p: ArrayView1<'_, f32>, q: ArrayView1<'_, f32>) -> f64 {
    let part = |a: f64, mean: f64| if a > 0.0 { a * (a / mean).ln() } else { 0.0 };
    let each = p.iter().zip(q).map(|(&p, &q)| {
        let (p, q) = (f64::from(p), f64::from(q));
        let mean = 0.5 * (p + q);
        0.5 * (part(p, mean) + part(q, mean))
    });
    // Rounding can leave it a hair below.
    each.sum::<f64>().max(0.0)
}

/// What of one thing is near: its nearest and second nearest medoid, by their places in the list.
#[derive(Clone, Copy)]
struct Near {
    first: usize,
    to_first: f64,
    to_second: f64,
}

fn nearest(distances: &Array2<f64>, medoids: &[usize]) -> Vec<Near> {
    let of = |thing: usize| {
        let mut near = Near { first: 0, to_first: f64::INFINITY, to_second: f64::INFINITY };
        for (i, &m) in medoids.iter().enumerate() {
            let d = distances[[thing, m]];
            if d < near.to_first {
                near = Near { first: i, to_first: d, to_second: near.to_first };
            } else if d < near.to_second {
                near.to_second = d;
            }
        }
        near
    };
    (0..distances.nrows()).map(of).collect()
}

/// `k` things such that the distances of all to the nearest of them are small in sum, in ascending order. Deterministic.
///
/// # Panics
/// If `distances` is not square, or `k` is not between 1 and its size.
#[must_use]
pub fn medoids(distances: &Array2<f64>, k: usize) -> Vec<usize> {
    let n = distances.nrows();
    assert!(distances.is_square() && (1..=n).contains(&k), "{k} medoids of {n}");
    let mut medoids = build(distances, k);
    let mut near = nearest(distances, &medoids);
    // Swaps until none of the things, one after the other, gains anything as a medoid. Each swap lowers the sum, so it ends.
    let (mut candidate, mut since) = (0, 0);
    while since < n && k < n {
        since += 1;
        if !medoids.contains(&candidate)
            && let Some(place) = gain(distances, k, &near, candidate)
        {
            medoids[place] = candidate;
            near = nearest(distances, &medoids);
            since = 0;
        }
        candidate = (candidate + 1) % n;
    }
    medoids.sort_unstable();
    medoids
}

/// Greedily: each next medoid is the one that lowers the sum most.
fn build(distances: &Array2<f64>, k: usize) -> Vec<usize> {
    let n = distances.nrows();
    let mut medoids: Vec<usize> = Vec::new();
    let mut to_nearest = vec![f64::INFINITY; n];
    for _ in 0..k {
        let sum = |m: usize| (0..n).map(|i| distances[[i, m]].min(to_nearest[i])).sum::<f64>();
        let free = (0..n).filter(|i| !medoids.contains(i));
        let Some(best) = free.min_by(|&a, &b| sum(a).total_cmp(&sum(b))) else { break };
        medoids.push(best);
        to_nearest.iter_mut().enumerate().for_each(|(i, d)| *d = d.min(distances[[i, best]]));
    }
    medoids
}

/// Which medoid to give up for `candidate`, by its place, if that lowers the sum: all of them tried in one pass.
fn gain(distances: &Array2<f64>, k: usize, near: &[Near], candidate: usize) -> Option<usize> {
    let mut shared = 0.0;
    let mut without = vec![0.0; k];
    for (i, near) in near.iter().enumerate() {
        let d = distances[[i, candidate]];
        if d < near.to_first {
            shared += d - near.to_first;
        } else {
            // Only if its own medoid goes does it matter.
            without[near.first] += d.min(near.to_second) - near.to_first;
        }
    }
    let (place, change) = without.iter().enumerate().min_by(|a, b| a.1.total_cmp(b.1))?;
    (shared + change < -1e-12).then_some(place)
}

/// All things in groups of `size`, so that the distances to the medoid of the group are least in sum. Groups are ordered by their
/// first thing, and things within a group.
///
/// # Errors
/// [`Error::Internal`] if `size` does not divide their number.
pub fn equal_groups(distances: &Array2<f64>, size: usize) -> Result<Vec<Vec<usize>>> {
    let n = distances.nrows();
    if size == 0 || !n.is_multiple_of(size) {
        return Err(Error::Internal(format!("{n} things in groups of {size}")));
    }
    let medoids = medoids(distances, n / size);
    // Every medoid has `size` places. The assignment counts in whole numbers: of a 2^40th of the largest distance.
    let largest = distances.iter().copied().fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let cost = |(thing, place): (usize, usize)| {
        (distances[[thing, medoids[place / size]]] / largest * (1u64 << 40) as f64).round() as i64
    };
    let (_, places) = kuhn_munkres_min(&Matrix::from_fn(n, n, cost));
    let mut groups = vec![Vec::new(); n / size];
    for (thing, place) in places.into_iter().enumerate() {
        groups[place / size].push(thing);
    }
    groups.sort();
    Ok(groups)
}

#[cfg(test)]
mod tests {
    use ndarray::array;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn divergence_by_hand() {
        let (p, q) = (array![1.0f32, 0.0], array![0.0f32, 1.0]);
        assert!((jensen_shannon(p.view(), q.view()) - 2f64.ln()).abs() < 1e-12);
        assert_eq!(jensen_shannon(p.view(), p.view()), 0.0);
        let (p, q) = (array![0.5f32, 0.5], array![0.25f32, 0.75]);
        let mean = [0.375f64, 0.625];
        let kl = |p: [f64; 2]| p[0] * (p[0] / mean[0]).ln() + p[1] * (p[1] / mean[1]).ln();
        let want = 0.5 * (kl([0.5, 0.5]) + kl([0.25, 0.75]));
        assert!((jensen_shannon(p.view(), q.view()) - want).abs() < 1e-9);
        assert_eq!(jensen_shannon(p.view(), q.view()), jensen_shannon(q.view(), p.view()));
    }

    fn random(n: usize, seed: u64) -> Array2<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let points: Vec<[f64; 2]> =
            (0..n).map(|_| [0, 1].map(|_| f64::from(rng.next_u32()) / f64::from(u32::MAX))).collect();
        Array2::from_shape_fn((n, n), |(i, j)| {
            let [x, y] = [0, 1].map(|c| points[i][c] - points[j][c]);
            x.hypot(y)
        })
    }

    fn sum(distances: &Array2<f64>, medoids: &[usize]) -> f64 {
        (0..distances.nrows()).map(|i| medoids.iter().map(|&m| distances[[i, m]]).fold(f64::INFINITY, f64::min)).sum()
    }

    #[test]
    fn no_swap_improves_the_medoids_and_they_are_near_the_best() {
        for seed in 0..20 {
            let d = random(9, seed);
            let found = medoids(&d, 3);
            for place in 0..3 {
                for other in 0..9 {
                    let mut swapped = found.clone();
                    swapped[place] = other;
                    assert!(sum(&d, &swapped) >= sum(&d, &found) - 1e-9, "seed {seed}");
                }
            }
            let mut best = f64::INFINITY;
            for a in 0..9 {
                for b in 0..a {
                    for c in 0..b {
                        best = best.min(sum(&d, &[a, b, c]));
                    }
                }
            }
            assert!(sum(&d, &found) <= best * 1.2 + 1e-9, "seed {seed}: {} {best}", sum(&d, &found));
        }
        assert_eq!(medoids(&random(4, 0), 4), [0, 1, 2, 3]);
    }

    #[test]
    fn groups_are_equal_and_similar() {
        // Two kinds in turn.
        let d =
            Array2::from_shape_fn((8, 8), |(i, j)| if i % 2 == j % 2 { 0.01 * (i.abs_diff(j)) as f64 } else { 1.0 });
        assert_eq!(equal_groups(&d, 4).unwrap(), [[0, 2, 4, 6], [1, 3, 5, 7]]);
        assert_eq!(equal_groups(&d, 8).unwrap(), [[0, 1, 2, 3, 4, 5, 6, 7]]);
        assert_eq!(equal_groups(&d, 1).unwrap().len(), 8);
        assert!(equal_groups(&d, 3).is_err());
        for seed in 0..10 {
            let groups = equal_groups(&random(12, seed), 3).unwrap();
            assert!(groups.iter().all(|g| g.len() == 3));
            let mut all: Vec<usize> = groups.concat();
            all.sort_unstable();
            assert_eq!(all, (0..12).collect::<Vec<_>>());
        }
    }
}
