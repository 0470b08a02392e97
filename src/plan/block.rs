//! Blocks: a long prompt's attention goes through its rows in blocks, so that what it takes of memory is bounded.
//!
//! Attention is the one part of a layer whose vectors grow with the square of a prompt, and its largest ones (the maximum's counters) have
//! some hundred bytes per score at each holder. Rows are independent of each other, so nothing but the number of messages depends on where
//! they are cut: each block has the 14 from the scores to the normalised context. The cut follows from public facts, and is the same
//! at all parties.

use super::Plan;
use crate::model::ModelConfig;

/// Scores of all heads that are computed at once: of 32 heads, those of a prompt of 361.
pub const MOST_SCORES: usize = 1 << 21;
/// Rows of a block: at least so many, and a power of two. Any message of as many rows has whole bytes; a pass that verifies drafts has
/// fewer, and is never cut. (With many heads and positions a block of so few rows has more scores than asked for.)
pub const LEAST_ROWS: usize = 32;

/// As a plan has it that does not say.
pub(super) fn most_scores() -> usize {
    MOST_SCORES
}

pub(super) fn is_most(scores: &usize) -> bool {
    *scores == MOST_SCORES
}

/// Scores of `heads` heads for `tokens` rows from position `first` on.
#[must_use]
pub fn scores(c: &ModelConfig, heads: usize, first: usize, tokens: usize) -> usize {
    heads * if c.encoder() { tokens * (first + tokens) } else { visible(first, tokens) }
}

/// Positions that `tokens` rows from `first` on see, each itself and those before it.
fn visible(first: usize, tokens: usize) -> usize {
    tokens * first + tokens * (tokens + 1) / 2
}

/// Rows of each block (the last may have fewer) of a pass of `tokens` from position `first` on; all of them where they make one block. The
/// same in all private layers that have all rows, for the one with the most heads. An encoder's pass is never cut: an image has as many rows as its patches, and
/// its last ones are seen by the first.
#[must_use]
pub fn rows(c: &ModelConfig, plan: &Plan, first: usize, tokens: usize) -> usize {
    if c.encoder() {
        return tokens;
    }
    let heads = (plan.first_private..c.num_layers).map(|i| c.layer(i).num_heads).max().unwrap_or(1);
    cut(heads, plan.block_scores, first, tokens)
}

fn cut(heads: usize, most: usize, first: usize, tokens: usize) -> usize {
    if heads * visible(first, tokens) <= most {
        return tokens;
    }
    let rows = most / (heads * (first + tokens)).max(1);
    if rows <= LEAST_ROWS { LEAST_ROWS } else { 1 << rows.ilog2() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_bounded() {
        let rows = |first, tokens| cut(32, MOST_SCORES, first, tokens);
        assert_eq!(rows(0, 361), 361);
        assert_eq!(rows(0, 362), 128);
        assert_eq!(rows(0, 2048), 32);
        assert_eq!(rows(65_000, 1), 1, "a decode pass is one block");
        let verifying = crate::generate::MAX_DRAFTS + 1;
        assert!(rows(65_000, verifying) >= verifying, "and so is one that verifies drafts");
        for (first, tokens) in [(0, 700), (0, 2048), (1000, 900), (5, 2000)] {
            let rows = rows(first, tokens);
            assert!(rows.is_power_of_two() && rows >= LEAST_ROWS);
            assert!(32 * visible(first + tokens - rows, rows) <= MOST_SCORES);
        }
    }
}
