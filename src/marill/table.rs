//! The table of a study in Markdown.

use std::fmt::Write as _;

use super::cost::SecureCost;
use super::study::{Finished, Rowed};

/// Mean, smallest and largest.
fn spread(values: &[f64], digits: usize) -> String {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let (min, max) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), &v| (a.min(v), b.max(v)));
    match values.len() {
        0 => String::new(),
        1 => format!("{mean:.digits$}"),
        _ => format!("{mean:.digits$} ({min:.digits$} to {max:.digits$})"),
    }
}

/// What is known of the runs of a row.
fn known(row: &Rowed, digits: usize, f: impl Fn(&Finished) -> Option<f64>) -> String {
    spread(&row.runs.iter().filter_map(f).collect::<Vec<_>>(), digits)
}

/// Of a row's runs over the full fine-tunes of the same seeds.
fn relative(full: Option<&Rowed>, row: &Rowed, f: impl Fn(&Finished, &Finished) -> Option<f64>) -> String {
    let Some(full) = full else { return String::new() };
    spread(&row.runs.iter().zip(&full.runs).filter_map(|(r, full)| f(r, full)).collect::<Vec<_>>(), 2)
}

fn cost(f: impl Fn(&SecureCost) -> f64) -> impl Fn(&Finished) -> Option<f64> {
    move |r| r.cost.as_ref().map(&f)
}

/// How many times less than the full fine-tune.
fn times(f: impl Fn(&SecureCost) -> f64) -> impl Fn(&Finished, &Finished) -> Option<f64> {
    move |r, full| Some(f(full.cost.as_ref()?) / f(r.cost.as_ref()?))
}

/// What the paper's abstract claims of its techniques together; of each alone no figure is at hand here.
fn paper(name: &str) -> &'static str {
    match name {
        "freeze-merge4" | "freeze-merge4-2relu" | "freeze-lora-merge4-2relu" => {
            "all together, over its settings: time 3.6 to 11.3, bytes 2.4 to 6.9, mostly over 90 % of the score"
        }
        _ => "",
    }
}

fn line(out: &mut String, cells: &[String]) {
    // Writing to a string does not fail.
    let _ = writeln!(out, "| {} |", cells.join(" | "));
}

fn head(out: &mut String, names: &[&str]) {
    line(out, &names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
    let _ = writeln!(out, "|---|{}", "---:|".repeat(names.len() - 1));
}

/// The table: mean over seeds, and from the smallest to the largest where there are several.
#[must_use]
pub(super) fn markdown(rows: &[Rowed]) -> String {
    let full = rows.iter().find(|r| r.name == "full");
    let mut out = String::from("Quality on held-out data; seconds are those of training.\n\n");
    head(
        &mut out,
        &["run", "exact match, %", "share of the full fine-tune's", "perplexity", "trained weights", "seconds"],
    );
    for r in rows {
        let exact = |r: &Finished| r.score.exact_match;
        let share = |r: &Finished, full: &Finished| Some(exact(r)? / exact(full).filter(|e| *e > 0.0)?);
        line(
            &mut out,
            &[
                r.title.to_owned(),
                known(r, 1, |r| exact(r).map(|e| 100.0 * e)),
                relative(full, r, share),
                known(r, 3, |r| Some(r.score.perplexity)),
                r.runs.iter().find_map(|r| r.trained).map_or(String::new(), |n| n.to_string()),
                known(r, 0, |r| r.seconds),
            ],
        );
    }
    out += "\nBy three parties. MB and kB (10^6 and 10^3 bytes) are of all links, online + run-ahead; messages are those in sequence.\n\n";
    head(&mut out, &["run", "prefill ms", "MB", "messages", "ms per token", "kB", "messages"]);
    let both = |r: &Rowed, unit: f64, digits, phase: fn(&SecureCost) -> &super::cost::Phase| {
        let online = known(r, digits, cost(|c| phase(c).online_bytes / unit));
        let ahead = known(r, digits, cost(|c| phase(c).ahead_bytes / unit));
        if online.is_empty() { online } else { format!("{online} + {ahead}") }
    };
    for r in rows.iter().filter(|r| r.runs.iter().any(|r| r.cost.is_some())) {
        line(
            &mut out,
            &[
                r.title.to_owned(),
                known(r, 1, cost(|c| c.prefill.ms)),
                both(r, 1e6, 2, |c| &c.prefill),
                known(r, 0, cost(|c| c.prefill.messages)),
                known(r, 1, cost(|c| c.token.ms)),
                both(r, 1e3, 1, |c| &c.token),
                known(r, 0, cost(|c| c.token.messages)),
            ],
        );
    }
    if full.is_some() {
        out += "\nTimes less than the full fine-tune of the same seed takes.\n\n";
        head(&mut out, &["run", "prefill time", "bytes", "messages", "token time", "bytes", "messages", "the paper"]);
        for r in rows.iter().filter(|r| r.runs.iter().any(|r| r.cost.is_some())) {
            line(
                &mut out,
                &[
                    r.title.to_owned(),
                    relative(full, r, times(|c| c.prefill.ms)),
                    relative(full, r, times(|c| c.prefill.bytes())),
                    relative(full, r, times(|c| c.prefill.messages)),
                    relative(full, r, times(|c| c.token.ms)),
                    relative(full, r, times(|c| c.token.bytes())),
                    relative(full, r, times(|c| c.token.messages)),
                    paper(r.name).to_owned(),
                ],
            );
        }
    }
    for (r, why) in rows.iter().filter_map(|r| Some((r, r.runs.iter().find_map(|r| r.no_cost.as_ref())?))) {
        let _ = write!(out, "\nNot run by three parties: {}, {why}.\n", r.title);
    }
    if let Some(c) = rows.iter().flat_map(|r| &r.runs).find_map(|r| r.cost) {
        let _ = write!(
            out,
            "\n{} prompts of {:.1} tokens in the mean, {} decode passes after each; Owner, Client and Helper in one process on {} threads.\n",
            c.prompts, c.prompt_tokens, c.decode_passes, c.threads
        );
    }
    out
}
