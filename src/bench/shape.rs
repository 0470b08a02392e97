//! What a published shape will cost: its plan without its weights.

use super::harness::{planned, random_weights};
use super::{PRESETS, Preset, measure};
use crate::error::{Error, Result};
use crate::model::preparation::parse_private_layers;
use crate::model::variant::Reshaping;
use crate::model::{ModelConfig, Variant};
use crate::plan::memory::owner_words;
use crate::predict::Source;

/// The shape of the model that is called `name` for `positions` positions as `trefoil cost` takes it, `private_layers` of it private (as
/// [`parse_private_layers`] reads them) and those reshaped. One layer with random weights is calibrated and planned, and
/// all private ones are taken to be like it, as in a benchmark: the bytes are a benchmark's of that many positions.
///
/// # Errors
/// [`Error::Config`] for a block, which no request can be made of, and numbers that do not fit the shape.
pub fn source(name: &str, private_layers: Option<&str>, reshaping: Reshaping, positions: usize) -> Result<Source> {
    let mut models = PRESETS.iter().filter(|p| p.is_model());
    let preset: &Preset = models.clone().find(|p| p.name == name).ok_or_else(|| {
        let known: Vec<&str> = models.by_ref().map(|p| p.name).collect();
        let known = known.join(", ");
        Error::Config(format!(
            "--preset {name}: expected a model, one of {known}; `trefoil bench` knows parts of models too"
        ))
    })?;
    if positions > preset.positions() {
        let most = preset.positions();
        return Err(Error::Config(format!("the request takes {positions} positions, but {} has {most}", preset.name)));
    }
    let plain = |layers| preset.config(layers, positions);
    let all = plain(preset.layers());
    let chosen = parse_private_layers(private_layers, &all)?;
    let private = chosen.unwrap_or(all.num_layers);
    if private == 0 || private > all.num_layers {
        let most = all.num_layers;
        return Err(Error::Config(format!("--private-layers {private}: {} has 1 to {most} of them", preset.name)));
    }
    let variant = reshaping.of(all.layer(0), 0)?;
    let one = ModelConfig { variant, ..plain(1) };
    let weights = "random weights of a layer and the embedding";
    measure::memory_for(weights, 4 * one.parameter_count(), "ask on a machine with more, or stop other programs")?;
    let mut plan = planned(&random_weights(one)?, chosen.is_none())?;
    plan.first_private = all.num_layers - private;
    plan.layers = plan.layers.iter().cycle().take(private).cloned().collect();
    let variant = variant.map(|v| Variant { from_layer: plan.first_private, ..v });
    let config = ModelConfig { variant, ..all };
    let owner_bytes = 2 * owner_words(&config, &plan);
    Ok(Source { config, plan, owner_bytes })
}
