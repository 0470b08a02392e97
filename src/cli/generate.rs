//! `trefoil generate`: the three parties in one process, or the Client of a deployment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::private::Chosen;
use serde::Serialize;
use trefoil::bench::peak_memory;
use trefoil::deploy::client::Remote;
use trefoil::deploy::config::{Config, Party};
use trefoil::deploy::party::Options;
use trefoil::error::{Error, Result};
use trefoil::generate::{
    Check, Draft, Drafts, Generation, LinkReport, Local, LocalOptions, Stop, check, check_draft_tokens,
};
use trefoil::model::preparation::adapted;
use trefoil::model::progress::Progress;
use trefoil::model::{Checkpoint, TextCodec, TextStream, calibrate};
use trefoil::net::shape::Profile;
use trefoil::plan::{MAX_TEMPERATURE, Plan};

/// Options of `trefoil generate`.
#[derive(clap::Args)]
pub struct Args {
    /// The text to continue.
    #[arg(long)]
    prompt: String,
    /// The client of a deployment: its configuration (trefoil init client). Owner and helper run elsewhere. Without it all
    /// three run in this process.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "base", "adapter", "private_layers", "net", "context", "calibration_text", "check"])]
    config: Option<PathBuf>,
    /// A Hugging Face directory: config.json, model.safetensors (or a sharded index), tokenizer.json.
    #[arg(long, default_value = "models/quill-4m")]
    model: PathBuf,
    /// The public base that the model was fine-tuned from: final norm and head are public where they are its own, bit
    /// for bit.
    #[arg(long, value_name = "DIR", conflicts_with = "adapter")]
    base: Option<PathBuf>,
    #[command(flatten)]
    private: super::private::Args,
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
    /// Limit on positions, below the model's own (shorter is cheaper): prompt and answer together, but for the answer's last
    /// token, which needs none. A prompt of N tokens can so have an answer of TOKENS - N + 1.
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Text like the prompts to come (UTF-8, at most 64 MB; the beginning is read): fixed-point ranges are calibrated on it,
    /// instead of on a built-in text.
    #[arg(long, value_name = "FILE")]
    calibration_text: Option<PathBuf>,
    /// Draft with this model (a directory as for --model, with the same tokenizer: a smaller model of the family, or the public
    /// base). It runs at the client, in plaintext; one private pass then verifies its next tokens together, and those that are
    /// the model's own are given out. The tokens are the same, in fewer passes. Owner and helper see how many drafts are
    /// accepted in each pass, and no pass is walked ahead of the one before it.
    #[arg(long, value_name = "DIR")]
    draft: Option<PathBuf>,
    /// Tokens to draft for a pass, 1 to 16.
    #[arg(long, value_name = "N", default_value_t = 4, requires = "draft")]
    draft_tokens: usize,
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

/// Whom a Client of a deployment has talked to.
#[derive(Serialize)]
struct SessionFacts {
    id: String,
    owner: String,
    helper: String,
    preparation: String,
    setup_ms: f64,
}

/// What drafting has brought.
#[derive(Serialize)]
struct DraftFacts {
    model: String,
    tokens: usize,
    drafted: usize,
    accepted: usize,
    rate: f64,
    passes: usize,
}

impl DraftFacts {
    fn new(a: &Args, d: Drafts) -> Option<DraftFacts> {
        let model = a.draft.as_ref()?.display().to_string();
        let Drafts { drafted, accepted, passes } = d;
        Some(DraftFacts { model, tokens: a.draft_tokens, drafted, accepted, rate: d.rate(), passes })
    }
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
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<SessionFacts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    preparation_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    preparation_bytes: Option<u64>,
    prefill_ms: f64,
    decode_ms: Decode,
    #[serde(skip_serializing_if = "Option::is_none")]
    draft: Option<DraftFacts>,
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

/// Shows tokens as they come.
struct Speaker {
    codec: TextCodec,
    stream: TextStream,
    eos: Vec<u32>,
    json: bool,
    shown: String,
    failed: Option<Error>,
}

impl Speaker {
    fn new(a: &Args, codec: TextCodec, prompt: &[u32], eos: &[u32]) -> Result<Self> {
        let stream = codec.stream(prompt)?;
        Ok(Speaker { codec, stream, eos: eos.to_vec(), json: a.json, shown: String::new(), failed: None })
    }

    fn begin(&self, prompt: &str) -> Result<()> {
        if self.json { Ok(()) } else { super::say(prompt) }
    }

    fn token(&mut self, id: u32) -> bool {
        if self.eos.contains(&id) {
            return true;
        }
        match self.stream.push(&self.codec, id) {
            Ok(piece) => {
                self.shown.push_str(&piece);
                let said = if self.json { Ok(()) } else { super::say(&piece) };
                self.failed = said.err();
                self.failed.is_none()
            }
            Err(e) => {
                self.failed = Some(e);
                false
            }
        }
    }

    /// Ends the line after a failure.
    fn break_off(&self) -> Result<()> {
        if self.json { Ok(()) } else { super::say("\n") }
    }

    /// All the text.
    fn finish(mut self) -> Result<String> {
        if let Some(e) = self.failed {
            return Err(e);
        }
        let rest = self.stream.finish(&self.codec)?;
        self.shown.push_str(&rest);
        if !self.json {
            super::say(&format!("{rest}\n"))?;
        }
        Ok(self.shown)
    }
}

fn encode(codec: &TextCodec, prompt: &str) -> Result<Vec<u32>> {
    let ids = codec.encode(prompt)?;
    if prompt.is_empty() || ids.is_empty() {
        return Err(Error::Config("--prompt is empty: give some text to continue".into()));
    }
    Ok(ids)
}

/// Runs the command.
///
/// # Errors
/// Whatever the options, the checkpoint or a party got wrong.
pub fn run(a: &Args) -> Result<()> {
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
    check_draft_tokens(a.draft_tokens)?;
    let report = match &a.config {
        Some(config) => remote(a, config)?,
        None => local(a)?,
    };
    if a.json {
        let json = serde_json::to_string_pretty(&report).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        super::say(&format!("{json}\n"))?;
    } else {
        summary(&report);
    }
    Ok(())
}

/// The draft model, for the model whose tokenizer is in `model`; before anything is prepared, or anybody is called.
fn draft(a: &Args, model: &Path) -> Result<Option<Draft>> {
    a.draft.as_ref().map(|dir| Draft::open(dir, a.draft_tokens, model)).transpose()
}

/// The Client of a deployment.
fn remote(a: &Args, path: &Path) -> Result<Report> {
    let config = Config::load(path)?;
    let Party::Client { public, .. } = config.party() else {
        return Err(Error::Config(format!(
            "{}: this is the {}'s configuration; `trefoil generate` is the client (the {0} runs with `trefoil party --config`)",
            path.display(),
            config.role()
        )));
    };
    let codec = TextCodec::open(public)?;
    let prompt = encode(&codec, &a.prompt)?;
    let draft = draft(a, public)?;
    let mut remote = Remote::open(path, Options::default())?;
    draft.map_or(Ok(()), |d| remote.draft_with(d))?;
    let facts = remote.facts().clone();
    let mut speaker = Speaker::new(a, codec, &prompt, &facts.config.eos_ids)?;
    speaker.begin(&a.prompt)?;
    let out = remote.generate(&prompt, a.max_new_tokens, a.temperature, a.seed, &mut |id| speaker.token(id));
    let g = match out {
        Ok(g) => g,
        Err(e) => {
            speaker.break_off()?;
            return Err(e);
        }
    };
    let text = speaker.finish()?;
    let (sums, links) = remote.finish()?;
    let session = SessionFacts {
        id: facts.session,
        owner: facts.owner.to_string(),
        helper: facts.helper.to_string(),
        preparation: facts.preparation,
        setup_ms: ms(facts.setup),
    };
    let mut report = Report::new(a, text, prompt.len(), g, &facts.plan, links);
    report.net = "as it is".into();
    report.session = Some(session);
    report.messages_per_private_layer = u32::try_from(sums.layer_messages).unwrap_or(u32::MAX);
    (report.discarded_slots, report.discarded_bytes) = (sums.discarded_passes, sums.discarded_bytes);
    Ok(report)
}

/// All three parties here.
fn local(a: &Args) -> Result<Report> {
    let profile: Profile = a.net.parse()?;
    let Chosen { model, adapter, config, private_layers } = a.private.chosen(&a.model)?;
    let codec = TextCodec::open(&model)?;
    let prompt = encode(&codec, &a.prompt)?;
    let limit = a.context.unwrap_or(usize::MAX).min(config.max_positions);
    if prompt.len() > limit {
        return Err(Error::Config(format!(
            "the prompt has {} tokens, but the context is {limit}: shorten the prompt, or raise --context up to {}",
            prompt.len(),
            config.max_positions
        )));
    }
    let draft = draft(a, &model)?;
    let mut options = LocalOptions::new(private_layers).net(profile);
    // Nothing of the request: the plan is the model's, and tells nobody how long a prompt is.
    options.max_positions = a.context;
    options.base = a.base.clone();
    options.adapter = adapter.clone();
    if let Some(file) = &a.calibration_text {
        options.calibration_text = Some(calibrate::read_text(file)?);
    }
    if !a.json {
        eprintln!("preparing {} (calibration, fixed point, shares of the weights) ...", a.model.display());
    }
    let bar;
    (options.progress, bar) = super::progress::bar(!a.json);
    let opened = Local::open(&model, options);
    bar.finish_and_clear();
    let mut local = opened?;
    draft.map_or(Ok(()), |d| local.draft_with(d))?;
    if let (Some(base), false) = (&a.base, local.plan().head.public) {
        eprintln!(
            "warning: final norm and head are not those of --base {}, bit for bit: they stay private",
            base.display()
        );
    }
    let mut speaker = Speaker::new(a, codec, &prompt, &config.eos_ids)?;
    speaker.begin(&a.prompt)?;
    let out = local.generate(&prompt, a.max_new_tokens, a.temperature, a.seed, a.check, &mut |id| speaker.token(id));
    let g = match out {
        Ok(g) => g,
        Err(e) => {
            speaker.break_off()?;
            return Err(local.root_cause(e));
        }
    };
    let text = speaker.finish()?;
    let links = local.links();
    let (preparation_bytes, preparation) = local.preparation();
    let plan = local.plan().clone();
    let owner = local.finish()?;
    let check = match a.check {
        false => None,
        true => {
            let weights = adapted(&Checkpoint::open(&model)?, &model, adapter.as_deref(), &Progress::default())?;
            Some(check(&weights, &prompt, &g, a.temperature > 0.0))
        }
    };
    let mut report = Report::new(a, text, prompt.len(), g, &plan, links);
    report.net = profile.to_string();
    report.preparation_ms = Some(ms(preparation));
    report.preparation_bytes = Some(preparation_bytes);
    report.messages_per_private_layer = owner.layer_messages.iter().copied().max().unwrap_or(0);
    (report.discarded_slots, report.discarded_bytes) = (owner.discarded_passes, owner.discarded_bytes);
    report.check = check;
    Ok(report)
}

impl Report {
    fn new(
        a: &Args,
        text: String,
        prompt_tokens: usize,
        g: Generation,
        plan: &Plan,
        links: BTreeMap<String, LinkReport>,
    ) -> Report {
        let mut decode: Vec<f64> = g.decode.iter().copied().map(ms).collect();
        decode.sort_by(f64::total_cmp);
        Report {
            text,
            tokens: g.tokens,
            prompt_tokens,
            stop: match g.stop {
                Stop::EndToken => "end_token",
                Stop::Length => "length",
                Stop::Caller => "caller",
            },
            public_layers: plan.first_private,
            private_layers: plan.layers.len(),
            private_embedding: plan.private_embedding,
            private_head: !plan.head.public,
            net: String::new(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            session: None,
            preparation_ms: None,
            preparation_bytes: None,
            prefill_ms: ms(g.prefill),
            decode_ms: Decode { median: quantile(&decode, 0.5), p95: quantile(&decode, 0.95) },
            draft: DraftFacts::new(a, g.drafts),
            messages_per_private_layer: 0,
            links,
            discarded_slots: 0,
            discarded_bytes: 0,
            peak_memory_bytes: peak_memory(),
            check: None,
        }
    }
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
    match &r.session {
        None => eprintln!("network       {}; {} threads for all three parties", r.net, r.threads),
        Some(s) => {
            eprintln!("owner         {}", s.owner);
            eprintln!("helper        {}", s.helper);
            eprintln!("session       {}, set up in {:.0} ms, preparation {}", s.id, s.setup_ms, s.preparation);
        }
    }
    if let (Some(ms), Some(bytes)) = (r.preparation_ms, r.preparation_bytes) {
        eprintln!("preparation   {ms:.0} ms, {:.1} MB, once per model", mb(bytes));
    }
    eprintln!("prefill       {:.1} ms for {} tokens", r.prefill_ms, r.prompt_tokens);
    eprintln!(
        "decode        {:.1} ms per token median, {:.1} p95, over {} tokens",
        r.decode_ms.median,
        r.decode_ms.p95,
        r.tokens.len().saturating_sub(1)
    );
    if let Some(d) = &r.draft {
        eprintln!(
            "drafts        {} of {} accepted ({:.0} %), {} decode passes, {} drafts each at most, from {}",
            d.accepted,
            d.drafted,
            100.0 * d.rate,
            d.passes,
            d.tokens,
            d.model
        );
    }
    eprintln!("messages      {} in sequence per private layer", r.messages_per_private_layer);
    crate::show_links(&r.links);
    eprintln!("left over     {} slots walked ahead and dropped, {:.3} MB", r.discarded_slots, mb(r.discarded_bytes));
    let whose = if r.session.is_some() { "this client" } else { "all three parties" };
    eprintln!("peak memory   {:.0} MB for {whose}", mb(r.peak_memory_bytes));
    if let Some(c) = &r.check {
        eprintln!(
            "check         logits opened to the client for this check only: {} of {} tokens agree, max KL {:.2e}, max logit error {:.4}",
            c.agree, c.of, c.max_kl, c.max_logit_error
        );
    }
}
