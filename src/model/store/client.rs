//! The Client's model: the public part on its own disk, and the seed from the Owner.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::manifest::{Digest, PublicManifest, facts, public_hash};
use crate::error::{Error, PeerFault, Result};
use crate::model::prepare::Prepared;
use crate::model::public::PublicPart;
use crate::model::secure::SecureModel;
use crate::model::{Checkpoint, ModelConfig, Weights};
use crate::party::Role;
use crate::plan::F;
use crate::prf::PreparationSeed;
use crate::protocol::embedding::TableShare;
use crate::protocol::linear::OwnerMatrix;

/// What the Client has of a model before it meets the Owner.
pub struct ClientModel {
    dir: PathBuf,
    manifest: PublicManifest,
    config: ModelConfig,
    public_hash: Digest,
    public: Option<Weights>,
    /// The public matrices that are multiplied under MPC, by the number of their section.
    known: BTreeMap<u64, OwnerMatrix>,
}

impl std::fmt::Debug for ClientModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientModel").field("dir", &self.dir).field("id", &self.manifest.id).finish_non_exhaustive()
    }
}

impl ClientModel {
    /// Reads the public directory of a preparation. Its `config.json` and tensors may also be those of the public base
    /// itself, with the preparation's `manifest.json` put beside them.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file: missing, damaged, or not what the manifest says.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("manifest.json");
        let manifest = PublicManifest::read(&path)?;
        let plan = &manifest.plan;
        // A base has no variant of its own: what was done to the model, its preparation says.
        let own = ModelConfig::open(dir)?;
        let config = ModelConfig { max_positions: plan.max_positions, variant: manifest.variant, ..own.clone() };
        let wrong = |text: String| {
            let remedy = "get the public directory anew from the provider";
            Error::Model(format!("{}: {text}; {remedy}", dir.display()))
        };
        if let Some((name, here, there)) = difference(&config, &manifest.model_config()?) {
            return Err(wrong(format!("config.json has {name} = {here}, the preparation's manifest.json {there}")));
        }
        let read = if plan.public_base { config.num_layers } else { plan.first_private };
        if let Some(i) = (0..read.min(own.num_layers)).find(|&i| own.layer(i) != config.layer(i)) {
            return Err(wrong(format!("layer {i} is of another shape by manifest.json than by the files beside it")));
        }
        let part =
            if PublicPart::any(plan) { PublicPart::load(&Checkpoint::open(dir)?, plan)? } else { PublicPart::none() };
        let public_hash = public_hash(&config, plan, &part)?;
        if public_hash != manifest.public_hash {
            return Err(wrong(format!(
                "the public tensors have the hash {public_hash}, by manifest.json it is {}",
                manifest.public_hash
            )));
        }
        let known = part.quantised(&config, plan)?;
        let public = part.into_weights(&config, plan);
        Ok(ClientModel { dir: dir.to_path_buf(), manifest, config, public_hash, public, known })
    }

    /// The directory, in which the tokenizer lies too.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest in the directory.
    #[must_use]
    pub fn manifest(&self) -> &PublicManifest {
        &self.manifest
    }

    /// The model's configuration, its context the plan's.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The hash computed from the files in the directory.
    #[must_use]
    pub fn public_hash(&self) -> Digest {
        self.public_hash
    }

    /// The embedding and the layers that the Client runs in plaintext; `None` when the embedding is private.
    #[must_use]
    pub fn public(&self) -> Option<&Weights> {
        self.public.as_ref()
    }

    /// [`ClientModel::public`], taken out.
    #[must_use]
    pub fn into_public(self) -> Option<Weights> {
        self.public
    }

    /// Whether the Owner's preparation is the one that this directory is the public part of.
    ///
    /// # Errors
    /// [`PeerFault::Mismatch`] with both values.
    pub fn agree(&self, theirs: &PublicManifest) -> Result<()> {
        let ours = &self.manifest;
        if let Some((what, here, there)) = difference(&self.config, &theirs.model_config()?) {
            return Err(mismatch(what, here, there));
        }
        if ours.plan != theirs.plan {
            return Err(mismatch(
                "the plan (by its hash)",
                ours.plan_hash().to_string(),
                theirs.plan_hash().to_string(),
            ));
        }
        if self.public_hash != theirs.public_hash {
            let (here, there) = (self.public_hash.to_string(), theirs.public_hash.to_string());
            return Err(mismatch("the public part (by its hash)", here, there));
        }
        if ours.id != theirs.id {
            return Err(mismatch("the preparation", ours.id.to_string(), theirs.id.to_string()));
        }
        Ok(())
    }

    /// The Client's half of the model, from the Owner's manifest and the seed.
    ///
    /// # Errors
    /// As [`ClientModel::agree`].
    pub fn secure_model(&self, theirs: &PublicManifest, seed: &PreparationSeed) -> Result<SecureModel> {
        self.agree(theirs)?;
        let (config, plan) = (self.config.clone(), self.manifest.plan.clone());
        let parts = Prepared::assemble(
            &config,
            &plan,
            &mut |s| match self.known.get(&s.id()) {
                Some(m) => Ok(m.clone()),
                None => Ok(OwnerMatrix::client(s.id(), s.rows, s.cols, s.f, seed.clone())),
            },
            &mut |s| Ok(TableShare::seed((s.rows, s.cols), F, s.id(), seed.clone())),
        )?;
        Ok(SecureModel::new(config, plan, parts))
    }
}

fn mismatch(what: &'static str, ours: String, theirs: String) -> Error {
    let remedy = "get the public directory of the owner's present preparation";
    let kind = PeerFault::Mismatch { what, ours, theirs, remedy };
    Error::Peer { role: Role::Owner, step: "preparation".into(), kind }
}

/// The first field in which two configurations differ.
fn difference(a: &ModelConfig, b: &ModelConfig) -> Option<(&'static str, String, String)> {
    facts(a).into_iter().zip(facts(b)).find(|(a, b)| a != b).map(|((name, a), (_, b))| (name, a, b))
}
