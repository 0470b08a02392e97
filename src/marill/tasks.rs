//! Small tasks with one right answer each, made from a seed: anyone can train on them, and score what was trained, without any
//! download.

use std::collections::BTreeSet;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::data::below;
use crate::error::{Error, Result};

/// A built-in task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A date in words is written as in ISO 8601: "the third of March 1987" as "1987-03-03".
    Dates,
    /// Three to five words are given back in reverse order.
    Reverse,
    /// Two numbers below 100 are added.
    Sums,
}

const MONTHS: [(&str, u32); 12] = [
    ("January", 31),
    ("February", 28),
    ("March", 31),
    ("April", 30),
    ("May", 31),
    ("June", 30),
    ("July", 31),
    ("August", 31),
    ("September", 30),
    ("October", 31),
    ("November", 30),
    ("December", 31),
];

const ORDINALS: [&str; 31] = [
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
    "twentieth",
    "twenty-first",
    "twenty-second",
    "twenty-third",
    "twenty-fourth",
    "twenty-fifth",
    "twenty-sixth",
    "twenty-seventh",
    "twenty-eighth",
    "twenty-ninth",
    "thirtieth",
    "thirty-first",
];

const WORDS: [&str; 32] = [
    "time", "man", "house", "hand", "day", "water", "night", "door", "head", "good", "old", "white", "sea", "ship",
    "long", "little", "great", "black", "fire", "wind", "eyes", "love", "life", "world", "room", "morning", "young",
    "light", "fair", "cold", "green", "king",
];

impl Task {
    /// Every task.
    pub const ALL: [Task; 3] = [Task::Dates, Task::Reverse, Task::Sums];

    /// Its name after `task:`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Task::Dates => "dates",
            Task::Reverse => "reverse",
            Task::Sums => "sums",
        }
    }

    /// By its name.
    ///
    /// # Errors
    /// [`Error::Config`] listing the names.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name).ok_or_else(|| {
            let names: Vec<String> = Self::ALL.iter().map(|task| format!("task:{}", task.name())).collect();
            Error::Config(format!("--data task:{name}: there is no such task; there are {}", names.join(", ")))
        })
    }

    /// `count` different prompts with their answers, or as many as there are; the same for the same seed.
    #[must_use]
    pub fn examples(self, count: usize, seed: u64) -> Vec<(String, String)> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(TASK_STREAM);
        let mut seen = BTreeSet::new();
        let mut all = Vec::new();
        // With few prompts left to find, most draws are repetitions.
        let mut repeated = 0;
        for _ in 0..count.saturating_mul(20) {
            if all.len() == count || repeated == EXHAUSTED {
                break;
            }
            let (subject, prompt, answer) = self.draw(&mut rng);
            repeated += 1;
            if seen.insert(subject) {
                all.push((prompt, answer));
                repeated = 0;
            }
        }
        all
    }

    /// What is asked about (no two examples share it, so none that is held out was trained on in other words), a prompt, an
    /// answer.
    fn draw(self, rng: &mut ChaCha8Rng) -> (String, String, String) {
        match self {
            Task::Dates => {
                let year = 1700 + below(rng, 400) as u32;
                let month = below(rng, 12);
                let (name, days) = MONTHS[month];
                let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
                let day = 1 + below(rng, (days + u32::from(leap && month == 1)) as usize);
                let ordinal = ORDINALS[day - 1];
                let words = match below(rng, 3) {
                    0 => format!("the {ordinal} of {name} {year}"),
                    1 => format!("{name} the {ordinal}, {year}"),
                    _ => format!("the {ordinal} day of {name} in the year {year}"),
                };
                let iso = format!("{year}-{:02}-{day:02}", month + 1);
                (iso.clone(), format!("Date: {words}\nISO:"), format!(" {iso}"))
            }
            Task::Reverse => {
                let words: Vec<&str> = (0..3 + below(rng, 3)).map(|_| WORDS[below(rng, WORDS.len())]).collect();
                let back: Vec<&str> = words.iter().rev().copied().collect();
                let words = words.join(" ");
                (words.clone(), format!("Words: {words}\nReversed:"), format!(" {}", back.join(" ")))
            }
            Task::Sums => {
                let (a, b) = (below(rng, 100), below(rng, 100));
                (format!("{a} {b}"), format!("Add: {a} + {b}\nSum:"), format!(" {}", a + b))
            }
        }
    }
}

/// Draws in a row that bring nothing new: a task has no more prompts.
const EXHAUSTED: usize = 20_000;

/// The stream of the seed that examples are drawn from.
const TASK_STREAM: u64 = 1 << 42;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_different_right_and_follow_the_seed() {
        for task in Task::ALL {
            assert_eq!(Task::parse(task.name()).unwrap(), task);
            let all = task.examples(500, 3);
            assert_eq!(all.len(), 500);
            assert_eq!(all, task.examples(500, 3));
            assert_ne!(all, task.examples(500, 4));
            let prompts: BTreeSet<&String> = all.iter().map(|(prompt, _)| prompt).collect();
            assert_eq!(prompts.len(), 500);
        }
        for (prompt, answer) in Task::Dates.examples(500, 1) {
            let [year, month, day] = answer.trim().split('-').collect::<Vec<_>>()[..] else { panic!("{answer}") };
            let month: usize = month.parse().unwrap();
            let day: usize = day.parse().unwrap();
            assert!(prompt.contains(year) && prompt.contains(MONTHS[month - 1].0), "{prompt} {answer}");
            assert!(prompt.contains(ORDINALS[day - 1]), "{prompt} {answer}");
        }
        // There are only 10000 sums.
        assert!(Task::Sums.examples(20_000, 1).len() <= 10_000);
        let e = Task::parse("poems").unwrap_err().to_string();
        assert!(e.contains("task:poems") && e.contains("task:dates"), "{e}");
    }
}
