//! What is private of a model: the options that say so, and what they come to.

use std::path::{Path, PathBuf};

use trefoil::error::Result;
use trefoil::model::preparation::private_layers;
use trefoil::model::{Adapter, ModelConfig};

/// Options that say what is private.
#[derive(clap::Args)]
pub struct Args {
    /// A LoRA adapter over the model, its public base: a directory that peft has saved (adapter_config.json,
    /// adapter_model.safetensors). Its factors are private, and the layers from the first with one on are computed in private.
    /// A model that is an adapter itself is taken with the base that it names.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// How many layers, from the top, are private: a number, or 'all', which includes the embedding. Default: what the model's trefoil.json says, else half.
    #[arg(long, value_name = "N|all", allow_negative_numbers = true)]
    pub private_layers: Option<String>,
}

/// What was chosen.
pub struct Chosen {
    /// The directory of the model, or of the base of the adapter that was named in its place.
    pub model: PathBuf,
    /// The adapter's.
    pub adapter: Option<PathBuf>,
    /// The model's configuration.
    pub config: ModelConfig,
    /// Private layers; `None` is all and the embedding.
    pub private_layers: Option<usize>,
}

impl Args {
    /// Of the model in `dir`.
    ///
    /// # Errors
    /// What is wrong with the options, the model's configuration or the adapter.
    pub fn chosen(&self, dir: &Path) -> Result<Chosen> {
        let (model, adapter) = Adapter::resolve(dir, self.adapter.as_deref())?;
        let config = ModelConfig::open(&model)?;
        let private_layers = private_layers(self.private_layers.as_deref(), &config, (&model, adapter.as_deref()))?;
        Ok(Chosen { model, adapter, config, private_layers })
    }
}
