//! The operations of a decoder layer with their gradients, for training on a processor. candle's own fused norm, softmax and
//! rotation have no backward pass (huggingface/candle issue 2168), and its slow ones walk memory a dozen times; these walk it
//! once each way. Sequences of a batch lie one after the other without padding.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Device, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

use super::attention;
use crate::model::{Activation, LayerShape};

/// Elements that a thread takes at a time.
const GRAIN: usize = 1 << 14;

/// The numbers of a contiguous f32 storage.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(all) = storage else { candle_core::bail!("f32 expected") };
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(&all[from..to]),
        None => candle_core::bail!("contiguous tensor expected, got {layout:?}"),
    }
}

/// Shows the numbers of `t`, row after row.
pub(crate) fn with_values<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(slice(storage, layout)?),
        _ => candle_core::bail!("tensor on the processor expected"),
    }
}

fn tensor(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), &Device::Cpu)
}

/// Rows and length of one, of a tensor of any rank.
fn rows_of(layout: &Layout) -> (usize, usize) {
    let width = layout.dims().last().copied().unwrap_or(1).max(1);
    (layout.shape().elem_count() / width, width)
}

/// `y = x w^T`, `x [n, in]`, `w [out, in]`.
pub(crate) struct Linear {
    /// Whether `x` leads to something that is trained.
    pub input: bool,
    /// Whether `w` is trained.
    pub weight: bool,
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let ((n, from), (out, also)) = (lx.shape().dims2()?, lw.shape().dims2()?);
        if from != also {
            candle_core::bail!("linear: {:?} by {:?}", lx.shape(), lw.shape());
        }
        let y = x.matmul(w, (1, n, out, from), lx, &lw.transpose(0, 1)?)?;
        Ok((y, Shape::from((n, out))))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // candle's own product computes both, needed or not: half of the work of an adapter or a frozen layer.
        let dx = self.input.then(|| dy.matmul(&w.detach())).transpose()?;
        let dw = self.weight.then(|| dy.t()?.matmul(&x.detach())).transpose()?;
        Ok((dx, dw))
    }
}

/// RMSNorm of every row of `x [.., d]` with gains `g [d]`.
pub(crate) struct RmsNorm {
    pub eps: f64,
    /// Whether the gains are trained.
    pub gain: bool,
}

impl RmsNorm {
    fn inverse(&self, row: &[f32]) -> f32 {
        let sum: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        (1.0 / (sum / row.len() as f64 + self.eps).sqrt()) as f32
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, g: &CpuStorage, lg: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, g) = (slice(x, lx)?, slice(g, lg)?);
        let mut y = vec![0f32; x.len()];
        let width = g.len();
        y.par_chunks_mut(width).zip(x.par_chunks(width)).with_min_len(GRAIN / width + 1).for_each(|(y, x)| {
            let inverse = self.inverse(x);
            y.iter_mut().zip(x).zip(g).for_each(|((y, x), g)| *y = x * inverse * g);
        });
        Ok((CpuStorage::F32(y), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, g: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        with_values(x, |xs| {
            with_values(g, |gs| {
                with_values(dy, |ds| {
                    let width = gs.len();
                    // Chunks of a fixed size, added up in order: the same sums whatever the number of threads.
                    let chunk = (GRAIN / width + 1) * width;
                    let mut dx = vec![0f32; xs.len()];
                    let gains: Vec<Vec<f32>> = dx
                        .par_chunks_mut(chunk)
                        .zip(xs.par_chunks(chunk))
                        .zip(ds.par_chunks(chunk))
                        .map(|((dx, xs), ds)| {
                            let mut dg = vec![0f32; if self.gain { width } else { 0 }];
                            let rows = xs.chunks(width).zip(ds.chunks(width));
                            for (dx, (x, d)) in dx.chunks_mut(width).zip(rows) {
                                let inverse = self.inverse(x);
                                let dot: f32 = x.iter().zip(d).zip(gs).map(|((x, d), g)| x * d * g).sum();
                                let back = dot * inverse * inverse * inverse / width as f32;
                                for (((dx, x), d), g) in dx.iter_mut().zip(x).zip(d).zip(gs) {
                                    *dx = d * g * inverse - x * back;
                                }
                                dg.iter_mut().zip(x).zip(d).for_each(|((dg, x), d)| *dg += d * x * inverse);
                            }
                            dg
                        })
                        .collect();
                    let dg = self.gain.then(|| {
                        let mut sum = vec![0f32; width];
                        gains.iter().for_each(|dg| sum.iter_mut().zip(dg).for_each(|(s, d)| *s += d));
                        tensor(sum, g)
                    });
                    Ok((Some(tensor(dx, x)?), dg.transpose()?))
                })
            })
        })
    }
}

/// Rotary positions: every block of `2 * half` columns of `x [n, blocks * 2 * half]` turned as its row's position says.
#[derive(Clone)]
pub(super) struct Rope {
    /// Cosine and sine per row and pair, `[n, half]`.
    pub turns: Arc<Vec<(f32, f32)>>,
    pub half: usize,
    /// 1, or -1 to turn back.
    pub direction: f32,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = rows_of(layout);
        if self.turns.len() != rows * self.half {
            candle_core::bail!("rope: {rows} rows, {} turns", self.turns.len() / self.half);
        }
        let mut y = slice(x, layout)?.to_vec();
        let turns = self.turns.par_chunks(self.half);
        y.par_chunks_mut(width).zip(turns).with_min_len(GRAIN / width + 1).for_each(|(row, turns)| {
            for block in row.chunks_mut(2 * self.half) {
                let (a, b) = block.split_at_mut(self.half);
                for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(turns) {
                    let sin = sin * self.direction;
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let back = Rope { direction: -self.direction, ..self.clone() };
        dy.contiguous()?.apply_op1_no_bwd(&back).map(Some)
    }
}

/// Causal attention of queries, keys and values within each sequence of a batch.
#[derive(Clone)]
pub(super) struct Attention {
    /// Where sequences start, and the end.
    pub starts: Arc<Vec<usize>>,
    pub shape: LayerShape,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = attention::forward(&self.starts, &self.shape, [slice(q, lq)?, slice(k, lk)?, slice(v, lv)?]);
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = with_values(q, |q| {
            with_values(k, |k| {
                with_values(v, |v| {
                    with_values(dy, |dy| Ok(attention::backward(&self.starts, &self.shape, [q, k, v], dy)))
                })
            })
        })?;
        Ok((Some(tensor(dq, q)?), Some(tensor(dk, k)?), Some(tensor(dv, v)?)))
    }
}

/// `activation(gate) * up`.
pub(super) struct Gated(pub Activation);

impl Gated {
    /// The activation and its slope.
    fn at(&self, x: f32) -> (f32, f32) {
        match self.0 {
            Activation::Silu => {
                let s = 1.0 / (1.0 + exp(-x));
                (x * s, s * (1.0 + x * (1.0 - s)))
            }
            Activation::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
            Activation::Quad => ((0.125 * x + 0.25) * x + 0.5, 0.25 * x + 0.25),
            Activation::Gelu => {
                let below = 0.5 * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2));
                let density =
                    exp(-0.5 * x * x) * 0.5 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
                (x * below, below + x * density)
            }
        }
    }
}

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, lg: &Layout, up: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (slice(gate, lg)?, slice(up, lu)?);
        let mut y = vec![0f32; gate.len()];
        y.par_chunks_mut(GRAIN).zip(gate.par_chunks(GRAIN)).zip(up.par_chunks(GRAIN)).for_each(|((y, gate), up)| {
            y.iter_mut().zip(gate).zip(up).for_each(|((y, g), u)| *y = self.at(*g).0 * u);
        });
        Ok((CpuStorage::F32(y), lg.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        with_values(gate, |g| {
            with_values(up, |u| {
                with_values(dy, |d| {
                    let mut dg = vec![0f32; g.len()];
                    let mut du = vec![0f32; g.len()];
                    let outs = dg.par_chunks_mut(GRAIN).zip(du.par_chunks_mut(GRAIN));
                    let ins = g.par_chunks(GRAIN).zip(u.par_chunks(GRAIN)).zip(d.par_chunks(GRAIN));
                    outs.zip(ins).for_each(|((dg, du), ((g, u), d))| {
                        for i in 0..g.len() {
                            let (value, slope) = self.at(g[i]);
                            dg[i] = d[i] * u[i] * slope;
                            du[i] = d[i] * value;
                        }
                    });
                    Ok((Some(tensor(dg, gate)?), Some(tensor(du, up)?)))
                })
            })
        })
    }
}

/// `e^x` to 2 units in the last place, without branches, so that a loop over it uses vectors; `x` is held to where the result
/// is a normal number.
pub(super) fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // Adding and taking away 1.5 * 2^23 rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// The loss of logits `[rows, vocab]`: the mean over rows of `nll * (negative log-likelihood of the target) + kl * KL(teacher,
/// student)`, in nats (MARILL, appendix E).
pub(crate) struct Loss {
    pub targets: Arc<Vec<u32>>,
    pub nll: f32,
    pub kl: f32,
    /// The teacher's logits, of the student's shape; needed where `kl` is not 0.
    pub teacher: Option<Arc<Vec<f32>>>,
}

/// A row as logarithms of probabilities.
fn log_softmax(row: &[f32]) -> Vec<f32> {
    let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = row.iter().map(|&l| f64::from(exp(l - max))).sum();
    let norm = max + sum.ln() as f32;
    row.iter().map(|l| l - norm).collect()
}

impl Loss {
    fn teacher_row(&self, row: usize, width: usize) -> Option<Vec<f32>> {
        let all = self.teacher.as_ref()?;
        Some(log_softmax(all.get(row * width..(row + 1) * width)?))
    }
}

impl CustomOp1 for Loss {
    fn name(&self) -> &'static str {
        "loss"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = rows_of(layout);
        let short = self.teacher.as_ref().is_some_and(|t| t.len() != rows * width);
        if self.targets.len() != rows || short || (self.kl != 0.0 && self.teacher.is_none()) {
            candle_core::bail!("loss: {rows} rows of logits, {} targets", self.targets.len());
        }
        let of_row = |(i, (row, &target)): (usize, (&[f32], &u32))| -> f64 {
            let student = log_softmax(row);
            let mut loss = f64::from(-student[target as usize] * self.nll);
            if let Some(teacher) = self.teacher_row(i, width) {
                let kl: f64 = teacher.iter().zip(&student).map(|(&t, &s)| f64::from(exp(t) * (t - s))).sum();
                loss += f64::from(self.kl) * kl;
            }
            loss
        };
        let values = slice(logits, layout)?.par_chunks(width).zip(self.targets.par_iter()).enumerate();
        let of_rows: Vec<f64> = values.map(of_row).collect();
        let mean = of_rows.iter().sum::<f64>() / rows.max(1) as f64;
        Ok((CpuStorage::F32(vec![mean as f32]), Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, d: &Tensor) -> Result<Option<Tensor>> {
        let scale = d.to_scalar::<f32>()? / self.targets.len().max(1) as f32;
        with_values(logits, |values| {
            let width = values.len() / self.targets.len().max(1);
            let mut grad = vec![0f32; values.len()];
            let rows = grad.par_chunks_mut(width).zip(values.par_chunks(width)).zip(self.targets.par_iter());
            rows.enumerate().for_each(|(i, ((grad, row), &target))| {
                let student = log_softmax(row);
                // The gradient of a cross entropy is the difference of the distributions.
                grad.iter_mut().zip(&student).for_each(|(g, &s)| *g = (self.nll + self.kl) * exp(s) * scale);
                grad[target as usize] -= self.nll * scale;
                if let Some(teacher) = self.teacher_row(i, width) {
                    grad.iter_mut().zip(&teacher).for_each(|(g, &t)| *g -= self.kl * exp(t) * scale);
                }
            });
            tensor(grad, logits).map(Some)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_close() {
        for i in -8000..8000 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) / want - 1.0).abs() < 3e-7, "{x}");
        }
        assert!(exp(-1e9) < 1e-37 && exp(1e9).is_finite());
    }

    #[test]
    fn the_loss_and_its_gradient_by_hand() {
        let var = candle_core::Var::from_slice(&[1.0f32, -0.5, 0.25, 2.0, 0.0, -1.0], (2, 3), &Device::Cpu).unwrap();
        let loss = || Loss {
            targets: Arc::new(vec![2, 0]),
            nll: 0.5,
            kl: 0.5,
            teacher: Some(Arc::new(vec![0.0, 1.0, 0.5, 1.5, 0.0, 0.5])),
        };
        let at = |values: &[f32]| {
            let t = Tensor::from_slice(values, (2, 3), &Device::Cpu).unwrap();
            t.apply_op1(loss()).unwrap().to_scalar::<f32>().unwrap()
        };
        let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        // Of the first row, in double precision.
        let softmax = |row: [f64; 3]| {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            row.map(|x| x.exp() / sum)
        };
        let rows = [([1.0, -0.5, 0.25], [0.0, 1.0, 0.5], 2), ([2.0, 0.0, -1.0], [1.5, 0.0, 0.5], 0)];
        let want: f64 = rows
            .iter()
            .map(|(s, t, target)| {
                let (s, t) = (softmax(*s), softmax(*t));
                let kl: f64 = (0..3).map(|i| t[i] * (t[i] / s[i]).ln()).sum();
                0.5 * kl - 0.5 * s[*target].ln()
            })
            .sum::<f64>()
            / 2.0;
        assert!((f64::from(at(&values)) - want).abs() < 1e-6);
        let grads = var.apply_op1(loss()).unwrap().backward().unwrap();
        let grad = grads.get(var.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for i in 0..6 {
            let moved = |by: f32| {
                let mut values = values.clone();
                values[i] += by;
                at(&values)
            };
            let slope = (moved(0.01) - moved(-0.01)) / 0.02;
            assert!((grad[i] - slope).abs() < 1e-4, "{i}: {} {slope}", grad[i]);
        }
    }
}
