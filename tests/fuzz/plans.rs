//! Plans and manifests: public facts that a peer sends, by which tables are made and buffers are sized.

use std::path::Path;
use std::sync::OnceLock;

use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::Value;
use trefoil::error::Error;
use trefoil::model::ModelConfig;
use trefoil::model::preparation::{Loaded, Options};
use trefoil::model::prepare::Prepared;
use trefoil::model::sections::HalfLayout;
use trefoil::model::secure::SecureModel;
use trefoil::model::store::{OwnerPreparation, PublicManifest};
use trefoil::plan::Plan;
use trefoil::plan::memory::table_bytes;

use crate::fuzz;
use crate::mutate::{apply, changes};

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Models with and without norms of queries and keys, and a plan for each.
fn planned() -> &'static [(ModelConfig, Plan)] {
    static PLANNED: OnceLock<Vec<(ModelConfig, Plan)>> = OnceLock::new();
    PLANNED.get_or_init(|| {
        let plan = |(name, layers): (&str, _)| {
            let options = Options { private_layers: layers, ..Options::default() };
            let loaded = Loaded::open(&fixture(name), &options).unwrap();
            (loaded.weights.config.clone(), loaded.plan().unwrap())
        };
        [("llama-plain", None), ("qwen3-qknorm", Some(1)), ("qwen2-tied", Some(2))].map(plan).into()
    })
}

/// Every number in it, by where it is.
fn leaves(v: &mut Value) -> Vec<&mut Value> {
    match v {
        Value::Array(items) => items.iter_mut().flat_map(leaves).collect(),
        Value::Object(fields) => fields.values_mut().flat_map(leaves).collect(),
        other => vec![other],
    }
}

fn number() -> impl Strategy<Value = i64> {
    prop_oneof![8 => -3i64..70, 1 => any::<i64>(), 1 => any::<i32>().prop_map(i64::from), 1 => any::<u32>().prop_map(i64::from)]
}

#[test]
fn plan_check() {
    let edits = prop_oneof![
        // One or two fields: these get far. Many: these do not.
        3 => prop::collection::vec((any::<Index>(), number()), 1..3),
        1 => prop::collection::vec((any::<Index>(), number()), 3..40),
    ];
    let all = (0..planned().len(), edits);
    let accepted = std::cell::Cell::new(0u64);
    fuzz("plan", &all, |(which, edits)| {
        let (config, plan) = &planned()[which];
        let mut json = serde_json::to_value(plan).unwrap();
        let mut fields = leaves(&mut json);
        for (at, value) in &edits {
            let n = fields.len();
            let field = &mut *fields[at.index(n)];
            *field = if field.is_boolean() { Value::Bool(value & 1 == 1) } else { (*value).into() };
        }
        let Ok(plan) = serde_json::from_value::<Plan>(json) else { return Ok(()) };
        if plan.check(config).is_err() {
            return Ok(());
        }
        // What passes can be laid out, and its tables can be made and are small.
        accepted.set(accepted.get() + 1);
        let config = ModelConfig { max_positions: plan.max_positions, ..config.clone() };
        let layout = HalfLayout::new(&config, &plan).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let chunks: u64 = (0..layout.chunks()).filter_map(|i| layout.chunk(i)).map(|c| c.bytes as u64).sum();
        prop_assert_eq!(chunks, layout.bytes());
        prop_assert!(table_bytes(&plan) < plan.layers.len().max(1) as u64 * (64 << 20));
        if accepted.get().is_multiple_of(4) {
            let parts = Prepared::helper(&config, &plan, &mut |n| Ok(vec![0; n]));
            let parts = parts.map_err(|e| TestCaseError::fail(e.to_string()))?;
            drop(SecureModel::new(config, plan, parts));
        }
        Ok(())
    });
    assert!(accepted.get() > 0, "no plan gets through: nothing is tried");
}

#[test]
fn manifest() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { private_layers: Some(1), ..Options::default() };
    let made = OwnerPreparation::create(&fixture("llama-plain"), &dir.path().join("p"), &options, &mut |_, _| {});
    let good = made.unwrap().manifest().to_json().unwrap();
    let parse = |bytes: &[u8]| match PublicManifest::parse(bytes, "the manifest") {
        Ok(m) => {
            prop_assert!(m.model_config().is_ok());
            let again = PublicManifest::parse(&m.to_json().unwrap(), "again");
            prop_assert!(again.is_ok_and(|again| again == m));
            Ok(())
        }
        Err(Error::Model(message)) => {
            prop_assert!(message.starts_with("the manifest"), "{message}");
            Ok(())
        }
        Err(other) => Err(TestCaseError::fail(format!("{other}"))),
    };
    parse(&good).unwrap();
    fuzz("manifest, mutated", &changes(), |changes| parse(&apply(&good, &changes)));
    fuzz("manifest, any bytes", &prop::collection::vec(any::<u8>(), 0..200), |bytes| parse(&bytes));
}
