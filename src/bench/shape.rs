//! What a published shape will cost: its plan without its weights.

use super::subject::{Changes, Shape};
use super::{PRESETS, Preset, measure};
use crate::error::{Error, Result};
use crate::model::preparation::parse_private_layers;
use crate::plan::Setting;
use crate::plan::memory::owner_words;
use crate::predict::Source;

/// The shape of the model that is called `name` for `positions` positions as `trefoil cost` takes it, `private_layers` of it private (as
/// [`parse_private_layers`] reads them) and those changed, on a network. One layer with random weights is calibrated and planned, and
/// all private ones are taken to be like it, as in a benchmark: the bytes are a benchmark's of that many positions.
///
/// # Errors
/// [`Error::Config`] for a block, which no request can be made of, and numbers that do not fit the shape.
pub fn source(
    name: &str,
    private_layers: Option<&str>,
    changes: Changes,
    (positions, setting): (usize, Setting),
) -> Result<Source> {
    let mut models = PRESETS.iter().filter(|p| p.is_model());
    let preset: &'static Preset = models.clone().find(|p| p.name == name).ok_or_else(|| {
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
    let private_layers = parse_private_layers(private_layers, &preset.config(preset.layers(), positions))?;
    let shape = Shape { preset, layers: Some(1), private_layers, changes };
    shape.check()?;
    let weights = "random weights of a layer and the embedding";
    let bytes = 4 * preset.config(1, positions).parameter_count() + shape.lora_bytes()?;
    measure::memory_for(weights, bytes, "ask on a machine with more, or stop other programs")?;
    let (config, plan) = shape.make(positions, setting)?.model;
    let owner_bytes = 2 * owner_words(&config, &plan);
    Ok(Source { config, plan, owner_bytes })
}
