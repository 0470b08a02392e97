//! `trefoil serve`: the gateway.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use trefoil::client::{Client, Limits};
use trefoil::deploy::config::{Config, Log, LogFormat, Party};
use trefoil::error::{Error, Result};
use trefoil::generate::LocalOptions;
use trefoil::net::shape::Profile;
use trefoil::serve::{Gateway, Keys, Options};

use super::private::Chosen;

/// Options of `trefoil serve`.
#[derive(clap::Args)]
pub struct Args {
    /// The client of a deployment: its configuration (trefoil init client). Without it all three parties run in this process, which
    /// shows the protocol and isolates nothing.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "adapter", "private_layers", "net", "context"])]
    config: Option<PathBuf>,
    /// Without --config: a Hugging Face directory.
    #[arg(long, default_value = "models/quill-4m")]
    model: PathBuf,
    #[command(flatten)]
    private: super::private::Args,
    /// Without --config: a simulated network: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS.
    #[arg(long, default_value = "none")]
    net: String,
    /// Without --config: limit on positions, below the model's own.
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Where to listen, over HTTP without TLS. An address that others can reach needs --api-keys.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// A file of API keys, one a line, readable by its owner alone. Callers send one as `Authorization: Bearer KEY`.
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// What the model is called; by default as its directory.
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// With --config: requests that run at the same time, each in a session of its own. The owner limits them too ([limits] sessions).
    #[arg(long, default_value_t = 4)]
    sessions: usize,
    /// Requests that may wait; what comes beyond them is told to try again later (429).
    #[arg(long, default_value_t = 64)]
    queue: usize,
}

/// Runs the command, until SIGTERM or Ctrl-C.
///
/// # Errors
/// Whatever keeps it from serving.
pub fn run(a: &Args) -> Result<()> {
    let keys = a.api_keys.as_deref().map_or(Ok(Keys::default()), Keys::read)?;
    if !a.listen.ip().is_loopback() && keys.is_empty() {
        return Err(Error::Config(format!(
            "--listen {}: others can reach this address, and prompts pass it in the clear: give --api-keys FILE, or listen at 127.0.0.1",
            a.listen
        )));
    }
    if a.sessions == 0 || a.queue == 0 {
        return Err(Error::Config("--sessions and --queue: give 1 or more".into()));
    }
    super::party::write_logs(match &a.config {
        Some(path) => Config::load(path)?.log(),
        None => Log { format: LogFormat::Text, level: tracing::Level::WARN },
    })?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("http").enable_all().build();
    let runtime = runtime.map_err(|e| Error::io("starting threads", e))?;
    runtime.block_on(serve(a, keys))
}

async fn serve(a: &Args, keys: Keys) -> Result<()> {
    let (client, name, network, drain) = match &a.config {
        Some(path) => {
            let config = Config::load(path)?;
            let name = match config.party() {
                Party::Client { public, .. } => named(public),
                _ => String::new(),
            };
            let limits = Limits { sessions: a.sessions, waiting: a.queue };
            let client = Client::connect_with(path, limits).await?;
            eprintln!("owner {}, helper {}", client.facts().owner, client.facts().helper);
            (client, name, "as it is".to_owned(), config.limits().drain)
        }
        None => {
            let profile: Profile = a.net.parse()?;
            let Chosen { model, adapter, private_layers, .. } = a.private.chosen(&a.model)?;
            let mut options = LocalOptions::new(private_layers).net(profile);
            options.max_positions = a.context;
            options.adapter = adapter;
            eprintln!(
                "no --config: owner, client and helper all run in this process with {}. That shows the protocol and isolates nothing; \
                 for three hosts see README.md. Preparing ...",
                a.model.display()
            );
            let client = Client::local(model, options, a.queue).await?;
            (client, named(&a.model), profile.to_string(), Duration::from_secs(30))
        }
    };
    let model = a.model_name.clone().unwrap_or(name);
    let gateway = Gateway::start(client, Options { listen: a.listen, keys, model: model.clone(), network }).await?;
    // For scripts that wait for it, and that let the system choose the port.
    super::say(&format!("listening on http://{}\n", gateway.address()))?;
    eprintln!(
        "model {model}; a chat and what each party sees: http://{0}/  OpenAI's API: http://{0}/v1",
        gateway.address()
    );
    let io = |e| Error::io("waiting for signals", e);
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate()).map_err(io)?;
    let mut int = signal(SignalKind::interrupt()).map_err(io)?;
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    eprintln!("finishing what runs, for at most {} s; signal again to end at once", drain.as_secs());
    tokio::select! { _ = term.recv() => {}, _ = int.recv() => {}, () = gateway.drain(drain) => {} }
    // Threads of sessions that are cut off have nothing to say any more.
    std::process::exit(0)
}

/// A directory's name; of the public part of a preparation that of the directory around it.
fn named(dir: &std::path::Path) -> String {
    let full = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_path_buf());
    let name = |p: &std::path::Path| p.file_name().map(|n| n.to_string_lossy().into_owned());
    match name(&full) {
        Some(n) if n == "public" => full.parent().and_then(name).unwrap_or(n),
        Some(n) => n,
        None => "model".into(),
    }
}
