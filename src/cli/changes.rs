//! What is changed of a preset's private layers: the options of `trefoil bench` and `trefoil cost` that say so.

use trefoil::bench::Changes;
use trefoil::error::{Error, Result};
use trefoil::model::variant::Reshaping;
use trefoil::model::{Activation, Softmax};

/// The options.
#[derive(clap::Args)]
pub struct Args {
    /// Of a preset: heads that become one in the private layers, for less softmax.
    #[arg(long, value_name = "M")]
    merge_heads: Option<usize>,
    /// Of a preset: how attention weighs, exact or 2relu.
    #[arg(long, value_name = "KIND")]
    softmax: Option<Softmax>,
    /// Of a preset: the MLP's activation, silu, relu, quad or gelu. Default: the preset's own: silu, of vit-b16 gelu.
    #[arg(long, value_name = "NAME")]
    activation: Option<Activation>,
    /// Of a preset: adapters of this rank on queries and values of the private layers (LoRA, unmerged). All else is public then.
    #[arg(long, value_name = "R", conflicts_with = "adaptformer_rank")]
    lora_rank: Option<usize>,
    /// Of vit-b16: a bottleneck of this rank with ReLU beside each layer's MLP (AdaptFormer).
    #[arg(long, value_name = "R")]
    adaptformer_rank: Option<usize>,
}

impl Args {
    /// What they come to.
    pub fn changes(&self) -> Changes {
        Changes {
            reshaping: Reshaping {
                merged: self.merge_heads.unwrap_or(1),
                softmax: self.softmax.unwrap_or_default(),
                activation: self.activation,
            },
            lora: self.lora_rank,
            bottleneck: self.adaptformer_rank,
        }
    }

    /// The first option that is given.
    pub fn given(&self) -> Option<&'static str> {
        let given = [
            ("--merge-heads", self.merge_heads.is_some()),
            ("--softmax", self.softmax.is_some()),
            ("--activation", self.activation.is_some()),
            ("--lora-rank", self.lora_rank.is_some()),
            ("--adaptformer-rank", self.adaptformer_rank.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(option, _)| option)
    }

    /// Refuses them beside a model.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first that is given.
    pub fn refuse_beside_model(&self) -> Result<()> {
        match self.given() {
            None => Ok(()),
            Some(option) => Err(Error::Config(format!(
                "{option} goes with --preset: what was done to a model stands in its trefoil.json, and its adapter is given by --adapter"
            ))),
        }
    }
}
