//! The gateway: an OpenAI-compatible endpoint on the Client's side, because only there may the prompt exist, and a page that shows what
//! each party sees. HTTP without TLS: it is made for this machine, or for a network as private as the prompts.

mod api;
mod metrics;
mod openai;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::client::Client;
use crate::error::{Error, Result};

/// How to serve.
pub struct Options {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Who is let in; empty lets in everybody who can connect.
    pub keys: Keys,
    /// What the model is called.
    pub model: String,
    /// The network between the parties, in words, for the page.
    pub network: String,
}

/// API keys, as hashes.
#[derive(Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Reads a file of keys, one a line; empty lines and lines that begin with `#` are not keys.
    ///
    /// # Errors
    /// [`Error::Config`] if there is no key in it, one is shorter than 16 characters, or others than its owner may read it.
    pub fn read(path: &Path) -> Result<Keys> {
        use std::os::unix::fs::PermissionsExt;
        let name = path.display();
        let io = |e| Error::io(format!("--api-keys {name}"), e);
        let mode = std::fs::metadata(path).map_err(io)?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(Error::Config(format!(
                "--api-keys {name}: others than its owner may read it (mode {:o}); make it private: chmod 600 {name}",
                mode & 0o777
            )));
        }
        let text = std::fs::read_to_string(path).map_err(io)?;
        let mut keys = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let key = line.trim();
            if key.is_empty() || key.starts_with('#') {
                continue;
            }
            if key.len() < 16 {
                return Err(Error::Config(format!(
                    "--api-keys {name}: line {}: a key has at least 16 characters; make one with `openssl rand -hex 24`",
                    i + 1
                )));
            }
            keys.push(Sha256::digest(key.as_bytes()).into());
        }
        if keys.is_empty() {
            return Err(Error::Config(format!("--api-keys {name}: holds no key; put one a line")));
        }
        Ok(Keys(keys))
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A gateway that listens.
pub struct Gateway {
    address: SocketAddr,
    client: Client,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Gateway {
    /// Serves `client`, on the runtime that this is called from.
    ///
    /// # Errors
    /// [`Error::Config`] if the address cannot be listened at, or is open to others without a key.
    pub async fn start(client: Client, options: Options) -> Result<Gateway> {
        let Options { listen, keys, model, network } = options;
        if !listen.ip().is_loopback() && keys.is_empty() {
            return Err(Error::Config(format!(
                "--listen {listen}: others can reach this address, and prompts pass it in the clear: give --api-keys FILE, or listen at 127.0.0.1"
            )));
        }
        let listener = TcpListener::bind(listen).await.map_err(|e| {
            Error::Config(format!(
                "--listen {listen}: {e}; is another program listening there, and is it an address of this machine?"
            ))
        })?;
        let address = listener.local_addr().map_err(|e| Error::io("the listening socket", e))?;
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let shared = api::Gateway {
            metrics: metrics::Metrics::new(&client),
            client: client.clone(),
            model,
            network,
            keys: keys.0,
            loopback: listen.ip().is_loopback(),
            started,
            readiness: tokio::sync::Mutex::default(),
        };
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(crate::http::serve(listener, api::router(Arc::new(shared)), stopped));
        Ok(Gateway { address, client, stop, task })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more requests and lets those that were taken end, for at most `limit`.
    pub async fn drain(self, limit: Duration) {
        let _ = self.stop.send(true);
        let ended = async {
            self.client.close().await;
            let _ = self.task.await;
        };
        if tokio::time::timeout(limit, ended).await.is_err() {
            tracing::warn!("ending requests that did not end by themselves");
        }
    }
}
