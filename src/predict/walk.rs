//! The walk of a request that counts instead of computing.
//!
//! Long requests are walked in part and the rest is extrapolated without loss:
//!
//! - A message of a decode pass at position `p` carries `n = c + v p` elements of `k` bits in `ceil(n k / 8)` bytes: from `p` to
//!   `p + 8` that grows by `v k` whole bytes. So the traffic of eight passes in a row grows by the same amount from each eight
//!   to the next: two such blocks say all.
//! - A message of a prefill of `t` tokens carries `n = a + b t + c h t (t + 1) / 2` elements (of an encoder `c h t^2`), `h` the number of heads. From `t` to
//!   `t + 8` (16 if `h` is odd) `n` grows by a multiple of 8, so its bytes are a polynomial of degree 2 along such steps: three
//!   short prompts say all, once their range flags' counters are as wide as the long one's and their norms take its windows.
//! - A prompt that goes through attention in blocks ([`crate::plan::block`]) carries the same elements, whole bytes of them in each block
//!   but the last. So each further block adds the same: its messages' headers, their number, and what waits for them. The three
//!   short prompts are cut into two blocks, and one of them into three as well.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};

use super::RUN_AHEAD;
use crate::error::{Error, Result};
use crate::generate::{MAX_BATCH, control_cost, next_batch};
use crate::model::ModelConfig;
use crate::model::secure::{ClientPorts, KvCache, PassOptions, SecureModel};
use crate::net::Lane;
use crate::net::meter::LinkTotals;
use crate::party::Role;
use crate::plan::work::{Longer, Table, Work};
use crate::plan::{Plan, block};
use crate::protocol::embedding;
use crate::protocol::gumbel::Gumbel;
use crate::world::World;

/// Decode passes after which the traffic repeats its growth: those that make any width a whole number of bytes.
const PERIOD: usize = 8;

/// Traffic by directed link, `[from][to]`.
pub type Links = [[LinkTotals; 3]; 3];

/// Bytes of all links of a lane.
#[must_use]
pub fn bytes(links: &Links, lane: Lane) -> u64 {
    links.iter().flatten().map(|l| if lane == Lane::Online { l.online_bytes } else { l.ahead_bytes }).sum()
}

fn each(a: &Links, b: &Links, f: impl Fn(u64, u64) -> u64) -> Links {
    let mut out = *a;
    out.as_flattened_mut().iter_mut().zip(b.as_flattened()).for_each(|(o, b)| *o = o.zip(b, &f));
    out
}

fn sum(a: &Links, b: &Links) -> Links {
    each(a, b, |a, b| a + b)
}

/// A stretch of passes.
#[derive(Clone, Debug, Default)]
pub struct Stretch {
    /// Passes in it.
    pub passes: usize,
    /// Positions in it.
    pub tokens: usize,
    /// Batches in which its passes are walked ahead: what is once for all rows of one is in `work` as often.
    pub batches: usize,
    /// Traffic of the requests' control messages included.
    pub links: Links,
    /// Longest chain of online messages, all passes together.
    pub depth: u32,
    /// Work of all passes together (of a stretch that was extrapolated: scaled from what was walked).
    pub work: Table,
}

/// What a request takes.
#[derive(Clone, Debug)]
pub struct Walked {
    /// The pass over the prompt.
    pub prefill: Stretch,
    /// All decode passes.
    pub decode: Stretch,
    /// What ends the request: where the run-ahead data ends.
    pub end: Links,
    /// Messages in sequence of each private layer.
    pub layer_messages: Vec<u32>,
}

impl Walked {
    /// The whole request, from its announcement to its end.
    #[must_use]
    pub fn total(&self) -> Links {
        sum(&sum(&self.prefill.links, &self.decode.links), &self.end)
    }
}

struct Walker<'a> {
    model: &'a SecureModel,
    caches: [Mutex<KvCache>; 3],
    next_pass: u64,
}

/// One run: traffic, depth, work, messages of the layers of its last pass.
struct Run {
    links: Links,
    depth: u32,
    work: Table,
    layers: Vec<u32>,
}

impl<'a> Walker<'a> {
    /// With `cached` positions cached.
    fn new(model: &'a SecureModel, cached: usize) -> Self {
        let caches = Role::ALL.map(|role| {
            let mut cache = model.cache(cached + 2 * PERIOD);
            cache.preload(role, cached);
            Mutex::new(cache)
        });
        Walker { model, caches, next_pass: 1 }
    }

    fn run(&mut self, passes: &[usize]) -> Result<Run> {
        self.run_as(passes, Work::default())
    }

    fn run_as(&mut self, passes: &[usize], work: Work) -> Result<Run> {
        let work = Arc::new(work);
        let world = World::counting(Arc::clone(&work));
        let (inputs, source) = channel();
        let ((token, _tokens), (flags, _flags)) = (channel(), channel());
        let width = if self.model.plan().private_embedding { 1 } else { self.model.config().hidden_size };
        for n in passes {
            inputs.send(vec![0; n * width]).map_err(|_| Error::Internal("the walk's input".into()))?;
        }
        let source = embedding::source(source);
        let ports = ClientPorts { source, token, flags, logits: None, names: Default::default() };
        let layers = Mutex::new(Vec::new());
        world.run(self.next_pass, passes, |s| {
            let role = s.role();
            let mut cache = self.caches[role.index()].lock().unwrap_or_else(PoisonError::into_inner);
            let (mut noise, mut depths) = (Gumbel::new(0, 0.0), Vec::new());
            let options = PassOptions {
                ports: (role == Role::Client).then_some(&ports),
                noise: (role == Role::Owner).then_some(&mut noise),
                open_logits: false,
                every: false,
                depths: (role == Role::Owner).then_some(&mut depths),
            };
            self.model.pass(s, &mut cache, options)?;
            if role == Role::Owner {
                *layers.lock().unwrap_or_else(PoisonError::into_inner) = depths;
            }
            Ok(())
        })?;
        self.next_pass += passes.len() as u64;
        let links = Role::ALL
            .map(|from| Role::ALL.map(|to| if from == to { LinkTotals::default() } else { world.sent(from, to) }));
        let depth = world.meter(Role::Client).depth();
        let layers = layers.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Run { links, depth, work: work.table(), layers })
    }
}

fn add(a: &mut Table, b: &Table) {
    let cells = |t: &Table| t.iter().flatten().flatten().copied().collect::<Vec<_>>();
    a.iter_mut().flatten().flatten().zip(cells(b)).for_each(|(a, b)| *a += b);
}

fn control(request: bool, passes: u64, end: bool) -> Links {
    let cost = control_cost(request, passes, end);
    Role::ALL.map(|from| {
        Role::ALL.map(|to| {
            let (online, ahead) = (cost.online(from, to), cost.ahead(from, to));
            LinkTotals {
                online_bytes: online.bytes,
                ahead_bytes: ahead.bytes,
                messages: online.messages,
                ahead_messages: ahead.messages,
            }
        })
    })
}

impl Cells for Run {
    fn zip(&self, o: &Run, f: impl Fn(u64, u64) -> u64 + Copy) -> Run {
        let mut work = self.work;
        let others = o.work.iter().flatten().flatten();
        work.iter_mut().flatten().flatten().zip(others).for_each(|(a, b)| *a = a.zip(*b, f));
        let depth = |a: u32, b: u32| f(a.into(), b.into()) as u32;
        let layers = self.layers.iter().zip(&o.layers).map(|(a, b)| depth(*a, *b)).collect();
        Run { links: each(&self.links, &o.links, f), depth: depth(self.depth, o.depth), work, layers }
    }
}

/// What a pass takes, as numbers that can be extrapolated.
pub(crate) trait Cells: Sized {
    /// Number by number.
    fn zip(&self, o: &Self, f: impl Fn(u64, u64) -> u64 + Copy) -> Self;
}

/// The pass `n` steps after `a`, of three a step apart whose second differences stay (Newton's forward differences).
fn extrapolated<T: Cells>([a, b, c]: &[T; 3], n: u64) -> T {
    let (first, second) = (b.zip(a, |b, a| b - a), c.zip(a, |c, a| c + a).zip(b, |ca, b| ca - 2 * b));
    a.zip(&first, |a, d| a + n * d).zip(&second, |v, d| v + n * n.saturating_sub(1) / 2 * d)
}

/// The pass over a prompt as `run` walks it, of a long one from a few short ones that it walks for it.
pub(crate) fn prefill<T: Cells>(
    c: &ModelConfig,
    plan: &Plan,
    prompt: usize,
    run: &mut dyn FnMut(usize, Work) -> Result<T>,
) -> Result<T> {
    let even = (0..c.num_layers).all(|i| c.layer(i).num_heads.is_multiple_of(2));
    let step = if even { PERIOD } else { 2 * PERIOD };
    let rest = match prompt % step {
        0 => step,
        rest => rest,
    };
    let blocks = prompt.div_ceil(block::rows(c, plan, 0, prompt));
    // Of one block, or of two with a last one as long as what the whole prompt has beyond its steps. A single token would not tell a row of
    // a long prompt from the one that a head reads.
    let shortest = if blocks == 1 && rest > 1 { rest } else { rest + step };
    if prompt <= shortest + 3 * step {
        return run(prompt, Work::default());
    }
    let mut short = |tokens: usize, rows: usize| {
        let block_rows = (blocks > 1).then_some(rows);
        run(tokens, Work::standing_for(Longer { tokens: prompt, block_rows }))
    };
    let [a, b, c] = [shortest, shortest + step, shortest + 2 * step];
    let three = [short(a, a - rest)?, short(b, b - rest)?, short(c, c - rest)?];
    let all = extrapolated(&three, ((prompt - shortest) / step) as u64);
    if blocks <= 2 {
        return Ok(all);
    }
    let more = short(b, step)?.zip(&three[1], |three, two| three - two);
    Ok(all.zip(&more, |a, d| a + (blocks - 2) as u64 * d))
}

/// Batches of the decode passes of `stretch` where the Owner buffers as much as it does by default.
fn batches(stretch: &Stretch) -> usize {
    let to_owner = |from: Role| stretch.links[from.index()][Role::Owner.index()].ahead_bytes;
    let each = to_owner(Role::Client).max(to_owner(Role::Helper)) / stretch.passes.max(1) as u64;
    let room = usize::try_from(RUN_AHEAD / 2 / each.max(1)).unwrap_or(MAX_BATCH);
    let (mut batches, mut batch, mut left) = (0, 0, stretch.passes);
    while left > 0 {
        batch = next_batch(batch, room).min(left);
        left -= batch;
        batches += 1;
    }
    batches
}

/// Walks a request of `prompt` tokens and `decode` further passes.
///
/// # Errors
/// [`Error::Config`] for a request beyond the plan's context.
pub fn walk(config: &ModelConfig, plan: &Plan, prompt: usize, decode: usize) -> Result<Walked> {
    if prompt == 0 || prompt + decode > plan.max_positions {
        return Err(Error::Config(format!(
            "--prefill {prompt} and {decode} decode passes: give 1 to {} positions in all (the context of the plan)",
            plan.max_positions
        )));
    }
    if config.encoder() && decode > 0 {
        let text = "--decode: an encoder has the one pass and nothing to decode; give --decode 1";
        return Err(Error::Config(text.into()));
    }
    let model = SecureModel::shape(config.clone(), plan.clone())?;
    let walk = &mut |tokens: usize, work| Walker::new(&model, 0).run_as(&[tokens], work);
    let first = self::prefill(config, plan, prompt, walk)?;
    let mut walker = Walker::new(&model, prompt);
    let prefill = Stretch {
        passes: 1,
        tokens: prompt,
        batches: 1,
        links: sum(&first.links, &control(true, 0, false)),
        depth: first.depth,
        work: first.work,
    };
    let mut stretch =
        Stretch { passes: decode, tokens: decode, links: control(false, decode as u64, false), ..Stretch::default() };
    let mut layers = first.layers;
    // How often the work of `stretch` has what is once for a batch.
    let mut walked_batches = 0.0;
    if (1..=2 * PERIOD).contains(&decode) {
        for passes in vec![1; decode].chunks(MAX_BATCH) {
            let run = walker.run(passes)?;
            walked_batches += 1.0;
            stretch.links = sum(&stretch.links, &run.links);
            stretch.depth += run.depth;
            add(&mut stretch.work, &run.work);
            layers = run.layers;
        }
    } else if decode > 0 {
        // Eight passes cut where a last, shorter stretch would end: twice.
        let (whole, rest) = (decode / PERIOD, decode % PERIOD);
        let mut blocks = Vec::new();
        for _ in 0..2 {
            let head = if rest == 0 { None } else { Some(walker.run(&vec![1; rest])?) };
            let tail = walker.run(&vec![1; PERIOD - rest])?;
            layers = tail.layers.clone();
            blocks.push((head, tail));
        }
        let links = |run: &Option<Run>| run.as_ref().map_or(Links::default(), |r| r.links);
        let [heads, wholes] = [
            [links(&blocks[0].0), links(&blocks[1].0)],
            [0, 1].map(|i: usize| sum(&links(&blocks[i].0), &blocks[i].1.links)),
        ];
        // The sum of `n` blocks whose growth is constant, and the block after them.
        let n = whole as u64;
        let all = each(&wholes[0], &wholes[1], |a, b| n * a + n * n.saturating_sub(1) / 2 * (b - a));
        let last = each(&heads[0], &heads[1], |a, b| a + n * (b - a));
        stretch.links = sum(&stretch.links, &sum(&all, &last));
        let depth: u32 = blocks.iter().flat_map(|(h, t)| [h.as_ref().map_or(0, |h| h.depth), t.depth]).sum();
        stretch.depth = depth / (2 * PERIOD) as u32 * decode as u32;
        let mut work = Table::default();
        for (head, tail) in &blocks {
            head.iter().for_each(|h| add(&mut work, &h.work));
            add(&mut work, &tail.work);
        }
        // Twice the work of a pass in the middle of the answer: that of the passes walked, and as much more as the traffic.
        let walked = (bytes(&wholes[0], Lane::Online) + bytes(&wholes[1], Lane::Online)) as f64;
        let scale = bytes(&sum(&all, &last), Lane::Online) as f64 / walked;
        work.iter_mut().flatten().flatten().for_each(|c| *c = c.scaled(scale));
        walked_batches = scale * blocks.iter().map(|(head, _)| 1.0 + f64::from(u8::from(head.is_some()))).sum::<f64>();
        stretch.work = work;
    }
    stretch.batches = batches(&stretch);
    if decode > 0 {
        let by = stretch.batches as f64 / walked_batches;
        let ahead = stretch.work.iter_mut().flat_map(|lanes| &mut lanes[Lane::Ahead as usize]);
        ahead.for_each(|c| *c = c.batches_scaled(by));
    }
    let layer_messages = layers.windows(2).map(|d| d[1] - d[0]).collect();
    Ok(Walked { prefill, decode: stretch, end: control(false, 0, true), layer_messages })
}
