//! The Owner's preparation: made once by `trefoil prepare`, read by the Owner's daemon.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use safetensors::tensor::TensorView;
use sha2::{Digest, Sha256};

use super::manifest::{PreparationId, PublicManifest, public_hash};
use super::{disk, owner_file};
use crate::error::{Error, Result};
use crate::model::files;
use crate::model::preparation::{Loaded, Options, Preparation};
use crate::model::prepare::Prepared;
use crate::model::public::PublicPart;
use crate::model::sections::HalfLayout;
use crate::model::secure::SecureModel;
use crate::model::variant::{FILE as RECORD, Record};
use crate::model::{Checkpoint, Layered, ModelConfig};
use crate::plan::Plan;
use crate::prf::PreparationSeed;

const REMEDY: &str = "restore it from a backup, or prepare the model anew (trefoil prepare)";
const HASHES: &str = "half.sha256";
/// The largest file of a checkpoint that is copied as it is.
const COPY_LIMIT: u64 = 256 << 20;

/// A preparation at the Owner: its model, and the Helper's half of it chunk by chunk.
pub struct OwnerPreparation {
    dir: PathBuf,
    manifest: PublicManifest,
    seed: PreparationSeed,
    layout: HalfLayout,
    hashes: Vec<u8>,
    model: Arc<SecureModel>,
}

impl std::fmt::Debug for OwnerPreparation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnerPreparation")
            .field("dir", &self.dir)
            .field("id", &self.manifest.id)
            .finish_non_exhaustive()
    }
}

impl OwnerPreparation {
    /// Prepares the checkpoint in `model` with a fresh seed and writes it to the new directory `out`, which appears
    /// when it is complete. `progress` hears how many bytes of how many of the Helper's half are done.
    ///
    /// # Errors
    /// [`Error::Config`] if `out` exists; [`Error::Model`] for the checkpoint; [`Error::Io`].
    pub fn create(
        model: &Path,
        out: &Path,
        options: &Options,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<OwnerPreparation> {
        if out.symlink_metadata().is_ok() {
            return Err(Error::Config(format!(
                "--out {} exists already: a preparation is never changed (a changed model is a new preparation with a new seed); give another directory, or remove this one if no party needs it any more",
                out.display()
            )));
        }
        let id = PreparationId::random()?;
        let staging = disk::Staging::new(out, &id.to_string())?;
        let loaded = Loaded::stream(model, options)?;
        let Preparation { plan, seed, parts } = loaded.prepare()?;
        let config = loaded.weights.rest().config.clone();
        drop(loaded);

        let layout = HalfLayout::new(&config, &plan)?;
        let checkpoint = Checkpoint::open(model)?;
        let part = if PublicPart::any(&plan) { PublicPart::load(&checkpoint, &plan)? } else { PublicPart::none() };
        let hash = public_hash(&config, &plan, &part)?;
        let texts = (text(model, "config.json")?.unwrap_or_default(), text(model, "generation_config.json")?);
        let manifest = PublicManifest::new(id, texts, config.variant, plan, hash, &layout);
        let json = manifest.to_json()?;
        // What is written here must be readable anywhere.
        PublicManifest::parse(&json, "the new manifest")?;

        let dir = staging.path();
        write_public(model, &dir.join("public"), &json, &checkpoint, &part)?;
        drop(part);
        disk::write(&dir.join("seed"), &seed.to_bytes(), disk::PRIVATE)?;
        owner_file::write(&dir.join("owner.bin"), &id, &seed, &parts, &layout)?;
        let hashes = hash_chunks(&layout, &parts, &seed, progress)?;
        // With a hash of the hashes: with one of them damaged, the helper's half would seem to be another's.
        let sealed = [&hashes[..], &Sha256::digest(&hashes)].concat();
        disk::write(&dir.join(HASHES), &sealed, disk::PRIVATE)?;
        disk::write(&dir.join("manifest.json"), &json, disk::PUBLIC)?;
        staging.publish()?;
        Ok(Self::new(out, manifest, seed, layout, hashes, config, parts))
    }

    /// Opens what [`OwnerPreparation::create`] has written.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file that is missing or damaged; [`Error::Io`].
    pub fn open(dir: &Path) -> Result<OwnerPreparation> {
        let manifest = PublicManifest::read(&dir.join("manifest.json"))?;
        let config = manifest.model_config()?;
        let layout = manifest.layout(&config)?;
        let length = |path: &Path, want: u64| {
            disk::read_exact(path, want, |have| {
                Error::Model(format!("{}: has {have} bytes where {want} belong; {REMEDY}", path.display()))
            })
        };
        let seed_path = dir.join("seed");
        let seed = length(&seed_path, 32)?.try_into();
        let seed = seed.map_err(|_| Error::Model(format!("{}: is no seed; {REMEDY}", seed_path.display())))?;
        let seed = PreparationSeed::from_bytes(seed);
        let path = dir.join(HASHES);
        let mut hashes = length(&path, 32 * (layout.chunks() + 1))?;
        let seal = hashes.split_off(hashes.len() - 32);
        if seal != Sha256::digest(&hashes)[..] {
            return Err(Error::Model(format!("{}: is damaged; {REMEDY}", path.display())));
        }
        let parts = owner_file::read(&dir.join("owner.bin"), &manifest.id, &seed, &config, &manifest.plan)?;
        Ok(Self::new(dir, manifest, seed, layout, hashes, config, parts))
    }

    fn new(
        dir: &Path,
        manifest: PublicManifest,
        seed: PreparationSeed,
        layout: HalfLayout,
        hashes: Vec<u8>,
        config: ModelConfig,
        parts: Prepared,
    ) -> Self {
        let model = Arc::new(SecureModel::new(config, manifest.plan.clone(), parts));
        OwnerPreparation { dir: dir.to_path_buf(), manifest, seed, layout, hashes, model }
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What everybody may know.
    #[must_use]
    pub fn manifest(&self) -> &PublicManifest {
        &self.manifest
    }

    /// The seed, for Clients only: the Helper must never have it.
    #[must_use]
    pub fn seed(&self) -> &PreparationSeed {
        &self.seed
    }

    /// The Owner's part, shared by all sessions.
    #[must_use]
    pub fn model(&self) -> Arc<SecureModel> {
        Arc::clone(&self.model)
    }

    /// The public plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.manifest.plan
    }

    /// SHA-256 of every chunk, 32 bytes each: for the Helper only, never for a Client.
    #[must_use]
    pub fn hashes(&self) -> &[u8] {
        &self.hashes
    }

    /// Number of chunks of the Helper's half.
    #[must_use]
    pub fn chunk_count(&self) -> u64 {
        self.layout.chunks()
    }

    /// Chunk `index` of the Helper's half, made from integers and seed.
    ///
    /// # Errors
    /// [`Error::Internal`] if there is no such chunk.
    pub fn chunk(&self, index: u64) -> Result<Vec<u8>> {
        chunk(&self.layout, self.model.parts(), &self.seed, index)
    }
}

/// `A = W - B` of a few rows, packed to the bits of the ring in which they are multiplied.
fn chunk(layout: &HalfLayout, parts: &Prepared, seed: &PreparationSeed, index: u64) -> Result<Vec<u8>> {
    let none = || Error::Internal(format!("chunk {index} of {}", layout.chunks()));
    let chunk = layout.chunk(index).ok_or_else(none)?;
    parts.helper_bytes(seed, (chunk.index, chunk.section), chunk.words())
}

fn hash_chunks(
    layout: &HalfLayout,
    parts: &Prepared,
    seed: &PreparationSeed,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<u8>> {
    let (total, at_once) = (layout.chunks(), 4 * rayon::current_num_threads() as u64);
    let mut hashes = Vec::new();
    let mut done = 0;
    for from in (0..total).step_by(at_once as usize) {
        let some: Vec<([u8; 32], usize)> = (from..total.min(from + at_once))
            .into_par_iter()
            .map(|i| chunk(layout, parts, seed, i).map(|c| (disk::sha256(&c), c.len())))
            .collect::<Result<_>>()?;
        done += some.iter().map(|(_, n)| *n as u64).sum::<u64>();
        hashes.extend(some.iter().flat_map(|(h, _)| h));
        progress(done, layout.bytes());
    }
    Ok(hashes)
}

fn text(model: &Path, name: &str) -> Result<Option<String>> {
    let path = model.join(name);
    let bytes = files::read_optional(&path, COPY_LIMIT)?;
    bytes
        .map(|b| String::from_utf8(b).map_err(|_| Error::Model(format!("{}: is not UTF-8 text", path.display()))))
        .transpose()
}

/// What Clients get: the small files as they are, the manifest, and the public tensors in their own number format.
fn write_public(model: &Path, dir: &Path, manifest: &[u8], from: &Checkpoint, part: &PublicPart) -> Result<()> {
    disk::create_dir(dir, 0o755, false)?;
    let names =
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
    for name in names {
        if let Some(bytes) = files::read_optional(&model.join(name), COPY_LIMIT)? {
            disk::write(&dir.join(name), &bytes, disk::PUBLIC)?;
        }
    }
    disk::write(&dir.join("manifest.json"), manifest, disk::PUBLIC)?;
    if let Some(variant) = from.config().variant {
        // The shape alone: how the model was made is the provider's business.
        let record = Record { version: Record::VERSION, variant: Some(variant), ..Record::default() };
        let json = serde_json::to_vec_pretty(&record).map_err(|e| Error::Internal(format!("{RECORD}: {e}")))?;
        disk::write(&dir.join(RECORD), &json, disk::PUBLIC)?;
    }
    let tensors = part.tensors()?;
    if !tensors.is_empty() {
        let path = dir.join("model.safetensors");
        let mut views = Vec::with_capacity(tensors.len());
        for (name, shape, _) in tensors {
            let (dtype, bytes) = from.stored(&name, &shape)?;
            let view = TensorView::new(dtype, shape, bytes).map_err(|e| Error::Internal(format!("{name}: {e}")))?;
            views.push((name, view));
        }
        safetensors::serialize_to_file(views, None, &path).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(e) => disk::failed(&path, e),
            e => Error::Internal(format!("{}: {e}", path.display())),
        })?;
        // The library makes its files private; this one is for everybody, as those beside it.
        let public = std::fs::Permissions::from_mode(disk::PUBLIC);
        let synced = std::fs::File::open(&path).and_then(|f| f.set_permissions(public).and_then(|()| f.sync_all()));
        synced.map_err(|e| disk::failed(&path, e))?;
    }
    disk::sync_dir(dir)
}
