//! Fuzzing of whatever comes from files and peers. A few seconds by default; `TREFOIL_FUZZ_SECONDS=600` runs each target
//! for that long. Prints how many cases a target has seen (`--nocapture`).

mod checkpoints;
mod config;
mod frames;
mod handshake;
mod messages;
mod mutate;
mod plans;

use std::fmt::Debug;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// Runs `check` over values of `strategy` for as long as is configured.
#[track_caller]
fn fuzz<S: Strategy>(name: &str, strategy: &S, check: impl Fn(S::Value) -> Result<(), TestCaseError>)
where
    S::Value: Debug,
{
    let asked = std::env::var("TREFOIL_FUZZ_SECONDS").ok();
    let seconds = asked.map_or(0.3, |s| s.parse().expect("TREFOIL_FUZZ_SECONDS: seconds"));
    let limit = Duration::from_secs_f64(seconds);
    let (begun, mut cases) = (Instant::now(), 0u64);
    while cases == 0 || begun.elapsed() < limit {
        let config = Config { cases: 32, failure_persistence: None, max_shrink_time: 20_000, ..Config::default() };
        if let Err(found) = TestRunner::new(config).run(strategy, &check) {
            panic!("{name}, after {cases} cases: {found}");
        }
        cases += 32;
    }
    println!("fuzz {name}: {cases} cases in {:.1} s", begun.elapsed().as_secs_f64());
}
