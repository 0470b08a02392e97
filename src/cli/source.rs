//! Where a command's Client comes from: a deployment, or all three parties in this process.

use std::path::PathBuf;

use trefoil::client::{Client, Limits};
use trefoil::error::Result;
use trefoil::generate::LocalOptions;
use trefoil::net::shape::Profile;

use super::private::Chosen;

/// Options that say so.
#[derive(clap::Args)]
pub struct Args {
    /// The client of a deployment: its configuration (trefoil init client). Without it all three parties run in this process, which
    /// shows the protocol and isolates nothing.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "adapter", "private_layers", "net", "context"])]
    pub config: Option<PathBuf>,
    /// Without --config: a Hugging Face directory.
    #[arg(long, default_value = "models/quill-4m")]
    pub model: PathBuf,
    #[command(flatten)]
    private: super::private::Args,
    /// Without --config: a simulated network: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS.
    #[arg(long, default_value = "none")]
    pub net: String,
    /// Without --config: limit on positions, below the model's own.
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
}

impl Args {
    /// A Client with at least one session open.
    ///
    /// # Errors
    /// Whatever keeps it from one.
    pub async fn open(&self, limits: Limits) -> Result<Client> {
        if let Some(path) = &self.config {
            return Client::connect_with(path, limits).await;
        }
        let profile: Profile = self.net.parse()?;
        let Chosen { model, adapter, private_layers, .. } = self.private.chosen(&self.model)?;
        let mut options = LocalOptions::new(private_layers).net(profile);
        options.max_positions = self.context;
        options.adapter = adapter;
        eprintln!(
            "no --config: owner, client and helper all run in this process with {}. That shows the protocol and isolates nothing; \
             for three hosts see README.md. Preparing ...",
            self.model.display()
        );
        Client::local(model, options, limits.waiting).await
    }
}
