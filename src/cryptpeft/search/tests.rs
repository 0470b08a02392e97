//! With an evaluator that is a formula: nothing is trained.

use std::path::Path;

use super::*;

fn space() -> Space {
    Space { heads: vec![1, 2, 3, 4, 8], ranks: vec![8, 16, 32, 64, 128], layers: vec![1, 2, 3] }
}

/// What is fixed where nobody searches.
const FIXED: Point = Point { heads: 4, rank: 64, layers: 1 };

/// More rank and layers help up to a point, many heads of a small rank do not; times are as the paper's model has them.
struct Formula {
    calls: usize,
    fails_at: Option<usize>,
    steps: usize,
}

impl Formula {
    fn new() -> Self {
        Formula { calls: 0, fails_at: None, steps: 100 }
    }
}

fn accuracy(p: Point) -> f64 {
    let rank = 0.2 * (1.0 - (-(p.rank as f64) / 10.0).exp());
    let heads = 0.01 * ((p.heads as f64).log2() - 0.5).abs();
    0.7 + rank - heads + 0.002 * (p.layers - 1) as f64
}

fn latency(p: Point) -> f64 {
    (0.02 * p.heads as f64 + 0.004 * p.rank as f64 + 0.1) * p.layers as f64 + 0.3
}

impl Evaluator for Formula {
    fn accuracy(&mut self, p: Point, seed: u64) -> Result<f64> {
        self.calls += 1;
        if self.fails_at == Some(self.calls) {
            return Err(Error::Config("the machine went off".into()));
        }
        assert!(p.rank.is_multiple_of(p.heads), "{p}");
        Ok(accuracy(p) + 1e-5 * (seed % 3) as f64)
    }

    fn latency(&mut self, p: Point) -> Result<f64> {
        Ok(latency(p))
    }

    fn settings(&self) -> Value {
        json!({ "steps": self.steps })
    }
}

fn search(target: Target, seed: u64) -> Search {
    Search { space: space(), target, seed, budget: 24 }
}

fn run(s: &Search, e: &mut Formula, file: &Path) -> Result<Found> {
    s.run(e, file, &mut |_| true).map(|found| found.expect("nobody stopped it"))
}

#[test]
fn a_search_beats_what_is_fixed() {
    let dir = tempfile::tempdir().unwrap();
    for target in [Target::Utility, Target::Efficiency { floor: accuracy(FIXED) }] {
        for seed in [1, 2] {
            let file = dir.path().join(format!("{seed}{target:?}.jsonl"));
            let mut e = Formula::new();
            let found = run(&search(target, seed), &mut e, &file).unwrap();
            // Not one point twice.
            assert_eq!(e.calls, found.records.len());
            assert!(e.calls <= 24 && found.steps >= e.calls as u64, "{} {}", e.calls, found.steps);
            let best = found.best.unwrap();
            let better = |r: &Record| r.accuracy >= accuracy(FIXED) && r.latency <= 0.9 * latency(FIXED);
            assert!(found.records.iter().any(better), "{target:?} {seed}: {:?}", found.records);
            match target {
                Target::Utility => assert!(best.accuracy >= accuracy(FIXED)),
                Target::Efficiency { .. } => assert!(better(&best), "{best:?}"),
            }
            assert!(found.front.iter().any(|r| r.point == best.point));
            let svg = dir.path().join("plot.svg");
            plot(&file, &svg).unwrap();
            let svg = std::fs::read_to_string(svg).unwrap();
            assert!(svg.contains("Pareto front") && svg.trim_end().ends_with("</svg>"));
        }
    }
}

#[test]
fn what_was_interrupted_goes_on_to_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let s = search(Target::Efficiency { floor: 0.88 }, 5);
    let want = run(&s, &mut Formula::new(), &whole).unwrap();
    let bytes = std::fs::read(&whole).unwrap();
    assert_eq!(bytes.iter().filter(|b| **b == b'\n').count(), 1 + want.records.len());

    // A budget that grew, an evaluator that failed, somebody who stopped it, and a machine that went off within a line.
    run(&Search { budget: 3, ..s.clone() }, &mut Formula::new(), &parts).unwrap();
    let mut failing = Formula { fails_at: Some(4), ..Formula::new() };
    assert!(run(&s, &mut failing, &parts).unwrap_err().to_string().contains("went off"));
    assert_eq!(read(&parts).unwrap().1.len(), 6);
    let mut told = 0;
    let stop = &mut |p: Progress<'_>| {
        told += 1;
        assert!(p.evaluated >= 6 && p.budget == 24);
        told < 4
    };
    assert!(s.run(&mut Formula::new(), &parts, stop).unwrap().is_none());
    assert_eq!(read(&parts).unwrap().1.len(), 8);
    let there = std::fs::read(&parts).unwrap();
    std::fs::write(&parts, &bytes[..there.len() + 20]).unwrap();
    assert_eq!(read(&parts).unwrap().1.len(), 8);
    let mut rest = Formula::new();
    let got = run(&s, &mut rest, &parts).unwrap();
    assert_eq!(std::fs::read(&parts).unwrap(), bytes);
    assert_eq!((got.records, got.steps, rest.calls), (want.records.clone(), want.steps, want.records.len() - 8));

    // Nothing is left to do; a header cut short is begun anew.
    run(&s, &mut Formula { fails_at: Some(1), ..Formula::new() }, &parts).unwrap();
    std::fs::write(&parts, &bytes[..15]).unwrap();
    run(&s, &mut Formula::new(), &parts).unwrap();
    assert_eq!(std::fs::read(&parts).unwrap(), bytes);
}

#[test]
fn other_settings_and_damaged_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("history");
    let s = Search { budget: 4, ..search(Target::Utility, 5) };
    run(&s, &mut Formula::new(), &file).unwrap();
    let refused = |s: &Search, e: &mut Formula, what: &[&str]| {
        let error = run(s, e, &file).unwrap_err().to_string();
        assert!(what.iter().all(|w| error.contains(w)), "{error}");
    };
    let mut e = Formula::new();
    refused(&Search { seed: 6, ..s.clone() }, &mut e, &["`seed` (5 there, 6 here)"]);
    refused(&Search { target: Target::Efficiency { floor: 0.5 }, ..s.clone() }, &mut e, &["`target`"]);
    let less = Space { ranks: vec![8, 16], ..space() };
    refused(&Search { space: less, ..s.clone() }, &mut e, &["`space.ranks`", "another directory"]);
    refused(&s, &mut Formula { steps: 7, ..Formula::new() }, &["`evaluator.steps` (100 there, 7 here)"]);
    assert_eq!(e.calls, 0);

    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    for (changed, what) in [
        (format!("{}\n{}\n", lines[0], lines[2]), ["line 2", "not what these settings lead to"]),
        (format!("{}\nnonsense\n{}\n", lines[0], lines[1]), ["line 2", "is no point"]),
        (format!("nonsense\n{}\n", lines[1]), ["line 1", "is no history"]),
    ] {
        std::fs::write(&file, changed).unwrap();
        refused(&s, &mut Formula::new(), &what);
    }
    std::fs::write(&file, &text).unwrap();
    let held = std::fs::File::open(&file).unwrap();
    held.lock().unwrap();
    refused(&s, &mut Formula::new(), &["another search is writing"]);
    drop(held);
    run(&s, &mut Formula::new(), &file).unwrap();
}

#[test]
fn spaces_targets_and_answers_that_are_none() {
    let points = |heads: &[usize], ranks: &[usize], layers: &[usize]| {
        let space = Space { heads: heads.to_vec(), ranks: ranks.to_vec(), layers: layers.to_vec() };
        space.points().map_err(|e| e.to_string())
    };
    assert_eq!(points(&[2, 3], &[8, 9], &[1, 2]).unwrap().len(), 4);
    for (space, what) in [
        (points(&[], &[8], &[1]), "--heads"),
        (points(&[1], &[8, 0], &[1]), "--ranks: 0"),
        (points(&[1], &[8], &[1, 2, 1]), "--layers: 1 is there twice"),
        (points(&[3], &[8, 16], &[1]), "divide none"),
        (points(&[1], &[usize::MAX], &[1]), "too large"),
    ] {
        assert!(space.as_ref().is_err_and(|e| e.contains(what)), "{space:?}");
    }
    assert_eq!("utility".parse::<Target>().unwrap(), Target::Utility);
    assert_eq!("efficiency:0.9".parse::<Target>().unwrap(), Target::Efficiency { floor: 0.9 });
    for bad in ["efficiency", "efficiency:90", "efficiency:x", "speed", "efficiency:NaN"] {
        assert!(bad.parse::<Target>().unwrap_err().to_string().contains("0.9"), "{bad}");
    }
    struct Bad(f64, f64);
    impl Evaluator for Bad {
        fn accuracy(&mut self, _: Point, _: u64) -> Result<f64> {
            Ok(self.0)
        }
        fn latency(&mut self, _: Point) -> Result<f64> {
            Ok(self.1)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("history");
    for bad in [(f64::NAN, 1.0), (1.5, 1.0), (0.5, 0.0), (0.5, f64::INFINITY)] {
        let error = search(Target::Utility, 1).run(&mut Bad(bad.0, bad.1), &file, &mut |_| true).unwrap_err();
        assert!(error.to_string().contains("an accuracy from 0 to 1"), "{error}");
    }
    let none = search(Target::Efficiency { floor: 1.0 }, 1);
    std::fs::remove_file(&file).unwrap();
    let found = none.run(&mut Bad(0.5, 1.0), &file, &mut |_| true).unwrap().unwrap();
    assert!(found.best.is_none() && found.front.len() == 1);
    assert!(Search { budget: 0, ..none }.run(&mut Bad(0.5, 1.0), &file, &mut |_| true).is_err());
}
