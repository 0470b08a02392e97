//! `trefoil serve`: the gateway.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use trefoil::client::Limits;
use trefoil::deploy::config::{Config, Log, LogFormat, Party};
use trefoil::error::{Error, Result};
use trefoil::net::shape::Profile;
use trefoil::serve::{Gateway, Keys, Options};

/// Options of `trefoil serve`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: super::source::Args,
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
    super::party::write_logs(match &a.source.config {
        Some(path) => Config::load(path)?.log(),
        None => Log { format: LogFormat::Text, level: tracing::Level::WARN },
    })?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("http").enable_all().build();
    let runtime = runtime.map_err(|e| Error::io("starting threads", e))?;
    runtime.block_on(serve(a, keys))
}

async fn serve(a: &Args, keys: Keys) -> Result<()> {
    let limits = Limits { sessions: a.sessions, waiting: a.queue };
    let client = a.source.open(limits).await?;
    let (name, network, drain) = match &a.source.config {
        Some(path) => {
            eprintln!("owner {}, helper {}", client.facts().owner, client.facts().helper);
            let config = Config::load(path)?;
            let name = match config.party() {
                Party::Client { public, .. } => named(public),
                _ => String::new(),
            };
            (name, "as it is".to_owned(), config.limits().drain)
        }
        None => (named(&a.source.model), a.source.net.parse::<Profile>()?.to_string(), Duration::from_secs(30)),
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
