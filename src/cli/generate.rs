//! `trefoil generate`: the three parties in one process.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use trefoil::error::{Error, Result};
use trefoil::generate::{Check, LinkReport, Local, LocalOptions, Stop, check};
use trefoil::model::{Checkpoint, TextCodec, Weights};
use trefoil::net::shape::Profile;
use trefoil::plan::MAX_TEMPERATURE;

/// Options of `trefoil generate`.
#[derive(clap::Args)]
pub struct Args {
    /// The text to continue.
    #[arg(long)]
    prompt: String,
    /// A Hugging Face directory: config.json, model.safetensors (or a sharded index), tokenizer.json.
    #[arg(long, default_value = "models/quill-4m")]
    model: PathBuf,
    /// The public base that the model was fine-tuned from: final norm and head are public where they are its own, bit
    /// for bit.
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// How many layers, from the top, are private: a number, or 'all', which includes the embedding. Default: half.
    #[arg(long, value_name = "N|all", allow_negative_numbers = true)]
    private_layers: Option<String>,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 64)]
    max_new_tokens: usize,
    /// Sampling temperature, 0 to 4; 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f64,
    /// Seed of the sampling noise (no key depends on it).
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Simulated network: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS. Round-trip figures.
    #[arg(long, default_value = "none")]
    net: String,
    /// Limit on prompt and answer together, below the model's own (shorter is cheaper).
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Text like the prompts to come: fixed-point ranges are calibrated on it, instead of on a built-in text.
    #[arg(long, value_name = "FILE")]
    calibration_text: Option<PathBuf>,
    /// Print one JSON object at the end instead of streaming text.
    #[arg(long)]
    json: bool,
    /// Compare with the float model on the same tokens. Opens the logits to the client, for this check only.
    #[arg(long)]
    check: bool,
}

#[derive(Serialize)]
struct Decode {
    median: f64,
    p95: f64,
}

#[derive(Serialize)]
struct Report {
    text: String,
    tokens: Vec<u32>,
    prompt_tokens: usize,
    stop: &'static str,
    public_layers: usize,
    private_layers: usize,
    private_embedding: bool,
    private_head: bool,
    net: String,
    threads: usize,
    preparation_ms: f64,
    preparation_bytes: u64,
    prefill_ms: f64,
    decode_ms: Decode,
    messages_per_private_layer: u32,
    links: BTreeMap<String, LinkReport>,
    discarded_slots: u64,
    discarded_bytes: u64,
    peak_memory_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<Check>,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    if sorted.is_empty() {
        return 0.0;
    }
    sorted[((sorted.len() - 1) as f64 * q).round() as usize]
}

/// The kernel's high-water mark of this process, all three parties together; 0 where the kernel does not tell.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) * 1024
}

/// Runs the command.
///
/// # Errors
/// Whatever the options, the checkpoint or a party got wrong.
pub fn run(a: &Args) -> Result<()> {
    let profile: Profile = a.net.parse()?;
    // Before the model is prepared, which takes a while.
    if a.max_new_tokens == 0 {
        return Err(Error::Config("--max-new-tokens 0: ask for at least one token".into()));
    }
    if !(0.0..=MAX_TEMPERATURE).contains(&a.temperature) {
        return Err(Error::Config(format!(
            "--temperature {}: expected 0 (greedy) to {MAX_TEMPERATURE}",
            a.temperature
        )));
    }
    let checkpoint = Checkpoint::open(&a.model)?;
    let config = checkpoint.config().clone();
    drop(checkpoint);
    let private_layers = super::private_layers(a.private_layers.as_deref(), &config)?;
    let codec = TextCodec::open(&a.model)?;
    let prompt = codec.encode(&a.prompt)?;
    if a.prompt.is_empty() || prompt.is_empty() {
        return Err(Error::Config("--prompt is empty: give some text to continue".into()));
    }
    let limit = a.context.unwrap_or(usize::MAX).min(config.max_positions);
    if prompt.len() > limit {
        return Err(Error::Config(format!(
            "the prompt has {} tokens, but the context is {limit}: shorten the prompt, or raise --context up to {}",
            prompt.len(),
            config.max_positions
        )));
    }
    let mut options = LocalOptions::new(private_layers).net(profile);
    options.max_positions = Some(limit.min(prompt.len().saturating_add(a.max_new_tokens)));
    options.base = a.base.clone();
    if let Some(file) = &a.calibration_text {
        let text = std::fs::read_to_string(file)
            .map_err(|e| Error::io(format!("--calibration-text {}", file.display()), e))?;
        options.calibration_text = Some(text);
    }
    if !a.json {
        eprintln!("preparing {} (calibration, fixed point, shares of the weights) ...", a.model.display());
    }
    let mut local = Local::open(&a.model, options)?;

    let mut stream = codec.stream(&prompt)?;
    let mut shown = String::new();
    let mut failed = None;
    if !a.json {
        super::say(&a.prompt)?;
    }
    let mut on_token = |id: u32| {
        if config.eos_ids.contains(&id) {
            return true;
        }
        match stream.push(&codec, id) {
            Ok(piece) => {
                shown.push_str(&piece);
                let said = if a.json { Ok(()) } else { super::say(&piece) };
                failed = said.err();
                failed.is_none()
            }
            Err(e) => {
                failed = Some(e);
                false
            }
        }
    };
    let out = local.generate(&prompt, a.max_new_tokens, a.temperature, a.seed, a.check, &mut on_token);
    let g = match out {
        Ok(g) => g,
        Err(e) => {
            if !a.json {
                super::say("\n")?;
            }
            return Err(local.root_cause(e));
        }
    };
    if let Some(e) = failed {
        return Err(e);
    }
    let rest = stream.finish(&codec)?;
    shown.push_str(&rest);
    if !a.json {
        super::say(&format!("{rest}\n"))?;
    }
    let links = local.links();
    let (preparation_bytes, preparation) = local.preparation();
    let plan = local.plan().clone();
    let owner = local.finish()?;
    let check = match a.check {
        false => None,
        true => Some(check(&Weights::load(&Checkpoint::open(&a.model)?)?, &prompt, &g, a.temperature > 0.0)),
    };
    let mut decode: Vec<f64> = g.decode.iter().copied().map(ms).collect();
    decode.sort_by(f64::total_cmp);
    let report = Report {
        text: shown,
        tokens: g.tokens,
        prompt_tokens: prompt.len(),
        stop: match g.stop {
            Stop::EndToken => "end_token",
            Stop::Length => "length",
            Stop::Caller => "caller",
        },
        public_layers: plan.first_private,
        private_layers: plan.layers.len(),
        private_embedding: plan.private_embedding,
        private_head: !plan.head.public,
        net: profile.to_string(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        preparation_ms: ms(preparation),
        preparation_bytes,
        prefill_ms: ms(g.prefill),
        decode_ms: Decode { median: quantile(&decode, 0.5), p95: quantile(&decode, 0.95) },
        messages_per_private_layer: owner.layer_messages.iter().copied().max().unwrap_or(0),
        links,
        discarded_slots: owner.discarded_passes,
        discarded_bytes: owner.discarded_bytes,
        peak_memory_bytes: peak_memory(),
        check,
    };
    if a.json {
        let json = serde_json::to_string_pretty(&report).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        super::say(&format!("{json}\n"))?;
    } else {
        summary(&report);
    }
    Ok(())
}

fn summary(r: &Report) {
    let mb = |b: u64| b as f64 / 1e6;
    eprintln!();
    eprintln!(
        "layers        {} public (client, plaintext), {} private{}; final norm and head {}",
        r.public_layers,
        r.private_layers,
        if r.private_embedding { " and the embedding" } else { "" },
        if r.private_head { "private" } else { "public, as in the base" }
    );
    eprintln!("network       {}; {} threads for all three parties", r.net, r.threads);
    eprintln!("preparation   {:.0} ms, {:.1} MB, once per model", r.preparation_ms, mb(r.preparation_bytes));
    eprintln!("prefill       {:.1} ms for {} tokens", r.prefill_ms, r.prompt_tokens);
    eprintln!(
        "decode        {:.1} ms per token median, {:.1} p95, over {} tokens",
        r.decode_ms.median,
        r.decode_ms.p95,
        r.tokens.len().saturating_sub(1)
    );
    eprintln!("messages      {} in sequence per private layer", r.messages_per_private_layer);
    for (link, l) in &r.links {
        eprintln!(
            "{link:<15} {:>9.3} MB online {:>9.3} MB run-ahead {:>7} messages",
            mb(l.online_bytes),
            mb(l.ahead_bytes),
            l.messages
        );
    }
    eprintln!("left over     {} slots walked ahead and dropped, {:.3} MB", r.discarded_slots, mb(r.discarded_bytes));
    eprintln!("peak memory   {:.0} MB for all three parties", mb(r.peak_memory_bytes));
    if let Some(c) = &r.check {
        eprintln!(
            "check         logits opened to the client for this check only: {} of {} tokens agree, max KL {:.2e}, max logit error {:.4}",
            c.agree, c.of, c.max_kl, c.max_logit_error
        );
    }
}
