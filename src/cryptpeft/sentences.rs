//! Short English sentences made from a seed: what they are about, and how it ends for whom they are about. No single word tells:
//! the mood before may be the other one, and either may be denied.

use std::collections::BTreeSet;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::synthetic::PARTS;
use crate::error::{Error, Result};

/// What the sentences are: the topic, and the mood at the end.
pub const LABELS: [&str; 4] = ["sea-happy", "sea-unhappy", "home-happy", "home-unhappy"];

/// The most sentences of a label: well below how many there are, since none comes twice.
const MOST: usize = 2000;

const WHO: [&str; 10] = [
    "He",
    "She",
    "My sister",
    "My brother",
    "The old man",
    "The young lady",
    "My friend",
    "The child",
    "The captain",
    "His mother",
];
const MET: [&str; 6] = ["saw", "found", "thought of", "looked at", "heard of", "came to"];
const SEA: [&str; 10] = ["ship", "boat", "sea", "whale", "water", "sail", "wind", "storm", "shore", "island"];
const HOME: [&str; 10] = ["house", "garden", "room", "door", "table", "window", "fire", "kitchen", "bed", "letter"];
const HAPPY: [&str; 6] = ["glad", "happy", "merry", "pleased", "content", "delighted"];
const UNHAPPY: [&str; 6] = ["afraid", "sad", "angry", "sorry", "unhappy", "alone"];

/// `per_class` sentences of each of the [`LABELS`] with their labels, which take turns. Equal seeds give equal sentences, and more of them
/// begin with the same.
///
/// # Errors
/// [`Error::Config`] for more than there are, or fewer than a test part needs.
pub fn sentences(per_class: usize, seed: u64) -> Result<Vec<(String, usize)>> {
    if !(PARTS..=MOST).contains(&per_class) {
        return Err(Error::Config(format!(
            "{per_class} texts of each class: give {PARTS} to {MOST}, of which a fifth is for the test"
        )));
    }
    let (mut seen, mut all) = (BTreeSet::new(), Vec::new());
    for n in 0..per_class * LABELS.len() {
        let label = n % LABELS.len();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(n as u64 + 1);
        let mut text = sentence(label, &mut rng);
        while !seen.insert(text.clone()) {
            text = sentence(label, &mut rng);
        }
        all.push((text, label));
    }
    Ok(all)
}

fn sentence(label: usize, rng: &mut ChaCha8Rng) -> String {
    let mut below = |n: usize| ((u64::from(rng.next_u32()) * n as u64) >> 32) as usize;
    let (who, met) = (WHO[below(WHO.len())], MET[below(MET.len())]);
    let thing = if label < 2 { SEA[below(SEA.len())] } else { HOME[below(HOME.len())] };
    let (same, other) = if label.is_multiple_of(2) { (HAPPY, UNHAPPY) } else { (UNHAPPY, HAPPY) };
    let (same, before, denied) = (same[below(same.len())], other[below(other.len())], other[below(other.len())]);
    match below(8) {
        0..3 => format!("{who} {met} the {thing} and was {same}."),
        3..6 => format!("{who} was {before} at first, but then {met} the {thing} and was {same}."),
        6 => format!("{who} {met} the {thing} and was not {denied}."),
        _ => format!("{who} was {before} at first, but then {met} the {thing} and was not {denied}."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_tells_the_mood() {
        let all = sentences(500, 3).unwrap();
        assert_eq!(all.len(), 2000);
        assert_eq!(all, sentences(500, 3).unwrap());
        assert_ne!(all, sentences(500, 4).unwrap());
        assert_eq!(all[..400], sentences(100, 3).unwrap());
        assert_eq!(all.iter().map(|(text, _)| text).collect::<BTreeSet<_>>().len(), 2000);
        let words = |text: &str| text.split([' ', '.', ',']).map(str::to_owned).collect::<BTreeSet<String>>();
        let all: Vec<_> = all.iter().map(|(text, label)| (words(text), *label)).collect();
        let happy = |n: usize| n.is_multiple_of(2);
        for word in all.iter().flat_map(|(words, _)| words).collect::<BTreeSet<_>>() {
            // By whether the word is in it, or by whether it is not.
            let right = all.iter().filter(|(words, label)| words.contains(word) == happy(*label)).count();
            assert!((right as f64 / 2000.0 - 0.5).abs() < 0.15, "{word}: {right}");
        }
    }

    #[test]
    fn too_few_or_too_many_are_refused() {
        for n in [0, 4, 2001, usize::MAX] {
            assert!(sentences(n, 0).unwrap_err().to_string().contains("5 to 2000"));
        }
        assert_eq!(sentences(2000, 1).unwrap().len(), 8000);
    }
}
