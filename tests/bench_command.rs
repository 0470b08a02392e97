//! `trefoil bench`: its rows, against what the walk of `trefoil cost` counts for the same shape, and its refusals.

use assert_cmd::Command;
use serde_json::Value;
use trefoil::bench::{Harness, Part, Preset, count};
use trefoil::world::Setup;

const FIELDS: [&str; 16] = [
    "preset",
    "test",
    "context",
    "net",
    "layers_measured",
    "layers_total",
    "ms_per_token",
    "ms_per_token_ready",
    "float_ms_per_token",
    "online_bytes_per_token",
    "ahead_bytes_per_token",
    "messages_per_token",
    "peak_memory_bytes",
    "predicted_peak_memory_bytes",
    "threads",
    "isa",
];

fn bench(args: &str) -> std::process::Output {
    Command::cargo_bin("trefoil").unwrap().arg("bench").args(args.split(' ')).output().unwrap()
}

#[test]
fn rows_say_what_the_walk_counts() {
    let out = bench("--preset h768 --test pp8,tg4 --context 16 --layers 1 --json");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let rows: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(rows.len(), 2);
    let config = Preset::find("h768").unwrap().config(1, 20);
    let plan = Harness::new(config.clone(), Setup::default()).unwrap().plan().clone();
    for (row, (test, context, passes)) in rows.iter().zip([("pp8", 0, vec![8]), ("tg4", 16, vec![1; 4])]) {
        let mut fields: Vec<&str> = row.as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected = FIELDS;
        fields.sort_unstable();
        expected.sort_unstable();
        assert_eq!(fields, expected);
        assert_eq!((&row["test"], &row["context"]), (&test.into(), &context.into()));
        assert_eq!((&row["layers_measured"], &row["layers_total"]), (&1.into(), &1.into()));
        let counted = count(&config, &plan, Part::Layers, context, &passes).unwrap();
        let tokens = passes.iter().sum::<usize>();
        let per_token = |bytes: u64| (bytes as f64 / tokens as f64).round() as u64;
        assert_eq!(row["online_bytes_per_token"], per_token(counted.online_bytes()));
        assert_eq!(row["ahead_bytes_per_token"], per_token(counted.ahead_bytes()));
        let messages = row["messages_per_token"].as_f64().unwrap() * tokens as f64 / passes.len() as f64;
        assert_eq!(messages, f64::from(counted.depth));
        for time in ["ms_per_token", "ms_per_token_ready", "float_ms_per_token"] {
            assert!(row[time].as_f64().unwrap() > 0.0, "{time}");
        }
        assert!(row["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
        for party in ["owner", "client", "helper"] {
            assert!(row["predicted_peak_memory_bytes"][party].as_u64().unwrap() > 1 << 20, "{party}");
        }
    }
}

#[test]
fn a_table_for_people() {
    let out = bench("--preset h768 --test tg2 --net 1,1");
    let stdout = String::from_utf8_lossy(&out.stdout);
    for part in ["| h768 | tg2 | 0 | 1 ms round trip, 1 Gbit/s | 1 |", "GFLOP/s", "fewer than 64 tokens"] {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
}

#[test]
fn refusals() {
    for (args, part) in [
        ("--preset gpt-9", "tinyllama-1.1b"),
        ("--preset h768 --test tg0", "expected ppN"),
        ("--preset h768 --test pp8,", "expected ppN"),
        ("--preset h768 --test 128", "expected ppN"),
        ("--preset h768 --layers 2", "--layers 2: give 1 to 1"),
        ("--preset h768 --layers 0", "--layers 0"),
        ("--preset llama-2-7b --private-layers 4 --layers 5", "--layers 5: give 1 to 4"),
        ("--preset llama-2-7b --private-layers 33", "give 1 to 32"),
        ("--preset tinyllama-1.1b --context 2000 --test tg64", "2064 positions"),
        ("--preset h768 --net slow", "--net slow"),
    ] {
        let out = bench(args);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && stderr.contains(part) && out.stdout.is_empty(), "{args}: {stderr}");
    }
}
