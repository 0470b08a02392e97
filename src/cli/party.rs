//! `trefoil party`: a long-running Owner or Helper.

use std::path::PathBuf;

use trefoil::deploy::config::{Config, Log, LogFormat};
use trefoil::deploy::party::{Daemon, Options};
use trefoil::error::{Error, Result};

/// Options of `trefoil party`.
#[derive(clap::Args)]
pub struct Args {
    /// The owner's or helper's configuration (trefoil init owner, trefoil init helper).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// How the log is written, whatever the configuration says.
    #[arg(long, value_name = "text|json")]
    log: Option<String>,
}

/// Runs the command, until SIGTERM or Ctrl-C.
///
/// # Errors
/// Whatever keeps the party from serving.
pub fn run(a: &Args) -> Result<()> {
    let config = Config::load(&a.config)?;
    let mut log = config.log();
    match a.log.as_deref() {
        None => {}
        Some("text") => log.format = LogFormat::Text,
        Some("json") => log.format = LogFormat::Json,
        Some(other) => return Err(Error::Config(format!("--log {other}: expected text or json"))),
    }
    write_logs(log)?;
    let daemon = Daemon::start(&a.config, Options::default())?;
    // For scripts that wait for it, and that let the system choose the port.
    println!("listening on {}", daemon.address());
    daemon.run()
}

/// Structured logs on standard error. RUST_LOG, where it is set, says what is logged.
pub(crate) fn write_logs(log: Log) -> Result<()> {
    use tracing_subscriber::EnvFilter;
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(asked) => EnvFilter::try_new(&asked).map_err(|e| Error::Config(format!("RUST_LOG={asked}: {e}")))?,
        Err(_) => EnvFilter::new(log.level.to_string()),
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log.format {
        LogFormat::Text => {
            builder.with_target(false).with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init();
        }
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}
