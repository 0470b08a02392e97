//! The prepared model: what is on this disk, and whether peers have the same.

use std::path::Path;

use super::super::config::{Config, Party};
use super::super::wire::Status as Running;
use super::links::Met;
use super::machine::{available, gb};
use super::{Finding, remedy};
use crate::error::Result;
use crate::model::TextCodec;
use crate::model::store::{ClientModel, HelperStore, OwnerPreparation, PreparationId, PublicManifest};
use crate::party::Role;
use crate::plan::memory::model_bytes;

/// What is known of models here.
pub(super) struct Model {
    pub findings: Vec<Finding>,
    /// Owner and Client: the preparation of the configuration.
    pub manifest: Option<PublicManifest>,
    /// All readable manifests: the Helper may have several.
    pub known: Vec<PublicManifest>,
    /// Helper: bytes of halves that are not complete yet.
    pub missing: u64,
}

pub(super) fn examine(config: &Config) -> Model {
    let mut model = Model { findings: Vec::new(), manifest: None, known: Vec::new(), missing: 0 };
    match config.party() {
        Party::Owner { preparation, .. } => {
            model.one(Role::Owner, preparation, |dir| {
                let p = OwnerPreparation::open(dir)?;
                Ok(format!(
                    "{} at {}: complete, {} chunks for the helper",
                    p.manifest().id,
                    dir.display(),
                    p.chunk_count()
                ))
            });
        }
        Party::Client { public, .. } => {
            model.one(Role::Client, public, |dir| {
                let p = ClientModel::open(dir)?;
                Ok(format!("{} at {}: public part {}, recomputed", p.manifest().id, dir.display(), p.public_hash()))
            });
            model.findings.push(match TextCodec::open(public) {
                Ok(_) => Finding::ok("tokenizer", "can be read"),
                Err(error) => Finding::fail("tokenizer", error.to_string(), advice(Role::Client)),
            });
        }
        Party::Helper { store, .. } => model.store(store),
    }
    model
}

/// Whether a model of this manifest can be loaded beside everything else here.
fn room(role: Role, manifest: &PublicManifest) -> Result<(), String> {
    let Ok(config) = manifest.model_config() else { return Ok(()) };
    let need = model_bytes(role, &config, &manifest.plan);
    let (need, have) = (need.weights + need.tables, available().unwrap_or(u64::MAX));
    if need <= have { Ok(()) } else { Err(format!("to load it takes {}, and {} are available", gb(need), gb(have))) }
}

impl Model {
    fn one(&mut self, role: Role, dir: &Path, open: impl Fn(&Path) -> Result<String>) {
        let check = "preparation";
        match PublicManifest::read(&dir.join("manifest.json")) {
            Err(error) => self.findings.push(Finding::fail(check, error.to_string(), advice(role))),
            Ok(manifest) => {
                self.findings.push(match (room(role, &manifest), open(dir)) {
                    (Err(why), _) => not_verified(&manifest.id, &why),
                    (Ok(()), Ok(found)) => Finding::ok(check, found),
                    (Ok(()), Err(error)) => Finding::fail(check, error.to_string(), advice(role)),
                });
                self.known.push(manifest.clone());
                self.manifest = Some(manifest);
            }
        }
    }

    fn store(&mut self, dir: &Path) {
        let check = "preparations";
        if !dir.is_dir() {
            let found = format!("{} is not there yet: the daemon makes it, and the owner's fills it", dir.display());
            self.findings.push(Finding::ok(check, found));
            return;
        }
        let store = match HelperStore::open(dir) {
            Ok(store) => store,
            Err(error) => return self.findings.push(Finding::fail(check, error.to_string(), remedy(&error))),
        };
        let mut entries: Vec<PreparationId> = match std::fs::read_dir(dir) {
            Ok(entries) => entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect(),
            Err(e) => {
                let remedy = "run the doctor as the user that the helper runs as";
                return self.findings.push(Finding::fail(check, format!("{}: {e}", dir.display()), remedy));
            }
        };
        entries.sort_unstable();
        for id in &entries {
            let at = dir.join(id.to_string());
            let manifest = PublicManifest::read(&at.join("manifest.json"));
            let again = format!("remove {} and have the owner send it again (restart its daemon)", at.display());
            self.findings.push(match &manifest {
                Err(error) => Finding::fail(check, error.to_string(), again),
                Ok(m) if !store.has(id) => {
                    let have = std::fs::metadata(at.join("half.part")).map_or(0, |f| f.len());
                    self.missing += m.half.bytes.saturating_sub(have);
                    let found = format!("{id}: {} of {} have come so far", gb(have), gb(m.half.bytes));
                    Finding::warn(
                        check,
                        found,
                        "start the owner's daemon, which goes on where it stopped, or remove it",
                    )
                }
                Ok(m) => match (room(Role::Helper, m), store.load(id)) {
                    (Err(why), _) => not_verified(id, &why),
                    (Ok(()), Ok(_)) => Finding::ok(check, format!("{id}: {}, every chunk verified", gb(m.half.bytes))),
                    (Ok(()), Err(error)) => Finding::fail(check, error.to_string(), again),
                },
            });
            self.known.extend(manifest);
        }
        if entries.is_empty() {
            self.findings.push(Finding::ok(check, "none yet: the owner's daemon sends its own when it starts"));
        }
    }
}

fn not_verified(id: &PreparationId, why: &str) -> Finding {
    Finding::warn("preparation", format!("{id} was not verified: {why}"), "free memory and run the doctor again")
}

fn advice(role: Role) -> &'static str {
    match role {
        Role::Client => "get the public directory (PREP/public) anew from the provider, and name it as [model] public",
        _ => {
            "name the directory that `trefoil prepare --out` wrote as [model] preparation; if it is damaged, restore it from a backup or prepare anew"
        }
    }
}

/// What a peer says it has, for people.
fn list(status: &Running) -> String {
    let plain = |id: &String| id.chars().filter(char::is_ascii_alphanumeric).take(64).collect::<String>();
    let ids: Vec<String> = status.preparations.iter().take(8).map(plain).collect();
    if ids.is_empty() { "none".into() } else { ids.join(", ") }
}

/// Whether the peers have this preparation.
pub(super) fn compare(config: &Config, model: &Model, met: &Met) -> Vec<Finding> {
    let Some(manifest) = &model.manifest else { return Vec::new() };
    let id = manifest.id.to_string();
    let mut out = Vec::new();
    let running = met.own.as_ref();
    if let Some(own) = running.filter(|own| !own.preparations.contains(&id)) {
        let found = format!("our running daemon serves preparation {}, the configuration names {id}", list(own));
        out.push(Finding::fail("preparation of our daemon", found, "restart the owner's daemon"));
    }
    for (peer, status) in &met.peers {
        let check = format!("preparation at the {peer}");
        if status.preparations.contains(&id) {
            out.push(Finding::ok(check, format!("the {peer} has {id}")));
            continue;
        }
        let found = format!("differs: {id} here, {} at the {peer}", list(status));
        out.push(match (config.role(), peer) {
            (Role::Owner, _) if running.is_none() && status.preparations.is_empty() => {
                Finding::warn(check, found, "start our daemon (trefoil party): it sends the helper its half")
            }
            (Role::Owner, _) => Finding::fail(
                check,
                found,
                "let our daemon run on this preparation until its log says that the helper has the model",
            ),
            (_, Role::Owner) => Finding::fail(
                check,
                found,
                "get the public directory of the preparation that the owner serves now, and name it as [model] public",
            ),
            _ => Finding::fail(
                check,
                found,
                "wait until the owner's daemon has sent it; if it has, [peers] helper names another helper than the owner's does",
            ),
        });
    }
    out
}
