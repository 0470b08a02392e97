//! `trefoil adapter study`.

use trefoil::error::Result;

/// Options of `trefoil adapter study`.
#[derive(clap::Args)]
#[cfg_attr(not(feature = "train"), allow(dead_code))]
pub struct Args {
    /// The public vision transformer, a directory with model.safetensors and config.json.
    #[arg(long, value_name = "DIR")]
    backbone: std::path::PathBuf,
    #[command(flatten)]
    data: super::Data,
    /// What is compared: one-way (our adapters), two-way (the same, each given back to the layer that it reads), adaptformer, lora.
    #[arg(long, value_name = "LIST", default_value = "one-way,two-way,adaptformer,lora")]
    ways: String,
    /// Where they sit: layers from 0, as 3, or from one to another, as 2-3. A list. Default: every layer by itself, then the last two, three
    /// and so on.
    #[arg(long, value_name = "LIST")]
    at: Option<String>,
    #[command(flatten)]
    training: super::Training,
    /// Steps of each training.
    #[arg(long, value_name = "N", default_value_t = 500)]
    steps: usize,
    /// The largest learning rate of each.
    #[arg(long, default_value_t = 3e-3, allow_negative_numbers = true)]
    lr: f64,
    /// Each is trained with the seeds 0, 1, and so on, so many of them.
    #[arg(long, value_name = "N", default_value_t = 3)]
    seeds: u64,
    /// Print a JSON array at the end instead of a table.
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

/// Layers from text such as `3,2-3`, of a backbone of `layers`.
#[cfg(feature = "train")]
fn places(text: Option<&str>, layers: usize) -> Result<Vec<Vec<usize>>> {
    let Some(text) = text else {
        let alone = (0..layers).map(|i| vec![i]);
        return Ok(alone.chain((0..layers.saturating_sub(1)).rev().map(|from| (from..layers).collect())).collect());
    };
    let place = |part: &str| -> Option<Vec<usize>> {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to): (usize, usize) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        (from <= to && to < layers).then(|| (from..=to).collect())
    };
    let bad = |part: &str| {
        trefoil::error::Error::Config(format!(
            "--at {part}: give layers from 0 to {}, as 3 or as 2-3, in a list",
            layers.saturating_sub(1)
        ))
    };
    text.split(',').map(|part| place(part).ok_or_else(|| bad(part))).collect()
}

/// Runs the command.
///
/// # Errors
/// Whatever options, images or backbone got wrong.
#[cfg(feature = "train")]
pub fn run(a: &Args) -> Result<()> {
    use indicatif::{ProgressBar, ProgressStyle};
    use trefoil::cryptpeft::study::{Way, learn};
    use trefoil::cryptpeft::train::TrainOptions;
    use trefoil::error::Error;

    crate::finetune::threads(a.training.threads)?;
    let ways = a.ways.split(',').map(str::parse).collect::<Result<Vec<Way>>>()?;
    if a.seeds == 0 {
        return Err(Error::Config("--seeds 0: give at least 1".into()));
    }
    let (vit, preprocess) = super::backbone(&a.backbone)?;
    let at = places(a.at.as_deref(), vit.config().layers)?;
    let set = a.data.load(&vit, &preprocess)?;
    let trainings = (at.len() * ways.len()) as u64 * a.seeds;
    let bar = if a.json { ProgressBar::hidden() } else { ProgressBar::new(trainings * a.steps as u64) };
    if let Ok(style) = ProgressStyle::with_template("training {bar:30} {pos}/{len} steps, {msg}, {eta} left") {
        bar.set_style(style);
    }
    let mut table = format!(
        "| layers | {} |\n|---|{}\n",
        ways.iter().map(Way::to_string).collect::<Vec<_>>().join(" | "),
        "---:|".repeat(ways.len())
    );
    let mut rows = Vec::new();
    for layers in &at {
        let place = match &layers[..] {
            [only] => only.to_string(),
            many => format!("{}-{}", many[0], many[many.len() - 1]),
        };
        table += &format!("| {place} |");
        for &way in &ways {
            let (mut accuracy, mut parameters) = (Vec::new(), 0);
            for seed in 0..a.seeds {
                bar.set_message(format!("{way} at {place}, seed {seed}"));
                let options = TrainOptions {
                    heads: a.training.heads,
                    rank: a.training.rank,
                    steps: a.steps,
                    batch: a.training.batch,
                    lr: a.lr,
                    seed,
                    ..TrainOptions::default()
                };
                let learned = learn(&vit, &set, (way, layers), &options, &mut |_, _| bar.inc(1))?;
                accuracy.push(learned.accuracy);
                parameters = learned.parameters;
            }
            let mean = accuracy.iter().sum::<f64>() / accuracy.len() as f64;
            let (least, most) = accuracy.iter().fold((1f64, 0f64), |(l, m), v| (l.min(*v), m.max(*v)));
            table += &format!(" {:.1} % ({:.1} to {:.1}), {parameters} |", 100.0 * mean, 100.0 * least, 100.0 * most);
            rows.push(serde_json::json!({
                "layers": layers, "way": way.name(), "test_accuracy": accuracy, "parameters": parameters,
                "rank": a.training.rank, "heads": a.training.heads, "steps": a.steps, "train_images": set.train.len(), "test_images": set.test.len(),
            }));
        }
        table += "\n";
    }
    bar.finish_and_clear();
    if a.json {
        return crate::say(&format!("{:#}\n", serde_json::Value::from(rows)));
    }
    crate::say(&format!(
        "{table}\ntest accuracy in the mean of {} seeds (least to most), and trained numbers; {} images to learn from, {} for the test\n",
        a.seeds,
        set.train.len(),
        set.test.len()
    ))
}
