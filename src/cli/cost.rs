//! `trefoil cost`: what a request will take, without running it.

use std::path::PathBuf;

use super::private::Chosen;
use trefoil::bench;
use trefoil::error::{Error, Result};
use trefoil::model::preparation::Options;
use trefoil::net::shape::Profile;
use trefoil::plan::Setting;
use trefoil::predict::{NamedLinks, Phase, Prediction, Rates, Source, predict};

/// Options of `trefoil cost`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face directory (calibrated as for a preparation), or a preparation: its plan is read from manifest.json.
    #[arg(long, default_value = "models/quill-4m")]
    model: PathBuf,
    /// The public base that the model was fine-tuned from.
    #[arg(long, value_name = "DIR", conflicts_with = "adapter")]
    base: Option<PathBuf>,
    /// Instead of a model the shape of a published one, as `trefoil bench` has them, with random weights: one layer is calibrated, the others are
    /// taken to be like it. No weights are downloaded or kept.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["model", "base", "adapter"])]
    preset: Option<String>,
    #[command(flatten)]
    changes: super::changes::Args,
    #[command(flatten)]
    private: super::private::Args,
    /// Positions to plan for. Default: the model's own, as for `trefoil generate`; of a preset those of the request.
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N")]
    prefill: usize,
    /// Tokens to generate, as --max-new-tokens of `trefoil generate`: the first comes out of the prefill.
    #[arg(long, value_name = "N")]
    decode: usize,
    /// Network: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS. Round-trip figures.
    #[arg(long, default_value = "none")]
    net: String,
    /// Cores of each party that are planned for, as `trefoil prepare` takes them; times are predicted for this machine's.
    #[arg(long, value_name = "N")]
    cores: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Args {
    /// What the request takes: the last token is not computed with.
    fn positions(&self) -> usize {
        self.prefill.saturating_add(self.decode) - 1
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever the options, the checkpoint or the manifest got wrong.
pub fn run(a: &Args) -> Result<()> {
    let net: Profile = a.net.parse()?;
    for (name, n) in [("--prefill", a.prefill), ("--decode", a.decode)] {
        if n == 0 {
            return Err(Error::Config(format!("{name} 0: give at least one token")));
        }
    }
    let p = predict(&source(a, net)?, a.prefill, a.decode, net, Rates::measure()?)?;
    if a.json {
        let json = serde_json::to_string_pretty(&p).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        super::say(&format!("{json}\n"))
    } else {
        super::say(&text(&p))
    }
}

fn source(a: &Args, net: Profile) -> Result<Source> {
    if let Some(name) = &a.preset {
        let positions = a.context.unwrap_or(a.positions());
        within(a, positions)?;
        return bench::source(
            name,
            a.private.private_layers.as_deref(),
            a.changes.changes(),
            (positions, Setting::of(Some(net), a.cores)),
        );
    }
    a.changes.refuse_beside_model()?;
    if Source::is_preparation(&a.model) {
        let chosen = [
            ("--base", a.base.is_some()),
            ("--adapter", a.private.adapter.is_some()),
            ("--private-layers", a.private.private_layers.is_some()),
            ("--context", a.context.is_some()),
            ("--cores", a.cores.is_some()),
        ];
        if let Some((name, _)) = chosen.iter().find(|(_, given)| *given) {
            return Err(Error::Config(format!(
                "{name} with {}: a preparation's plan is fixed; leave the option out, or give the checkpoint",
                a.model.display()
            )));
        }
        return Source::preparation(&a.model);
    }
    let Chosen { model, adapter, config, private_layers } = a.private.chosen(&a.model)?;
    within(a, a.context.unwrap_or(usize::MAX).min(config.max_positions))?;
    let base = a.base.clone();
    let (net, cores) = (Some(net), a.cores);
    let options = Options { private_layers, max_positions: a.context, base, adapter, net, cores, ..Options::default() };
    Source::checkpoint(&model, &options)
}

/// Whether a context of `most` positions holds the request.
fn within(a: &Args, most: usize) -> Result<()> {
    match a.positions() {
        n if n > most => Err(Error::Config(format!(
            "--prefill {} and --decode {} take {n} positions, but the context is {most}",
            a.prefill, a.decode
        ))),
        _ => Ok(()),
    }
}

fn text(p: &Prediction) -> String {
    let mb = |b: u64| b as f64 / 1e6;
    let mut out = format!(
        "request       {} prompt tokens, {} new; {} private layers{}{}; context {}\nnetwork       {}\n",
        p.prefill_tokens,
        p.new_tokens,
        p.private_layers,
        if p.private_embedding { " and the embedding" } else { "" },
        if p.private_head { "; head private" } else { "; head public" },
        p.context,
        p.net
    );
    out += &format!(
        "messages      in sequence: {} per private layer, {} for the prefill, {} per token (exact)\n\n",
        p.messages_per_private_layer, p.messages_prefill, p.messages_per_token
    );
    for (name, links) in
        [("prefill", &p.prefill_links), ("per decode token, mean", &p.token_links), ("whole request", &p.request_links)]
    {
        out += &traffic(name, links);
    }
    out += &format!(
        "\ntime, ms, at the rates of this machine ({}, {} threads, measured now) (estimate)\n{:<10}{:>9}{:>9}{:>10}{:>9}{:>9}{:>9}{:>11}\n",
        p.rates.isa, p.rates.threads, "", "public", "norm", "attention", "mlp", "head", "network", "run-ahead"
    );
    for (name, phase) in [("prefill", &p.prefill), ("token", &p.decode)] {
        let s = &phase.parts_ms;
        out += &format!(
            "{name:<10}{:>9.2}{:>9.2}{:>10.2}{:>9.2}{:>9.2}{:>9.2}{:>11.2}\n",
            s.public_layers, s.norm, s.attention, s.mlp, s.head, s.network, s.run_ahead
        );
    }
    let line = |name: &str, f: &dyn Fn(&Phase) -> f64| {
        format!("{name:<52}{:>10.1} prefill{:>10.1} per token\n", f(&p.prefill), f(&p.decode))
    };
    out += &line("one machine each, run-ahead already there (ready)", &|p| p.ready_ms);
    out += &line("one machine each, run-ahead counted (sustained)", &|p| p.sustained_ms);
    out += &line("one process on these cores, run-ahead counted", &|p| p.one_process_ms);
    out += "\nthe plan chose\n";
    for c in &p.choices {
        out += &format!("  {:<22}{}\n  {:<22}({})\n", c.function, c.chosen, "", c.why);
    }
    out += &format!(
        "\npeak memory, MB, a process each (estimate)\n{:<8}{:>10}{:>10}{:>10}{:>11}{:>10}{:>10}{:>10}\n",
        "", "weights", "tables", "cache", "run-ahead", "batch", "process", "peak"
    );
    for (party, m) in &p.memory {
        out += &format!(
            "{party:<8}{:>10.1}{:>10.1}{:>10.1}{:>11.1}{:>10.1}{:>10.1}{:>10.1}\n",
            mb(m.model.weights),
            mb(m.model.tables),
            mb(m.session.cache),
            mb(m.session.run_ahead),
            mb(m.session.batch),
            mb(m.process),
            mb(m.peak)
        );
    }
    out
}

fn traffic(name: &str, links: &NamedLinks) -> String {
    let mut out = format!("bytes, {name} (exact)\n");
    for (link, l) in links.iter().filter(|(_, l)| l.messages > 0) {
        out += &format!(
            "  {link:<15} {:>13} online {:>13} run-ahead {:>8} messages\n",
            l.online_bytes, l.ahead_bytes, l.messages
        );
    }
    out
}
