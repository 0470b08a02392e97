//! The private transformer (a Llama and its like; an encoder, to compare with): one program, walked by all three parties.
//!
//! It reads like the float twin ([`crate::model::float`]): norm, attention, norm, MLP, head. Every line is an operation of
//! [`crate::protocol`] on masked values, with the ring widths of the public plan.

mod attention;
mod head;
mod mlp;
mod norm;
pub mod projection;

use std::sync::Mutex;
use std::sync::mpsc::Sender;

use super::ModelConfig;
use super::float::rope_frequencies;
use super::prepare::Prepared;
use crate::error::{Error, Result};
use crate::plan::{F, F_QK, Plan, block, product_ring};
use crate::protocol::cached::Cached;
use crate::protocol::guard::RangeFlags;
use crate::protocol::gumbel::Gumbel;
use crate::protocol::{embedding, input, last_tokens};
use crate::session::{Pass, Scope, Session};
use crate::share::{Masked, Rows};
use attention::AttentionTables;
use mlp::MlpTables;
use norm::{Norm, Roots};

/// One party's model: its prepared part and the public tables of the plan.
pub struct SecureModel {
    config: ModelConfig,
    plan: Plan,
    parts: Prepared,
    layers: Vec<LayerTables>,
    final_norm: Norm,
    frequencies: Vec<f64>,
}

impl std::fmt::Debug for SecureModel {
    /// Without its part, which is secret at every party.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecureModel").field("config", &self.config).finish_non_exhaustive()
    }
}

struct LayerTables {
    input_norm: Norm,
    attention: AttentionTables,
    post_norm: Norm,
    mlp: MlpTables,
}

/// Whether the tables of functions hold anything.
#[derive(Clone, Copy)]
enum Tables {
    Fitted,
    /// For walks that count: sizes are all that matters.
    Blank,
}

/// Which rows of a layer's output something reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Those of all tokens: the next layer, or a head of all.
    Every,
    /// Those of each pass's last token: the head. Keys and values are of all tokens, all behind the scores of these alone, and queries too
    /// unless an adapter or a norm stands behind their projection.
    Last,
}

/// Keys and values of a request, one party's part.
pub struct KvCache {
    layers: Vec<(Cached, Cached)>,
    positions: usize,
}

impl KvCache {
    /// As if `positions` positions were cached, with small values known to all: see [`Cached::preload`].
    pub fn preload(&mut self, role: crate::Role, positions: usize) {
        for (keys, values) in &mut self.layers {
            // Pseudorandom in about [-0.25, 0.25) with F_QK and F fraction bits.
            let small = |i: usize, bits: u32| {
                ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - bits)) as i64 - (1i64 << (bits - 1))
            };
            keys.preload(role, positions, |i| small(i, F_QK - 1));
            values.preload(role, positions, |i| small(i + 1, F - 1));
        }
        self.positions += positions;
    }

    /// After a pass over `tokens` positions.
    pub fn advance(&mut self, tokens: usize) {
        self.positions += tokens;
    }

    /// Forgets all positions from `positions` on. At the Helper the jobs of all passes so far must be done: they fill the
    /// cache behind its walk.
    pub fn truncate(&mut self, positions: usize) {
        for (keys, values) in &mut self.layers {
            keys.truncate(positions);
            values.truncate(positions);
        }
        self.positions = self.positions.min(positions);
    }

    /// Positions cached so far.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.positions
    }
}

/// Where the Client's online thread takes inputs from and puts outputs to. Other parties have none.
pub struct ClientPorts {
    /// Hidden states (ring elements) or token ids, a vector per pass.
    pub source: input::InputSource,
    /// The chosen tokens of each pass: one, or one for each position.
    pub token: Sender<Vec<u64>>,
    /// The range flags of each pass.
    pub flags: Sender<Vec<u64>>,
    /// Logits, if they are opened for a check.
    pub logits: Option<Sender<Vec<u64>>>,
    /// What each range flag stands for; set when a pass has been walked.
    pub names: Mutex<Vec<(String, &'static str)>>,
}

/// What a pass needs beyond model and cache.
pub struct PassOptions<'a> {
    /// The Client's ports.
    pub ports: Option<&'a ClientPorts>,
    /// The Owner's sampling noise.
    pub noise: Option<&'a mut Gumbel>,
    /// Open the logits to the Client (a named option: they are more than the tokens).
    pub open_logits: bool,
    /// A token for every position of a pass, instead of the last one only: to verify drafts.
    pub every: bool,
    /// Filled with the causal depth after the input and after each layer (Owner).
    pub depths: Option<&'a mut Vec<u32>>,
}

/// Fraction bits and ring of opened logits.
#[must_use]
pub fn logit_format(plan: &Plan) -> (u32, u32) {
    (F + plan.head.f_weight, 64 - plan.head.norm.f_gain)
}

impl SecureModel {
    /// From a party's prepared part.
    #[must_use]
    pub fn new(config: ModelConfig, plan: Plan, parts: Prepared) -> Self {
        Self::with_tables(config, plan, parts, Tables::Fitted)
    }

    /// The shapes alone, for walks that count; the same at every party.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] for a plan that has not passed [`Plan::check`].
    pub(crate) fn shape(config: ModelConfig, plan: Plan) -> Result<Self> {
        let parts = Prepared::shape(&config, &plan)?;
        Ok(Self::with_tables(config, plan, parts, Tables::Blank))
    }

    fn with_tables(config: ModelConfig, plan: Plan, parts: Prepared, tables: Tables) -> Self {
        let eps = config.rms_norm_eps;
        let n = config.hidden_size;
        let mut roots = Roots::new(tables, eps);
        let layers = plan
            .layers
            .iter()
            .enumerate()
            .map(|(i, l)| (config.layer(plan.first_private + i), l))
            .map(|(shape, l)| LayerTables {
                input_norm: Norm::new(&l.input_norm, n, &mut roots),
                attention: AttentionTables::new(&l.attention, shape, config.head_dim, tables, &mut roots),
                post_norm: Norm::new(&l.post_norm, n, &mut roots),
                mlp: MlpTables::new(&l.mlp, &config, shape),
            })
            .collect();
        let final_norm = Norm::new(&plan.head.norm, n, &mut roots);
        let frequencies = rope_frequencies(&config);
        SecureModel { config, plan, parts, layers, final_norm, frequencies }
    }

    /// The model's public configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The public plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// This party's part.
    pub(crate) fn parts(&self) -> &Prepared {
        &self.parts
    }

    /// An empty cache with room for `capacity` positions.
    #[must_use]
    pub fn cache(&self, capacity: usize) -> KvCache {
        let c = &self.config;
        let layers = self
            .plan
            .layers
            .iter()
            .enumerate()
            .map(|(i, l)| {
                let (a, width) = (&l.attention, c.layer(self.plan.first_private + i).kv_size());
                let keys = Cached::new(width, product_ring(a.score_proven), F_QK, capacity);
                (keys, Cached::new(width, a.prob_k, F, capacity))
            })
            .collect();
        KvCache { layers, positions: 0 }
    }

    /// An empty collection of range flags for the current batch, its counters sized by public facts: the same at every party.
    #[must_use]
    pub fn new_flags(&self, s: &Session) -> RangeFlags {
        let c = &self.config;
        let tokens = s.passes().iter().map(|p| p.tokens.len()).max().unwrap_or(1);
        // A walk that counts may stand for a longer prompt.
        let tokens = s.work().and_then(|w| w.tokens()).unwrap_or(tokens);
        let heads = (0..c.num_layers).map(|i| c.layer(i).num_heads).max().unwrap_or(0);
        let per_token = (heads * c.max_positions).max(c.intermediate_size).max(c.hidden_size);
        RangeFlags::new(tokens * per_token)
    }

    /// Rows of the blocks in which a pass goes through attention: see [`block`]. All rows, of passes that are walked together, of which
    /// none may be as long as to be cut: the Owner, who walks each by itself, would cut it.
    fn block_rows(&self, s: &Session, first: usize) -> Result<usize> {
        let forced = s.work().and_then(|w| w.block_rows());
        let rows = |from, tokens| forced.unwrap_or_else(|| block::rows(&self.config, &self.plan, from, tokens));
        if s.passes().len() == 1 {
            return Ok(rows(first, s.tokens()));
        }
        let cut = |p: &Pass| rows(first + p.tokens.start, p.tokens.len()) < p.tokens.len();
        match s.passes().iter().any(cut) {
            true => Err(Error::Internal("a prompt in blocks is walked by itself".into())),
            false => Ok(s.tokens()),
        }
    }

    /// One layer: `h` in the residual ring, in and out; out come the rows that are wanted.
    ///
    /// # Errors
    /// [`crate::Error::Peer`], [`crate::Error::Reuse`], [`crate::Error::Shape`].
    pub fn layer(
        &self,
        s: &mut Session,
        index: usize,
        h: Masked,
        wanted: Wanted,
        (cache, flags): (&mut KvCache, &mut RangeFlags),
    ) -> Result<Masked> {
        let (plan, tables, parts) = (&self.plan.layers[index], &self.layers[index], &self.parts.layers[index]);
        let layer = self.plan.first_private + index;
        let scope = Scope::layer(layer);
        let name = layer.to_string();
        let mut ctx = Context { s, scope: &scope, layer: &name, flags, config: &self.config, pieces: self.plan.pieces };
        let x = tables.input_norm.apply(&mut ctx, "norm1", "sum of squares before attention", &h, &plan.input_norm)?;
        let first = cache.positions;
        if self.config.encoder() && (first > 0 || ctx.s.passes().len() != 1) {
            return Err(Error::Internal("an encoder has one pass, which is walked by itself".into()));
        }
        let block_rows = match wanted {
            Wanted::Every => self.block_rows(ctx.s, first)?,
            // One of each pass is no block.
            Wanted::Last => x.rows().tokens(),
        };
        let blocks = x.rows().tokens() > block_rows;
        let a = attention::Attention {
            parts,
            plan: &plan.attention,
            tables: &tables.attention,
            frequencies: &self.frequencies,
            first,
            block_rows,
            wanted,
        };
        let a = a.apply(&mut ctx, &x, &mut cache.layers[index])?;
        let h = match wanted {
            Wanted::Every => h,
            Wanted::Last => last_tokens(ctx.s, &h),
        };
        let h = h.add(&a.narrow(self.plan.residual_k)?)?;
        let x = tables.post_norm.apply(&mut ctx, "norm2", "sum of squares before the MLP", &h, &plan.post_norm)?;
        let m = mlp::mlp(&mut ctx, &x, parts, &plan.mlp, &tables.mlp)?;
        if blocks {
            flags.fold(s, &scope.at("guard"), &last_row(h.rows().tokens()))?;
        }
        h.add(&m.narrow(self.plan.residual_k)?)
    }

    /// One pass over the session's current batch: input to opened token (with `every`, tokens).
    ///
    /// # Errors
    /// [`crate::Error::Peer`], [`crate::Error::Reuse`], [`crate::Error::Shape`].
    pub fn pass(&self, s: &mut Session, cache: &mut KvCache, mut o: PassOptions<'_>) -> Result<()> {
        let tokens = s.tokens();
        let source = o.ports.map(|p| &p.source);
        let k = self.plan.residual_k;
        let scope = Scope::new("input");
        let mut h = match &self.parts.embedding {
            Some(table) => embedding::embed(s, &scope, table, tokens, k, source)?,
            None => input::input(s, &scope, &Rows::even(tokens, self.config.hidden_size), k, F, source)?,
        };
        let mut flags = self.new_flags(s);
        if let Some(depths) = &mut o.depths {
            depths.push(s.depth());
        }
        for index in 0..self.layers.len() {
            let wanted = if index + 1 == self.layers.len() && !o.every { Wanted::Last } else { Wanted::Every };
            h = self.layer(s, index, h, wanted, (&mut *cache, &mut flags))?;
            if let Some(depths) = &mut o.depths {
                depths.push(s.depth());
            }
        }
        cache.advance(tokens);
        head::head(self, s, &h, flags, o)
    }
}

/// An element at the last of `tokens` tokens.
fn last_row(tokens: usize) -> Rows {
    Rows::ragged((1..=tokens).map(|t| usize::from(t == tokens)))
}

/// What every part of a layer needs.
struct Context<'a> {
    s: &'a mut Session,
    scope: &'a Scope,
    layer: &'a str,
    flags: &'a mut RangeFlags,
    config: &'a ModelConfig,
    /// Most pieces of a prompt in an exchange.
    pieces: usize,
}
