//! Private adapters at the shapes of CryptPEFT's latency table: random weights, one row per shape.

use std::time::{Duration, Instant};

use ndarray::{Array1, Array3};
use serde::Serialize;

use super::breakdown::{ByOperation, Steps, Times};
use super::measure::peak_memory;
use crate::cryptpeft::eval::label;
use crate::cryptpeft::local::{Classified, LocalAdapter, Pace};
use crate::cryptpeft::{AdapterConfig, AdapterWeights, Features, Layout, Opened, Vit, VitConfig, adapter, logits};
use crate::error::{Error, Result};
use crate::ledger::Spent;
use crate::net::shape::Profile;
use crate::ring::Isa;
use crate::world::Setup;

/// An adapter over the last layers of ViT-B/16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Heads.
    pub heads: usize,
    /// Width.
    pub rank: usize,
    /// Backbone layers that have one.
    pub layers: usize,
}

/// Those of the paper's latency table (CryptPEFT, arXiv 2508.12264), all over the last layer alone.
pub const PAPER: [&str; 5] =
    ["cryptpeft-h1-r240", "cryptpeft-h4-r120", "cryptpeft-h12-r60", "cryptpeft-h6-r180", "cryptpeft-h1-r120"];

const PREFIX: &str = "cryptpeft-";
/// The head of CIFAR-100, the largest of the paper's tasks that it is measured with.
const CLASSES: usize = 100;

impl Shape {
    /// `cryptpeft-hH-rR`, or with `-sS` at its end over more than the last layer; `None` for another name.
    ///
    /// # Errors
    /// [`Error::Config`] for what begins so and goes on otherwise.
    pub fn parse(name: &str) -> Result<Option<Shape>> {
        let Some(rest) = name.strip_prefix(PREFIX) else { return Ok(None) };
        let mut shape = Shape { heads: 0, rank: 0, layers: 1 };
        let mut good = true;
        for part in rest.split('-') {
            let (Some(letter), Some(n)) = (part.get(..1), part.get(1..).and_then(|n| n.parse::<usize>().ok())) else {
                good = false;
                break;
            };
            match letter {
                "h" => shape.heads = n,
                "r" => shape.rank = n,
                "s" => shape.layers = n,
                _ => good = false,
            }
        }
        good &= shape.heads > 0 && (1..=768).contains(&shape.rank) && (1..=12).contains(&shape.layers);
        if !good || !shape.rank.is_multiple_of(shape.heads) {
            return Err(Error::Config(format!(
                "--preset {name}: expected {PREFIX}hH-rR or {PREFIX}hH-rR-sS with a number of heads that divides the rank and 1 to 12 layers, as in {}",
                PAPER.join(", ")
            )));
        }
        Ok(Some(shape))
    }

    fn config(self) -> AdapterConfig {
        let vit = vit();
        AdapterConfig {
            hidden: vit.hidden,
            rank: self.rank,
            heads: self.heads,
            blocks: 1,
            layers: (vit.layers - self.layers..vit.layers).collect(),
            tokens: vit.tokens(),
            classes: CLASSES,
            scale: 1.0,
            eps: adapter::EPS,
            labels: Vec::new(),
        }
    }
}

/// ViT-B/16 at 224 pixels: 197 tokens of 768.
fn vit() -> VitConfig {
    let (hidden, intermediate) = (768, 3072);
    VitConfig {
        layout: Layout::HuggingFace,
        image: 224,
        patch: 16,
        hidden,
        layers: 12,
        heads: 12,
        intermediate,
        eps: 1e-12,
    }
}

/// What an image takes.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterRow {
    /// The shape.
    pub preset: String,
    /// The network.
    pub net: String,
    /// Images of the sustained run.
    pub images: usize,
    /// From cold, run-ahead work of all parties counted.
    pub ms_per_image: f64,
    /// The online part alone.
    pub ms_per_image_ready: f64,
    /// The adapter in float.
    pub float_ms_per_image: f64,
    /// The public backbone in float, which the Client computes before, in the clear.
    pub backbone_ms_per_image: f64,
    /// Bytes of all links that depend on the input.
    pub online_bytes_per_image: u64,
    /// Bytes of all links that are sent ahead of it.
    pub ahead_bytes_per_image: u64,
    /// Online messages in sequence, from the Client's input to its logits and the range flags with them.
    pub messages_per_image: u32,
    /// Largest error of a logit against the float run.
    pub max_logit_error: f64,
    /// Images whose label is the float run's.
    pub labels_agree: usize,
    /// Images whose two largest logits differ by more than 0.1 in the float run.
    pub clear_images: usize,
    /// Of these, those whose label is the float run's.
    pub clear_labels_agree: usize,
    /// Of this process: all three parties.
    pub peak_memory_bytes: u64,
    /// Of all three parties together.
    pub threads: usize,
    /// The instruction set of the kernels.
    pub isa: &'static str,
    /// The sustained run by party and kind of operation.
    pub by_operation: ByOperation,
    /// The run behind `ms_per_image_ready`.
    pub ready_by_operation: Steps,
}

/// Images of a run whose run-ahead is there: all of it is held.
const READY: usize = 4;
/// Images that it is calibrated on.
const CALIBRATED: usize = 16;

/// Images of the sustained run: `imgN`.
///
/// # Errors
/// [`Error::Config`].
pub fn images(test: &str) -> Result<usize> {
    let n = test.strip_prefix("img").and_then(|n| n.parse().ok()).filter(|n| (1..=100_000).contains(n));
    n.ok_or_else(|| Error::Config(format!("--test {test:?}: expected imgN (N images) for an adapter, as in img16")))
}

/// Measures an adapter of random weights on `n` images; `progress` is told what is going on.
///
/// # Errors
/// [`Error::Model`] for a shape that no plan fits, and those of a party.
pub fn run(name: &str, shape: Shape, n: usize, net: Profile, progress: &dyn Fn(&str)) -> Result<AdapterRow> {
    let c = shape.config();
    progress(&format!("{name}: random weights over {} layers of ViT-B/16", shape.layers));
    let w = AdapterWeights::random(&c, 7);
    let samples: Vec<Features> = (0..CALIBRATED as u64).map(|i| Features::random(&c, i)).collect();
    progress("backbone and adapter in float");
    let vit = Vit::random(vit(), 7)?;
    let pixels = Array3::from_shape_fn((3, 224, 224), |(a, b, c)| ((a + 3 * b + 7 * c) % 17) as f32 / 8.0 - 1.0);
    vit.features(&pixels, &c.layers)?;
    let begun = Instant::now();
    vit.features(&pixels, &c.layers)?;
    let backbone = begun.elapsed();
    drop(vit);
    progress("calibration, fixed point, shares of the weights");
    let setup = Setup { profile: net, ..Setup::default() };
    let local = LocalAdapter::new(&c, &w, &samples, setup)?;
    local.classify(&samples[..1], Opened::Logits, Pace::Cold)?;
    let ready = local.classify(&samples[..READY], Opened::Logits, Pace::Ready)?;
    progress(&format!("{n} images from cold"));
    let (mut cold, mut float, mut done) = (Cold::default(), Duration::ZERO, 0);
    while done < n {
        // Some at a time: hidden states of many images are much memory.
        let some: Vec<Features> =
            (done..n.min(done + 64)).map(|i| Features::random(&c, (CALIBRATED + i) as u64)).collect();
        let begun = Instant::now();
        let want: Vec<Array1<f32>> = some.iter().map(|f| logits(&c, &w, f, &mut ())).collect();
        float += begun.elapsed();
        cold.add(local.classify(&some, Opened::Logits, Pace::Cold)?, &want);
        done += some.len();
    }
    let ms = |d: Duration, n: usize| d.as_secs_f64() * 1e3 / n as f64;
    let mean = |bytes: u64| (bytes as f64 / n as f64).round() as u64;
    Ok(AdapterRow {
        preset: name.into(),
        net: net.to_string(),
        images: n,
        ms_per_image: ms(cold.wall, n),
        ms_per_image_ready: ms(ready.wall, READY),
        float_ms_per_image: ms(float, n),
        backbone_ms_per_image: ms(backbone, 1),
        online_bytes_per_image: mean(cold.online),
        ahead_bytes_per_image: mean(cold.ahead),
        messages_per_image: ready.messages,
        max_logit_error: cold.error,
        clear_images: cold.clear,
        clear_labels_agree: cold.clear_agree,
        labels_agree: cold.agree,
        peak_memory_bytes: peak_memory(),
        threads: rayon::current_num_threads(),
        isa: Isa::current().name(),
        by_operation: Times::of(&cold.spent, n)
            .by_operation(&|role, kind, lane| mean(cold.spent[role.index()].sent(kind, lane))),
        ready_by_operation: Times::of(&ready.spent, READY).steps(),
    })
}

/// Sums of a run in parts.
#[derive(Default)]
struct Cold {
    wall: Duration,
    online: u64,
    ahead: u64,
    error: f64,
    agree: usize,
    clear: usize,
    clear_agree: usize,
    spent: [Spent; 3],
}

impl Cold {
    fn add(&mut self, got: Classified, want: &[Array1<f32>]) {
        self.wall += got.wall;
        for link in got.sent.iter().flatten() {
            self.online += link.online_bytes;
            self.ahead += link.ahead_bytes;
        }
        for ((got_label, l), want) in got.labels.iter().zip(&got.logits).zip(want) {
            let mut best = [f32::NEG_INFINITY; 2];
            for (a, b) in l.iter().zip(want) {
                let error = f64::from((a - b).abs());
                self.error = if error.is_nan() { f64::INFINITY } else { self.error.max(error) };
                match *b {
                    b if b > best[0] => best = [b, best[0]],
                    b => best[1] = best[1].max(b),
                }
            }
            let (same, clear) = (*got_label == label(want), best[0] - best[1] > CLEAR);
            self.agree += usize::from(same);
            self.clear += usize::from(clear);
            self.clear_agree += usize::from(same && clear);
        }
        self.spent.iter_mut().zip(&got.spent).for_each(|(all, some)| *all = all.plus(some));
    }
}

/// How far apart the two largest logits are of an image whose label is clear.
const CLEAR: f32 = 0.1;

/// A Markdown table of one row, and one of what an image is made of.
#[must_use]
pub fn markdown(r: &AdapterRow) -> String {
    let mb = |b: u64| b as f64 / 1e6;
    let head = "| preset | net | ms/image sustained | ms/image ready | adapter in float, ms | backbone at the client, ms | online MB/image | run-ahead MB/image | messages/image | max logit error | labels agree | of clear ones |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n";
    let row = format!(
        "| {} | {} | {:.1} | {:.1} | {:.2} | {:.0} | {:.3} | {:.3} | {} | {:.3} | {} of {} | {} of {} |\n",
        r.preset,
        r.net,
        r.ms_per_image,
        r.ms_per_image_ready,
        r.float_ms_per_image,
        r.backbone_ms_per_image,
        mb(r.online_bytes_per_image),
        mb(r.ahead_bytes_per_image),
        r.messages_per_image,
        r.max_logit_error,
        r.labels_agree,
        r.images,
        r.clear_labels_agree,
        r.clear_images,
    );
    format!("{head}{row}\n{}", super::report::operations(&r.by_operation, &r.ready_by_operation))
}
