//! The three parties in one process: three threads (and the Helper's and Client's run-ahead threads) that share nothing
//! but channels.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ndarray::Array1;
use serde::Serialize;

use super::{Client, Draft, Generation, Grant, OwnerReport, helper, lost, owner};
use crate::error::{Error, PeerFault, Result};
use crate::model::preparation::{self, Loaded, Preparation};
use crate::model::prepare::Prepared;
use crate::model::progress::{Progress, Stage};
use crate::model::sections::{HalfLayout, sections};
use crate::model::secure::SecureModel;
use crate::model::{ModelConfig, Weights};
use crate::net::shape::Profile;
use crate::net::{Lane, blame};
use crate::party::Role;
use crate::plan::Plan;
use crate::prf::{Address, AddressLog, PreparationSeed};
use crate::ring::{Packed, pack};
use crate::session::Scope;
use crate::world::{Keys, Setup, World, first_cause};

/// How to run the three parties.
#[derive(Clone)]
pub struct LocalOptions {
    /// Private layers; `None` is all of them and the embedding.
    pub private_layers: Option<usize>,
    /// Limit on positions: prompt and answer together, but for the answer's last token. Shortens the model's own context.
    pub max_positions: Option<usize>,
    /// The public base: where its final norm and head are this model's bit for bit, they are public.
    pub base: Option<PathBuf>,
    /// An adapter over the model, which is then its public base.
    pub adapter: Option<PathBuf>,
    /// Text for calibration instead of the built-in one.
    pub calibration_text: Option<String>,
    /// Channels and what watches them.
    pub setup: Setup,
    /// The session's keys; fresh ones by default.
    pub keys: Option<Keys>,
    /// Records PRF addresses (tests).
    pub addresses: Option<AddressLog>,
    /// Scores that attention computes at once, instead of what the plan says (tests).
    pub block_scores: Option<usize>,
    /// Who is told how far loading and preparing the model are.
    pub progress: Progress,
}

impl LocalOptions {
    /// `private_layers` as in the field of this name; no simulated network, fresh keys.
    #[must_use]
    pub fn new(private_layers: Option<usize>) -> Self {
        LocalOptions {
            private_layers,
            max_positions: None,
            base: None,
            adapter: None,
            calibration_text: None,
            setup: Setup { ahead_capacity: 256 << 20, timeout: Duration::from_secs(600), ..Setup::default() },
            keys: None,
            addresses: None,
            block_scores: None,
            progress: Progress::default(),
        }
    }

    fn preparation(&self) -> preparation::Options {
        preparation::Options {
            private_layers: self.private_layers,
            max_positions: self.max_positions,
            base: self.base.clone(),
            adapter: self.adapter.clone(),
            calibration_text: self.calibration_text.clone(),
            net: Some(self.setup.profile),
            cores: None,
            progress: self.progress.clone(),
        }
    }

    /// On a simulated network.
    #[must_use]
    pub fn net(mut self, profile: Profile) -> Self {
        self.setup.profile = profile;
        self
    }
}

/// Bytes and messages of a directed link.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct LinkReport {
    /// Online bytes, message headers included.
    pub online_bytes: u64,
    /// Run-ahead bytes.
    pub ahead_bytes: u64,
    /// Messages on both lanes.
    pub messages: u64,
}

/// A running trio, seen from the Client.
pub struct Local {
    client: Client,
    world: World,
    owner: JoinHandle<Result<OwnerReport>>,
    helper: JoinHandle<Result<()>>,
    plan: Plan,
    /// Bytes that preparing the model sent to Helper and Client.
    preparation_bytes: u64,
    /// Time that calibration and preparation took.
    preparation: Duration,
    base: BTreeMap<String, LinkReport>,
}

fn prepare_scope() -> Scope {
    Scope::new("prepare")
}

impl Local {
    /// Loads a checkpoint, calibrates it, prepares it with a fresh seed and starts the parties.
    ///
    /// # Errors
    /// [`Error::Model`] for the checkpoint, [`Error::Config`] for the options.
    pub fn open(dir: &Path, options: LocalOptions) -> Result<Local> {
        Local::begin(Loaded::open(dir, &options.preparation())?, options)
    }

    /// From weights in memory; `text` is what calibration reads.
    ///
    /// # Errors
    /// As [`Local::open`].
    pub fn start(weights: Weights, text: Option<Vec<u32>>, options: LocalOptions) -> Result<Local> {
        Local::begin(Loaded::new(weights, text, &options.preparation())?, options)
    }

    fn begin(loaded: Loaded, options: LocalOptions) -> Result<Local> {
        let (config, split) = (loaded.weights.config.clone(), loaded.split);
        // What the Client has on its own disk: the public part of the checkpoint, and nothing else.
        let public = (!split.private_embedding).then(|| Weights {
            config: ModelConfig { num_layers: split.first_private, ..config.clone() },
            embed: loaded.weights.embed.clone(),
            layers: loaded.weights.layers[..split.first_private].to_vec(),
            norm: Array1::zeros(0),
            head: None,
            head_bias: None,
        });
        let keys = match &options.keys {
            Some(keys) => keys.clone(),
            None => Keys::fresh()?,
        };
        let setup = Setup { addresses: options.addresses.clone(), ..options.setup.clone() };
        let (world, idle) = (World::new(keys, &setup), setup.timeout);
        let begun = Instant::now();
        let (ready, prepared) = channel();
        let owner = spawn(&world, Role::Owner, {
            let mut session = world.session(Role::Owner);
            move || {
                let model = prepare_owner(&session, loaded, options.block_scores)?;
                ready.send(model.plan().clone()).map_err(|_| lost("the client"))?;
                owner(&mut session, &model, &Grant::all(idle))
            }
        });
        let helper = spawn(&world, Role::Helper, {
            let (mut session, config) = (world.session(Role::Helper), config.clone());
            move || {
                let plan = receive_plan(&session, &config)?;
                let parts = receive_parts(&session, &config, &plan)?;
                let model = SecureModel::new(config, plan, parts);
                helper(&mut session, &model, &Grant::all(idle))
            }
        });
        let session = world.session(Role::Client);
        let client = receive_plan(&session, &config).and_then(|plan| {
            let step = prepare_scope().address(0, "prepare.seed");
            let seed = session.links().recv(Role::Owner, Lane::Online, &step, 32)?;
            let seed = seed.try_into().map_err(|_| lost("the seed"))?;
            let mut index = 0;
            let parts = Prepared::client(&config, &plan, &PreparationSeed::from_bytes(seed), &mut |n| {
                let step = words_step(index);
                index += 1;
                crate::session::recv_words(session.links(), Role::Owner, Lane::Online, &step, n, 32)
            })?;
            Ok(Client::new(session, SecureModel::new(config, plan, parts), public))
        });
        let plan = wait(&prepared);
        let (client, plan) = match (client, plan) {
            (Ok(client), Some(plan)) => (client, plan),
            (client, _) => {
                world.close();
                let errors = [client.err(), finished(owner).err(), finished(helper).err()];
                return Err(first_cause(errors.into_iter().flatten()));
            }
        };
        let mut local = Local {
            client,
            world,
            owner,
            helper,
            plan,
            preparation_bytes: 0,
            preparation: begun.elapsed(),
            base: BTreeMap::new(),
        };
        local.preparation_bytes = local.links().values().map(|l| l.online_bytes + l.ahead_bytes).sum();
        local.base = local.links();
        Ok(local)
    }

    /// The public plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The meters and links behind the parties.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Bytes sent and time taken for the preparation.
    #[must_use]
    pub fn preparation(&self) -> (u64, Duration) {
        (self.preparation_bytes, self.preparation)
    }

    /// Generates, see [`Client::generate`]. After an error the trio is spent: the root cause is returned.
    ///
    /// # Errors
    /// As [`Client::generate`], or the party's error that caused it.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        temperature: f64,
        seed: u64,
        open_logits: bool,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generation> {
        self.client.generate(prompt, max_new, temperature, seed, open_logits, on_token)
    }

    /// Generates with drafts from now on, see [`Client::draft_with`].
    ///
    /// # Errors
    /// As [`Client::draft_with`].
    pub fn draft_with(&mut self, draft: Draft) -> Result<()> {
        self.client.draft_with(draft)
    }

    /// Traffic since the preparation, by directed link.
    #[must_use]
    pub fn links(&self) -> BTreeMap<String, LinkReport> {
        let mut out = BTreeMap::new();
        for from in Role::ALL {
            for to in Role::ALL.into_iter().filter(|&to| to != from) {
                let name = format!("{from}->{to}");
                let t = self.world.sent(from, to);
                let b = self.base.get(&name).copied().unwrap_or_default();
                let link = LinkReport {
                    online_bytes: t.online_bytes - b.online_bytes,
                    ahead_bytes: t.ahead_bytes - b.ahead_bytes,
                    messages: t.messages + t.ahead_messages - b.messages,
                };
                out.insert(name, link);
            }
        }
        out
    }

    /// Ends the session and returns what the Owner saw.
    ///
    /// # Errors
    /// The first error of a party that is not another's consequence.
    pub fn finish(self) -> Result<OwnerReport> {
        let ended = self.client.finish();
        if ended.is_err() {
            self.world.close();
        }
        let (owner, helper) = (finished(self.owner), finished(self.helper));
        match (ended, owner, helper) {
            (Ok(()), Ok(report), Ok(())) => Ok(report),
            (a, b, c) => Err(first_cause([a.err(), b.err(), c.err()].into_iter().flatten())),
        }
    }

    /// After a failed [`Local::generate`]: ends all parties and returns the root cause, of which `error` may be a
    /// consequence.
    #[must_use]
    pub fn root_cause(self, error: Error) -> Error {
        self.world.close();
        let others = [finished(self.owner).err(), finished(self.helper).err()];
        first_cause(std::iter::once(error).chain(others.into_iter().flatten()))
    }
}

fn spawn<T: Send + 'static>(
    world: &World,
    role: Role,
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> JoinHandle<Result<T>> {
    let links = world.session(role).links().clone();
    std::thread::spawn(move || {
        let out = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
            .unwrap_or_else(|_| Err(Error::Internal(format!("the {role}'s thread panicked"))));
        if let Err(e) = &out {
            links.abort(e);
        }
        out
    })
}

fn wait<T>(r: &Receiver<T>) -> Option<T> {
    r.recv().ok()
}

fn finished<T>(h: JoinHandle<Result<T>>) -> Result<T> {
    h.join().unwrap_or_else(|_| Err(Error::Internal("a party's thread panicked".into())))
}

/// The Owner: prepares, then gives each peer its part.
fn prepare_owner(s: &crate::session::Session, loaded: Loaded, block_scores: Option<usize>) -> Result<SecureModel> {
    let Preparation { mut plan, seed, parts } = loaded.prepare()?;
    plan.block_scores = block_scores.unwrap_or(plan.block_scores);
    let json = serde_json::to_vec(&plan).map_err(|e| Error::Internal(format!("writing the plan: {e}")))?;
    let links = s.links().clone();
    let at = |label| prepare_scope().address(0, label);
    for to in [Role::Client, Role::Helper] {
        links.send(to, Lane::Online, &at("prepare.length"), (json.len() as u64).to_le_bytes().to_vec())?;
        links.send(to, Lane::Online, &at("prepare.plan"), json.clone())?;
    }
    links.send(Role::Client, Lane::Online, &at("prepare.seed"), seed.to_bytes().to_vec())?;
    let mut public = 0;
    let layout = HalfLayout::new(&loaded.weights.config, &plan)?;
    let (mut sent, total) = (0, layout.bytes());
    // Packed as the Helper keeps them: nobody ever has a matrix in words of 8 bytes.
    for (i, section) in sections(&loaded.weights.config, &plan)?.iter().enumerate() {
        let bytes = parts.helper_bytes(&seed, (i, section), 0..section.rows * section.cols)?;
        if section.public {
            links.send(Role::Client, Lane::Online, &words_step(public), bytes.clone())?;
            public += 1;
        }
        sent += bytes.len() as u64;
        loaded.progress.tell(Stage::Shares, sent, total);
        links.send(Role::Helper, Lane::Online, &words_step(i as u64), bytes)?;
    }
    Ok(SecureModel::new(loaded.weights.config, plan, parts))
}

fn words_step(index: u64) -> Address {
    prepare_scope().address(index, "prepare.words")
}

/// More than any plan needs; a peer cannot make us allocate beyond it.
const MAX_PLAN_BYTES: u64 = 16 << 20;

fn receive_plan(s: &crate::session::Session, config: &ModelConfig) -> Result<Plan> {
    let step = prepare_scope().address(0, "prepare.length");
    let length = s.links().recv(Role::Owner, Lane::Online, &step, 8)?;
    let length = length.try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX);
    let step = prepare_scope().address(0, "prepare.plan");
    if length > MAX_PLAN_BYTES {
        return Err(blame(Role::Owner, &step, PeerFault::Malformed("an oversize plan")));
    }
    let json = s.links().recv(Role::Owner, Lane::Online, &step, length as usize)?;
    let bad = |what| blame(Role::Owner, &step, PeerFault::Malformed(what));
    let plan: Plan = serde_json::from_slice(&json).map_err(|_| bad("a plan that is none"))?;
    plan.check(config).map_err(bad)?;
    Ok(plan)
}

fn receive_parts(s: &crate::session::Session, config: &ModelConfig, plan: &Plan) -> Result<Prepared> {
    let mut index = 0;
    Prepared::helper_packed(config, plan, &mut |section| {
        let step = words_step(index);
        index += 1;
        let n = section.rows * section.cols;
        let bytes = s.links().recv(Role::Owner, Lane::Online, &step, pack::packed_len(n, section.bits()))?;
        let packed = Packed::from_bytes(Arc::new(bytes), 0, n, n, section.bits());
        packed.ok_or_else(|| Error::Internal("fewer bytes than asked for".into()))
    })
}
