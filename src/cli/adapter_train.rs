//! `trefoil adapter train`.

use std::path::PathBuf;

use trefoil::error::Result;

/// Options of `trefoil adapter train`.
#[derive(clap::Args)]
#[cfg_attr(not(feature = "train"), allow(dead_code))]
pub struct Args {
    #[command(flatten)]
    public: super::data::Public,
    #[command(flatten)]
    data: super::data::Labelled,
    /// With --model: how many tokens, the last ones of a text, the adapters read; each costs what one of an image does. Default: 32.
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// With --next-token: at most so many labels, the most frequent next tokens.
    #[arg(long, value_name = "N", default_value_t = 64, requires = "next_token")]
    vocabulary: usize,
    /// The directory to make: adapter.safetensors and adapter_config.json.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    #[command(flatten)]
    training: super::Training,
    /// Blocks in each adapter.
    #[arg(long, value_name = "N", default_value_t = 1)]
    blocks: usize,
    /// How many layers of the backbone, from its end, have an adapter.
    #[arg(long, value_name = "N", default_value_t = 2)]
    layers: usize,
    /// Steps.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    steps: usize,
    /// The largest learning rate: reached after a twentieth of the steps, then falling to 0. Default: 0.003 for adamw, 0.03 for sgd.
    #[arg(long, allow_negative_numbers = true)]
    lr: Option<f64>,
    /// Of the first weights and of the order of the data.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Factor of what an adapter adds.
    #[arg(long, default_value_t = 1.0)]
    scale: f32,
    /// How weights follow their gradients: adamw, or sgd (with momentum).
    #[arg(long, default_value = "adamw", value_name = "adamw|sgd")]
    optimiser: String,
    /// Decay of matrices, which keeps them in the range that fixed point carries.
    #[arg(long, default_value_t = 0.05, allow_negative_numbers = true)]
    decay: f32,
    /// Print one JSON object at the end instead of a progress bar.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// This program was built without training.
#[cfg(not(feature = "train"))]
pub fn run(_: &Args) -> Result<()> {
    Err(trefoil::error::Error::Config(
        "this trefoil was built without training; build it with: cargo build --release --features train".into(),
    ))
}

/// Runs the command.
///
/// # Errors
/// Whatever options, data or backbone got wrong, or what could not be saved.
#[cfg(feature = "train")]
pub fn run(a: &Args) -> Result<()> {
    use std::time::Instant;

    use indicatif::{ProgressBar, ProgressStyle};
    use trefoil::cryptpeft::accuracy;
    use trefoil::cryptpeft::plan::plan;
    use trefoil::cryptpeft::train::{Optimiser, TrainOptions, train};
    use trefoil::error::Error;

    use super::data::Backbone;

    crate::finetune::threads(a.training.threads)?;
    let backbone = Backbone::open(&a.public, a.window)?;
    let noun = backbone.noun();
    let optimiser: Optimiser = a.optimiser.parse()?;
    let options = TrainOptions {
        heads: a.training.heads,
        rank: a.training.rank,
        blocks: a.blocks,
        layers: a.layers,
        backbone_layers: backbone.layers(),
        steps: a.steps,
        batch: a.training.batch,
        lr: a.lr.unwrap_or(if optimiser == Optimiser::Sgd { 3e-2 } else { 3e-3 }),
        seed: a.seed,
        scale: a.scale,
        optimiser,
        decay: a.decay,
    };
    let layers = options.adapted()?;
    let set = backbone.load(&a.data, &[], a.vocabulary)?;
    if !a.json {
        eprintln!("running the backbone over {} {noun}s ...", set.train.len() + set.test.len());
    }
    let learn = backbone.features(&set.train, &layers)?;
    let test = backbone.features(&set.test, &layers)?;
    let bar = if a.json { ProgressBar::hidden() } else { ProgressBar::new(a.steps as u64) };
    if let Ok(style) = ProgressStyle::with_template("training {bar:30} {pos}/{len} steps, {msg}, {eta} left") {
        bar.set_style(style);
    }
    let (begun, mut mean) = (Instant::now(), None);
    let mut progress = |step: usize, loss: f32| {
        // A mean over about the last twenty steps, since single ones jump.
        let smooth = mean.map_or(loss, |mean: f32| mean + 0.05 * (loss - mean));
        mean = Some(smooth);
        bar.set_message(format!("loss {smooth:.3}"));
        bar.set_position(step as u64);
    };
    let (config, weights) = train(&options, &learn, &set.labels, &mut progress)?;
    let seconds = begun.elapsed().as_secs_f64();
    bar.finish_and_clear();
    // An adapter that fixed point cannot carry is of no use: better said now than when it is served.
    let every = learn.len().div_ceil(super::CALIBRATION).max(1);
    let samples: Vec<_> = learn.iter().step_by(every).map(|(f, _)| f.clone()).collect();
    plan(&config, &weights, &samples).map_err(|e| {
        Error::Config(format!(
            "what was trained cannot be served and is not written: {e}; give a larger --decay or a smaller --lr"
        ))
    })?;
    weights.save(&config, &a.out)?;
    let (learned, held_out) = (accuracy(&config, &weights, &learn), accuracy(&config, &weights, &test));
    let loss = mean.unwrap_or(f32::NAN);
    if a.json {
        let json = serde_json::json!({
            format!("train_{noun}s"): learn.len(), "train_accuracy": learned,
            format!("test_{noun}s"): test.len(), "test_accuracy": held_out,
            "labels": set.labels, "steps": a.steps, "loss": loss, "seconds": seconds, "out": a.out,
        });
        return crate::say(&format!("{json:#}\n"));
    }
    let mut out = format!("trained       {} steps, {seconds:.0} s, loss {loss:.4} nats\n", a.steps);
    out += &format!("train         {:.1} % of {} {noun}s get their label\n", 100.0 * learned, learn.len());
    out +=
        &format!("test          {:.1} % of {} {noun}s, of {} labels\n", 100.0 * held_out, test.len(), config.classes);
    out += &format!("written       {}\n", a.out.display());
    crate::say(&out)
}
