//! `trefoil adapter search`.

use std::path::PathBuf;

#[cfg(not(feature = "train"))]
use trefoil::error::Result;

/// Options of `trefoil adapter search`.
#[derive(clap::Args)]
#[cfg_attr(not(feature = "train"), allow(dead_code))]
pub struct Args {
    /// The public vision transformer: a directory with model.safetensors and config.json.
    #[arg(long, value_name = "DIR")]
    backbone: PathBuf,
    #[command(flatten)]
    data: super::Data,
    /// Where history.jsonl, search.svg, latency.json and each trained adapter are written. The same command goes on there where it
    /// was interrupted.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Heads to choose from. A rank that they do not divide is not tried with them.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,2,4")]
    heads: Vec<usize>,
    /// Ranks to choose from.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "16,32,64")]
    ranks: Vec<usize>,
    /// Numbers of adapters to choose from: of the last layers of the backbone.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,2")]
    layers: Vec<usize>,
    /// What to look for: utility (the highest accuracy, then the lowest latency), or efficiency:FLOOR (the lowest latency with an
    /// accuracy of at least FLOOR, 0 to 1). Without FLOOR: a hundredth below that of the largest adapters, which are trained first.
    #[arg(long, default_value = "utility", value_name = "utility|efficiency[:FLOOR]")]
    target: String,
    /// An adapter to beat: heads, rank and layers. It is trained first; what is looked for is the lowest latency with an accuracy no
    /// lower than its, and at the end both are measured in turns.
    #[arg(long, value_name = "HEADS,RANK,LAYERS", conflicts_with = "target")]
    beat: Option<String>,
    /// Points to train at most. More of them may be given to go on.
    #[arg(long, value_name = "N", default_value_t = 12)]
    budget: usize,
    /// Training steps of each point.
    #[arg(long, value_name = "N", default_value_t = 300)]
    steps: usize,
    /// Images in a step.
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,
    /// The largest learning rate.
    #[arg(long, default_value_t = 3e-3, allow_negative_numbers = true)]
    lr: f64,
    /// Of what is drawn, and of the training.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Network of the latency: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS.
    #[arg(long, default_value = "lan")]
    net: String,
    /// Inferences of each point that is measured; their median counts.
    #[arg(long, value_name = "N", default_value_t = 3)]
    repeats: usize,
    /// Threads to compute with; the same number makes the same bits. Default: RAYON_NUM_THREADS, or as many as the machine runs
    /// at once.
    #[arg(long)]
    threads: Option<usize>,
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

#[cfg(feature = "train")]
pub use with_training::run;

#[cfg(feature = "train")]
mod with_training {
    use std::path::Path;
    use std::time::Instant;

    use indicatif::{ProgressBar, ProgressStyle};
    use trefoil::cryptpeft::latency::{Shape, measure};
    use trefoil::cryptpeft::search::timing::Timing;
    use trefoil::cryptpeft::search::trained::{Trained, cut};
    use trefoil::cryptpeft::search::{Ended, Evaluator, Found, Point, Progress, Record, Search, Space, Target, plot};
    use trefoil::cryptpeft::train::TrainOptions;
    use trefoil::cryptpeft::{AdapterWeights, Dataset, Features, Vit, accuracy, cached_features};
    use trefoil::error::{Error, Result};
    use trefoil::net::shape::Profile;
    use trefoil::predict::Rates;

    use super::Args;

    /// Below the accuracy of the largest adapters, where no floor is given.
    const BELOW: f64 = 0.01;

    fn space(a: &Args) -> Space {
        Space { heads: a.heads.clone(), ranks: a.ranks.clone(), layers: a.layers.clone() }
    }

    fn timing(a: &Args, shape: Shape, net: Profile, bar: &ProgressBar) -> Result<Timing> {
        let path = a.out.join("latency.json");
        let known = path.exists();
        let mut said = |m: trefoil::cryptpeft::search::timing::Measuring| {
            bar.println(format!("measuring {} points, round {} of {}", m.points, m.round, m.rounds));
        };
        let timing = Timing::open_or_measure(&path, shape, &space(a), (net, a.repeats), Rates::measure, &mut said)?;
        if let (Some(c), false) = (&timing.held_out, known) {
            let errors = |e: &trefoil::cryptpeft::latency::Errors| {
                format!("{:.1} % off on average, {:.1} % at most", 100.0 * e.mean, 100.0 * e.worst)
            };
            bar.println(format!(
                "latency of {} points held out: linear model {}; our own {}",
                c.points.len(),
                errors(&c.linear),
                errors(&c.ours)
            ));
        }
        Ok(timing)
    }

    /// The adapter to beat.
    fn rival(a: &Args) -> Result<Option<Point>> {
        let Some(text) = &a.beat else { return Ok(None) };
        let numbers: std::result::Result<Vec<usize>, _> = text.split(',').map(|n| n.trim().parse()).collect();
        match numbers.as_deref() {
            Ok(&[heads, rank, layers]) if heads > 0 && layers > 0 && rank > 0 && rank.is_multiple_of(heads) => {
                Ok(Some(Point { heads, rank, layers }))
            }
            _ => Err(Error::Config(format!(
                "--beat {text}: expected heads, a rank that they divide, and layers, such as 4,64,1"
            ))),
        }
    }

    /// The floor is in the text, or follows from the adapter to beat or the largest ones.
    fn target(a: &Args, evaluator: &mut Trained<'_>, points: &[Point], bar: &ProgressBar) -> Result<Target> {
        if let Some(p) = rival(a)? {
            bar.println(format!("training the adapter to beat: {p}"));
            let accuracy = evaluator.reference(p, a.seed, &a.out.join("floor.json"))?;
            bar.println(format!("floor: {:.2} %", 100.0 * accuracy));
            return Ok(Target::Efficiency { floor: accuracy });
        }
        if a.target != "efficiency" {
            return a.target.parse();
        }
        let largest = points.iter().max_by_key(|p| (p.layers, p.rank, p.heads)).copied();
        let largest = largest.ok_or_else(|| Error::Internal("a space without points".into()))?;
        bar.println(format!("training the largest adapters for the floor: {largest}"));
        let accuracy = evaluator.reference(largest, a.seed, &a.out.join("floor.json"))?;
        let floor = ((accuracy - BELOW).max(0.0) * 1e6).round() / 1e6;
        bar.println(format!("floor: {:.2} %", 100.0 * floor));
        Ok(Target::Efficiency { floor })
    }

    /// Runs the command.
    ///
    /// # Errors
    /// Whatever options, images or backbone got wrong, or what could not be saved.
    pub fn run(a: &Args) -> Result<()> {
        crate::finetune::threads(a.threads)?;
        let net: Profile = a.net.parse()?;
        if a.target != "efficiency" {
            a.target.parse::<Target>()?;
        }
        let rival = rival(a)?;
        let points = space(a).points()?;
        let (vit, preprocess) = super::super::backbone(&a.backbone)?;
        let most = a.layers.iter().copied().chain(rival.map(|p| p.layers)).max().unwrap_or(1);
        let options = TrainOptions {
            layers: most,
            backbone_layers: vit.config().layers,
            steps: a.steps,
            batch: a.batch,
            lr: a.lr,
            ..TrainOptions::default()
        };
        let layers = options.adapted()?;
        let set = a.data.load(&vit, &preprocess)?;
        std::fs::create_dir_all(&a.out).map_err(|e| Error::io(format!("--out {}", a.out.display()), e))?;
        let bar = ProgressBar::new(a.steps as u64);
        if let Ok(style) = ProgressStyle::with_template("training {bar:30} {pos}/{len} steps, {msg}, {eta} left") {
            bar.set_style(style);
        }
        let shape = Shape { hidden: vit.config().hidden, tokens: vit.tokens(), classes: set.labels.len() };
        let timing = timing(a, shape, net, &bar)?;
        bar.println(format!("running the backbone over {} images ...", set.train.len()));
        let features = cached_features(&vit, &set.train, &layers)?;
        let data = match (&a.data.images, a.data.synthetic) {
            (Some(dir), _) => dir.display().to_string(),
            (None, seed) => format!("synthetic {}", seed.unwrap_or_default()),
        };
        let data = serde_json::json!({ "images": data, "backbone": a.backbone.display().to_string() });
        let mut step = |_: Point, step: usize, loss: f32| {
            if step == 1 {
                bar.reset();
            }
            bar.set_message(format!("loss {loss:.3}"));
            bar.set_position(step as u64);
        };
        let mut evaluator = Trained::new(options, features, set.labels.clone(), timing, (data, &a.out), &mut step)?;
        let target = target(a, &mut evaluator, &points, &bar)?;
        let found = search(a, target, &mut evaluator, &bar)?;
        bar.finish_and_clear();
        let mut text = show(a, &found, &vit, &set)?;
        if let (Some(rival), Some(best)) = (rival, &found.best) {
            text += &in_turns(a, (shape, net), best.point, rival)?;
        }
        crate::say(&text)
    }

    /// Both measured in turns, since a shared machine's speed comes and goes.
    fn in_turns(a: &Args, (shape, net): (Shape, Profile), best: Point, rival: Point) -> Result<String> {
        let turns = 5 * a.repeats;
        let measured = measure(shape, &[best, rival], net, turns, &mut |_| ())?;
        let [found, fixed] = measured[..] else { return Err(Error::Internal("two points, two measurements".into())) };
        let less = 100.0 * (1.0 - found.seconds / fixed.seconds);
        let (found, fixed) = (1e3 * found.seconds, 1e3 * fixed.seconds);
        Ok(format!(
            "measured      {best}: {found:.2} ms; {rival}: {fixed:.2} ms; {less:.0} % less (medians of {turns} turns)\n"
        ))
    }

    fn search(a: &Args, target: Target, evaluator: &mut dyn Evaluator, bar: &ProgressBar) -> Result<Found> {
        let (begun, mut now) = (Instant::now(), 0);
        let mut progress = |p: Progress<'_>| {
            let at = begun.elapsed().as_secs_f64();
            match p.done {
                None => bar.println(format!("[{at:7.1} s] point {} of {}: {}", p.evaluated + 1, p.budget, p.point)),
                Some(r) => {
                    now += 1;
                    let left = at / f64::from(now) * (p.budget - p.evaluated.min(p.budget)) as f64;
                    let left = format!("at most about {:.0} min left", (left / 60.0).ceil());
                    bar.println(format!("[{at:7.1} s]   {}, reward {:.4}; {left}", figures(r), r.reward));
                }
            }
            true
        };
        let history = a.out.join("history.jsonl");
        let search = Search { space: space(a), target, seed: a.seed, budget: a.budget };
        let found = search.run(evaluator, &history, &mut progress)?;
        plot(&history, &a.out.join("search.svg"))?;
        found.ok_or_else(|| Error::Internal("the search ended early".into()))
    }

    fn figures(r: &Record) -> String {
        format!("accuracy {:.2} %, latency {:.2} ms", 100.0 * r.accuracy, 1e3 * r.latency)
    }

    /// On images that the search never saw.
    fn tested(dir: &Path, p: Point, vit: &Vit, set: &Dataset) -> Result<f64> {
        let (config, weights) = AdapterWeights::open(dir, Some(vit.tokens()))?;
        let features: Vec<(Features, usize)> = cached_features(vit, &set.test, &config.layers)?;
        Ok(accuracy(&config, &weights, &cut(&features, p.layers)))
    }

    fn show(a: &Args, found: &Found, vit: &Vit, set: &Dataset) -> Result<String> {
        let why = match found.ended {
            Ended::Budget => "the budget",
            Ended::Settled => "the controller came to nothing new",
            Ended::Exhausted => "all points of the space",
        };
        let mut out = format!("searched      {} points in {} steps ({why})\n", found.records.len(), found.steps);
        for r in &found.front {
            out += &format!("front         {}: {}\n", r.point, figures(r));
        }
        match &found.best {
            Some(r) => {
                out += &format!("best          {}: {}\n", r.point, figures(r));
                let dir = Trained::dir(&a.out, r.point);
                if dir.exists() {
                    let test = 100.0 * tested(&dir, r.point, vit, set)?;
                    out +=
                        &format!("test          {test:.2} % of {} images that the search never saw\n", set.test.len());
                    out += &format!("adapter       {}\n", dir.display());
                }
            }
            None => {
                out += "best          none: no point reaches the floor; give a lower one, more --steps or larger --ranks\n";
            }
        }
        out += &format!("written       {}\n", a.out.display());
        Ok(out)
    }
}
