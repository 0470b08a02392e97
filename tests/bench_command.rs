//! `trefoil bench`: its rows, against what the walk of `trefoil cost` counts for the same shape, and its refusals.

use assert_cmd::Command;
use serde_json::Value;
use trefoil::bench::{Harness, Part, Preset, count};
use trefoil::world::Setup;

const FIELDS: [&str; 20] = [
    "reshaping",
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
    "run_ahead_buffer_bytes",
    "threads",
    "isa",
    "by_operation",
    "ready_by_operation",
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
        operations_add_up(row);
    }
}

fn cost(args: &str) -> std::process::Output {
    Command::cargo_bin("trefoil").unwrap().arg("cost").args(args.split(' ')).output().unwrap()
}

/// Without running it: the same plan, the same bytes, but for those that open a request and tell who goes on.
#[test]
fn a_shape_costs_what_its_benchmark_counts() {
    for (shape, reshaping) in [
        ("--preset deep-256 --private-layers 3 --merge-heads 2 --softmax 2relu", "merge 2, 2relu"),
        ("--preset deep-256 --private-layers 3 --lora-rank 8", "LoRA 8"),
        ("--preset vit-b16 --private-layers 3 --lora-rank 8 --activation relu", "relu, LoRA 8"),
        ("--preset vit-b16 --private-layers 3 --adaptformer-rank 8", "AdaptFormer 8"),
        ("--preset deep-256 --private-layers 3 --net wan", "none"),
    ] {
        let out = bench(&format!("{shape} --json --test pp24 --layers 1"));
        let rows: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(rows[0]["reshaping"], reshaping);
        let out = cost(&format!("{shape} --json --prefill 24 --decode 1"));
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let predicted: Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!((&predicted["private_layers"], &predicted["context"]), (&3.into(), &24.into()));
        for lane in ["online_bytes", "ahead_bytes"] {
            let links = predicted["prefill_links"].as_object().unwrap().values();
            let sum: u64 = links.map(|l| l[lane].as_u64().unwrap()).sum();
            let counted = 24 * rows[0][format!("{lane}_per_token")].as_u64().unwrap();
            assert!(sum.abs_diff(counted) < 256, "{shape}, {lane}: {sum}, {counted}");
        }
    }
    for (args, what) in [
        ("--preset h768", "expected a model, one of deep-256"),
        ("--preset cryptpeft-h1-r240", "expected a model"),
        ("--preset deep-256 --private-layers 27", "give 1 to 26, the layers of deep-256"),
        ("--preset deep-256 --private-layers 0", "give 1 to 26, the layers of deep-256"),
        ("--preset deep-256 --merge-heads 3", "cannot be merged by 3"),
        ("--preset deep-256 --context 23", "the context is 23"),
        ("--preset deep-256 --context 2049", "deep-256 has 2048"),
        ("--preset deep-256 --base models/quill-4m", "cannot be used with"),
        ("--merge-heads 2", "goes with --preset"),
        ("--model models/quill-4m --softmax 2relu", "goes with --preset"),
        ("--model models/quill-4m --lora-rank 8", "goes with --preset"),
        ("--preset deep-256 --lora-rank 0", "give 1 to 256, the width"),
        ("--preset deep-256 --adaptformer-rank 8", "only an encoder (vit-b16) has a bottleneck"),
        ("--preset vit-b16 --adaptformer-rank 8 --lora-rank 8", "cannot be used with"),
        ("--model models/quill-4m --adaptformer-rank 8", "goes with --preset"),
    ] {
        let out = cost(&format!("{args} --prefill 24 --decode 1"));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(what), "{args}: {said}");
    }
}

/// With its own weights: what `trefoil.json` says was done to it and is private, an adapter beside it, and the plan and bytes of `trefoil cost`.
#[test]
fn a_model_costs_what_its_benchmark_counts() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir("models/quill-4m").unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let variant =
        r#""from_layer": 5, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 48, "softmax": "2relu""#;
    let record = format!("{{\"version\": 1, \"private_layers\": 3, \"variant\": {{{variant}}}}}");
    std::fs::write(dir.path().join("trefoil.json"), record).unwrap();
    let reshaped = format!("--model {}", dir.path().display());
    for (model, reshaping, layers) in [
        (reshaped, "merge 2, 2relu", 3),
        ("--model models/quill-4m --private-layers 0".into(), "none", 0),
        // On this network a norm of the decoded token, and of a prompt's last row, takes one window.
        ("--model models/quill-4m --private-layers 2 --net 4,1".into(), "none", 2),
        ("--model models/quill-4m --base models/quill-4m --private-layers all --plan-context 40".into(), "none", 8),
        ("--model tests/fixtures/llama-plain --adapter tests/fixtures/lora-all".into(), "LoRA", 2),
    ] {
        let out = bench(&format!("{model} --test pp24,tg2 --context 3 --json"));
        assert!(out.status.success(), "{model}: {}", String::from_utf8_lossy(&out.stderr));
        let rows: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap();
        let row = &rows[0];
        assert_eq!((&row["reshaping"], &row["layers_total"]), (&reshaping.into(), &layers.into()), "{model}");
        assert_eq!(row["layers_measured"], layers);
        let adapter = model.split_once("--adapter ").map(|(_, a)| format!(" + {a}")).unwrap_or_default();
        assert_eq!(row["preset"], format!("{}{adapter}", model.split(' ').nth(1).unwrap()));
        let predicted: Value = serde_json::from_slice(
            &cost(&format!("{} --prefill 24 --decode 1 --json", model.replace("--plan-", "--"))).stdout,
        )
        .unwrap();
        for lane in ["online_bytes", "ahead_bytes"] {
            let links = predicted["prefill_links"].as_object().unwrap().values();
            let sum: u64 = links.map(|l| l[lane].as_u64().unwrap()).sum();
            let counted = 24 * row[format!("{lane}_per_token")].as_u64().unwrap();
            assert!(sum.abs_diff(counted) < 256, "{model}, {lane}: {sum}, {counted}");
        }
        assert_eq!((&rows[1]["test"], &rows[1]["context"]), (&"tg2".into(), &3.into()));
        assert!(rows[1]["ms_per_token"].as_f64().unwrap() > 0.0);
    }
}

/// Bytes of all operations are those of the row, none without a name; the Owner's clock is the ready token's.
fn operations_add_up(row: &Value) {
    let parties = row["by_operation"].as_object().unwrap();
    assert_eq!(parties.keys().collect::<Vec<_>>(), ["client", "helper", "owner"]);
    for bytes in ["online_bytes", "ahead_bytes"] {
        let all = parties.values().flat_map(|p| p.as_object().unwrap().values());
        let sum: u64 = all.map(|o| o[bytes].as_u64().unwrap()).sum();
        let whole = row[format!("{bytes}_per_token")].as_u64().unwrap();
        // Each is rounded.
        assert!(sum.abs_diff(whole) < 36, "{bytes}: {sum} of {whole}");
        for party in parties.values() {
            assert_eq!(party["rest"][bytes].as_u64().unwrap_or(0), 0, "an operation without a name: {party}");
        }
    }
    let linear = |party: &str| &row["by_operation"][party]["linear"];
    for (party, time) in [("owner", "compute_ms"), ("client", "ahead_compute_ms"), ("client", "ahead_streams_ms")] {
        assert!(linear(party)[time].as_f64().unwrap() > 0.0, "{party}: {time}");
    }
    let steps = row["ready_by_operation"].as_object().unwrap().values();
    let sum: f64 = steps.flat_map(|s| ["compute_ms", "wait_ms", "network_ms"].map(|t| s[t].as_f64().unwrap())).sum();
    let whole = row["ms_per_token_ready"].as_f64().unwrap();
    assert!((0.5..1.01).contains(&(sum / whole)), "{sum} of {whole} ms");
}

/// Every tag is closed, and the texts in between.
fn texts(svg: &str) -> Vec<String> {
    let (mut open, mut texts) = (Vec::new(), Vec::new());
    for part in svg.split('<').skip(1) {
        let (tag, text) = part.split_once('>').unwrap();
        match (tag.strip_prefix('/'), tag.ends_with('/')) {
            (Some(name), _) => assert_eq!(open.pop(), Some(name)),
            (None, true) => {}
            (None, false) => open.push(tag.split(' ').next().unwrap()),
        }
        texts.extend(Some(text.trim().to_string()).filter(|t| !t.is_empty()));
    }
    assert!(open.is_empty(), "{open:?}");
    texts
}

#[test]
fn plots_have_their_series() {
    let dir = tempfile::tempdir().unwrap();
    let out = bench(&format!(
        "--preset h768 --test pp4,tg2 --context 8,0,8 --json --plot {}",
        dir.path().join("new/plots").display()
    ));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let rows: Vec<Value> = serde_json::from_slice(&out.stdout).unwrap();
    let tests: Vec<_> = rows.iter().map(|r| (r["test"].as_str().unwrap(), r["context"].as_u64().unwrap())).collect();
    assert_eq!(tests, [("pp4", 0), ("tg2", 0), ("tg2", 8)]);
    let read = |name: &str| texts(&std::fs::read_to_string(dir.path().join("new/plots").join(name)).unwrap());
    let context = read("context.svg");
    for text in
        ["decode, tg2", "prefill", "sustained", "run-ahead ready", "float model", "cached positions", "ms per token"]
    {
        assert!(context.iter().any(|t| t == text), "{text} in {context:?}");
    }
    let cost = read("cost.svg");
    for text in [
        "linear",
        "norm",
        "softmax exponential",
        "mlp function",
        "Owner",
        "PRF streams of all",
        "wait for a peer",
        "network",
        "online",
        "run-ahead",
    ] {
        assert!(cost.iter().any(|t| t == text), "{text} in {cost:?}");
    }
    assert_eq!(std::fs::read_dir(dir.path().join("new/plots")).unwrap().count(), 2);
}

#[test]
fn a_table_for_people() {
    let out = bench("--preset h768 --test tg2 --net 1,1");
    let stdout = String::from_utf8_lossy(&out.stdout);
    for part in [
        "| h768 | none | tg2 | 0 | 1 ms round trip, 1 Gbit/s | 1 |",
        "GFLOP/s",
        "fewer than 64 tokens",
        "| mlp function |",
    ] {
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
        ("--preset h768 --context 18446744073709551615 --test tg1", "positions"),
        ("--preset h768 --net slow", "--net slow"),
        ("--preset h768 --context 1,,2", "numbers of cached positions"),
        ("--preset h768 --context=-1", "--context \"-1\""),
        ("--preset h768 --context=0,many", "--context \"0,many\""),
        ("--test pp8", "give --preset NAME or --model DIR"),
        ("--preset cryptpeft-h4-r8 --test img1 --softmax 2relu", "--softmax with --preset cryptpeft-h4-r8"),
        ("--preset cryptpeft-h4-r8 --test img1 --context 3", "--context with --preset cryptpeft-h4-r8"),
        ("--preset h768 --model models/quill-4m", "cannot be used with"),
        ("--model models/quill-4m --layers 1", "cannot be used with"),
        ("--model models/quill-4m --merge-heads 2", "goes with --preset"),
        ("--model models/quill-4m --plan-context 24 --test pp25", "25 positions, but by --plan-context there are 24"),
        ("--model models/quill-4m --test pp257", "257 positions, but models/quill-4m has 256"),
        ("--model models/quill-4m --private-layers 9", "the model has 8 layers"),
        ("--model models/quill-4m --private-layers few", "--private-layers few"),
        ("--model models/quill-5m", "models/quill-5m"),
        ("--model models/tiny-vit-shapes", "models/tiny-vit-shapes"),
        ("--preset vit-b16 --test tg2", "vit-b16 is an encoder, which decodes nothing; give pp197"),
        ("--preset vit-b16 --test pp198", "198 positions, but vit-b16 has 197"),
        ("--preset vit-b16 --context 5", "--context with --preset vit-b16"),
        ("--preset tinyllama-1.1b --lora-rank 257", "--lora-rank 257: give 1 to 256"),
        ("--preset vit-b16 --adaptformer-rank 0", "--adaptformer-rank 0: give 1 to 768"),
        ("--preset vit-b16 --adaptformer-rank 18446744073709551615", "give 1 to 768"),
        ("--preset cryptpeft-h4-r8 --adaptformer-rank 8", "--adaptformer-rank with --preset cryptpeft-h4-r8"),
        ("--preset cryptpeft-h4-r8 --lora-rank 8", "--lora-rank with --preset cryptpeft-h4-r8"),
        ("--preset h768 --plot Cargo.toml/plots", "--plot Cargo.toml/plots"),
    ] {
        let out = bench(args);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && stderr.contains(part) && out.stdout.is_empty(), "{args}: {stderr}");
    }
}
