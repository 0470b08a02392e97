//! AdamW (Loshchilov and Hutter, arXiv:1711.05101) with warm-up, cosine decay and clipping. candle has one too, but its state cannot
//! be saved, and what cannot be saved cannot be resumed.

use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use super::ops::with_values;
use super::student::Parameter;

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.999;
const EPS: f32 = 1e-8;
/// Of matrices; gains and biases do not decay.
pub(crate) const DECAY: f32 = 0.01;
/// The largest norm of all gradients together.
const CLIP: f64 = 1.0;
/// One step in so many is spent on warming up.
const WARM_UP: usize = 20;
/// Elements that a thread takes at a time.
const GRAIN: usize = 1 << 14;

/// The moments of one parameter's gradient.
#[derive(Clone, PartialEq)]
pub(crate) struct Moments {
    pub mean: Vec<f32>,
    pub square: Vec<f32>,
}

/// The optimiser's state.
pub(crate) struct AdamW {
    /// By the parameters' order.
    pub moments: Vec<Moments>,
    /// Of matrices, a unit of the rate.
    pub decay: f32,
}

/// The learning rate of step `step` of `steps`: up to `peak` in a straight line, then down to 0 along a cosine.
pub(crate) fn rate(peak: f64, step: usize, steps: usize) -> f64 {
    let warm = steps.div_ceil(WARM_UP);
    if step < warm {
        return peak * (step + 1) as f64 / warm as f64;
    }
    let done = (step - warm) as f64 / (steps - warm).max(1) as f64;
    peak * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// Added up in parts of a fixed size, in order: the same sum whatever the number of threads.
fn sum_of_squares(values: &[f32]) -> f64 {
    let part = |part: &[f32]| part.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
    values.par_chunks(GRAIN).map(part).collect::<Vec<f64>>().iter().sum()
}

/// What all gradients are multiplied by so that they are no longer than [`CLIP`] together; `None` if they are not finite.
fn clip(parameters: &[Parameter], grads: &GradStore) -> Result<Option<f32>> {
    let mut norm = 0.0;
    for p in parameters {
        if let Some(g) = grads.get(p.var.as_tensor()) {
            norm += with_values(g, |g| Ok(sum_of_squares(g)))?;
        }
    }
    let norm = norm.sqrt();
    Ok(norm.is_finite().then(|| (CLIP / norm.max(CLIP)) as f32))
}

impl AdamW {
    pub(crate) fn new(parameters: &[Parameter], decay: f32) -> Self {
        let zeros = |p: &Parameter| {
            let n = p.var.elem_count();
            Moments { mean: vec![0.0; n], square: vec![0.0; n] }
        };
        AdamW { moments: parameters.iter().map(zeros).collect(), decay }
    }

    /// Moves the parameters that have a gradient; `done` steps were taken with these moments before. `false` if the gradient is
    /// not finite: then nothing was moved.
    pub(crate) fn step(&mut self, parameters: &[Parameter], grads: &GradStore, done: usize, rate: f64) -> Result<bool> {
        let Some(clip) = clip(parameters, grads)? else { return Ok(false) };
        let t = i32::try_from(done + 1).unwrap_or(i32::MAX);
        let (bias1, bias2) = (1.0 - BETA1.powi(t), 1.0 - BETA2.powi(t));
        let rate = rate as f32;
        for (p, moments) in parameters.iter().zip(&mut self.moments) {
            let Some(g) = grads.get(p.var.as_tensor()) else { continue };
            let decay = if p.var.rank() > 1 { self.decay } else { 0.0 };
            let mut values = with_values(p.var.as_tensor(), |v| Ok(v.to_vec()))?;
            with_values(g, |g| {
                let state = moments.mean.par_chunks_mut(GRAIN).zip(moments.square.par_chunks_mut(GRAIN));
                let parts = values.par_chunks_mut(GRAIN).zip(state).zip(g.par_chunks(GRAIN));
                parts.for_each(|((values, (mean, square)), g)| {
                    for i in 0..g.len() {
                        let g = g[i] * clip;
                        mean[i] = BETA1 * mean[i] + (1.0 - BETA1) * g;
                        square[i] = BETA2 * square[i] + (1.0 - BETA2) * g * g;
                        let by = (mean[i] / bias1) / ((square[i] / bias2).sqrt() + EPS);
                        values[i] -= rate * (by + decay * values[i]);
                    }
                });
                Ok(())
            })?;
            p.var.set(&Tensor::from_vec(values, p.var.shape(), &Device::Cpu)?)?;
        }
        Ok(true)
    }
}

/// Gradient descent with momentum.
pub(crate) struct Sgd {
    /// By the parameters' order.
    velocities: Vec<Vec<f32>>,
    decay: f32,
}

impl Sgd {
    const MOMENTUM: f32 = 0.9;

    pub(crate) fn new(parameters: &[Parameter], decay: f32) -> Self {
        Sgd { velocities: parameters.iter().map(|p| vec![0.0; p.var.elem_count()]).collect(), decay }
    }

    /// As [`AdamW::step`].
    pub(crate) fn step(&mut self, parameters: &[Parameter], grads: &GradStore, rate: f64) -> Result<bool> {
        let Some(clip) = clip(parameters, grads)? else { return Ok(false) };
        let rate = rate as f32;
        for (p, velocity) in parameters.iter().zip(&mut self.velocities) {
            let Some(g) = grads.get(p.var.as_tensor()) else { continue };
            let decay = if p.var.rank() > 1 { self.decay } else { 0.0 };
            let mut values = with_values(p.var.as_tensor(), |v| Ok(v.to_vec()))?;
            with_values(g, |g| {
                for ((value, velocity), g) in values.iter_mut().zip(velocity.iter_mut()).zip(g) {
                    *velocity = Self::MOMENTUM * *velocity + g * clip + decay * *value;
                    *value -= rate * *velocity;
                }
                Ok(())
            })?;
            p.var.set(&Tensor::from_vec(values, p.var.shape(), &Device::Cpu)?)?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_and_falls() {
        let rates: Vec<f64> = (0..100).map(|s| rate(1.0, s, 100)).collect();
        assert!((rates[0] - 0.2).abs() < 1e-12 && rates[4] == 1.0, "{rates:?}");
        assert!(rates.windows(2).skip(5).all(|w| w[1] < w[0]));
        assert!(rates[99] < 1e-3 && rates[99] > 0.0);
        assert_eq!(rate(1.0, 0, 1), 1.0);
    }
}
