//! LoRA adapters (Hu et al. 2021) as the Python package `peft` writes them: `adapter_config.json` and
//! `adapter_model.safetensors`, kept apart from the base that they were trained on: `y = W x + (alpha / r) B (A x)`.
//!
//! Under MPC the base is public and the factors are private (MARILL, §5.2; `docs/protocols.md`). Everybody knows the base, which layers
//! and projections have an adapter, and its rank; `A` and `B` only the Owner. Read strictly: whatever in the
//! configuration would change the function and is not implemented is refused by its name.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2};
use serde_json::Value;

use super::calibrate::folded;
use super::checkpoint::TensorFile;
use super::config_json::Json;
use super::{LayerWeights, ModelConfig, Weights, files};
use crate::error::{Error, Result};
use crate::plan::{Group, Module};

/// The file that tells an adapter's directory from a model's.
pub(crate) const CONFIG: &str = "adapter_config.json";
pub(crate) const TENSORS: &str = "adapter_model.safetensors";
/// The largest `adapter_config.json` that is read, in bytes.
const CONFIG_LIMIT: u64 = 4 << 20;
pub(crate) const PREFIX: &str = "base_model.model.model.layers.";

/// The two factors of what is added to a projection.
#[derive(Clone, PartialEq)]
pub struct LowRank {
    /// `[rank, in]`.
    pub a: Array2<f32>,
    /// `[out, rank]`, the factor `alpha / r` in it.
    pub b: Array2<f32>,
}

impl fmt::Debug for LowRank {
    /// The shapes alone: both are private.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LowRank").field("a", &self.a.shape()).field("b", &self.b.shape()).finish()
    }
}

/// The adapters of a model.
#[derive(Clone, Debug)]
pub struct Adapter {
    factors: BTreeMap<(usize, Module), LowRank>,
}

/// What `adapter_config.json` says.
struct Settings {
    rank: usize,
    /// `alpha / r`, or `alpha / sqrt(r)`.
    scale: f64,
    modules: BTreeSet<Module>,
    layers: BTreeSet<usize>,
    base: Option<String>,
}

/// Fields that do not change what a trained adapter computes, whatever their value.
const NEUTRAL: [&str; 14] = [
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Fields that are read, each in its place.
const READ: [&str; 11] = [
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "layers_to_transform",
    "bias",
    "init_lora_weights",
    "layers_pattern",
    "exclude_modules",
];

impl Adapter {
    /// The directories of base and adapter: `--model` and `--adapter`; or both from `--model` alone where it names an adapter,
    /// whose configuration names the base.
    ///
    /// # Errors
    /// [`Error::Config`] where the base is not to be found.
    pub fn resolve(model: &Path, adapter: Option<&Path>) -> Result<(PathBuf, Option<PathBuf>)> {
        let is_adapter = model.join(CONFIG).is_file() && !model.join("config.json").exists();
        if !is_adapter {
            return Ok((model.to_path_buf(), adapter.map(Path::to_path_buf)));
        }
        let remedy = format!("give the base as --model BASE --adapter {}", model.display());
        if let Some(adapter) = adapter {
            return Err(Error::Config(format!(
                "--model {} is an adapter, and --adapter {} another one: --model must name the base",
                model.display(),
                adapter.display()
            )));
        }
        match open_json(model)?.text_or("base_model_name_or_path", "")? {
            "" => Err(Error::Config(format!("--model {}: an adapter that names no base: {remedy}", model.display()))),
            base if Path::new(base).is_dir() => Ok((base.into(), Some(model.to_path_buf()))),
            base => Err(Error::Config(format!(
                "--model {}: an adapter of the base `{base}`, which is no directory here: {remedy}",
                model.display()
            ))),
        }
    }

    /// Reads the adapter in `dir` of the base `config`, which lies in `base`.
    ///
    /// # Errors
    /// [`Error::Model`] naming the field, or the tensor with the shape that it has and the one that it should have.
    pub fn open(dir: &Path, base: &Path, config: &ModelConfig) -> Result<Adapter> {
        let json = open_json(dir)?;
        let settings = Settings::read(&json, config)?;
        let file = TensorFile::open(dir.join(TENSORS))?;
        let shapes = file.shapes();
        let of_base = match &settings.base {
            Some(name) => format!("the adapter was made for `{name}`, the base given is {}", base.display()),
            None => format!("the base given is {}", base.display()),
        };
        let wrong = |name: &str, text: String| {
            Error::Model(format!("{}: the tensor `{name}` {text}; {of_base}", file.path().display()))
        };
        let mut names: BTreeMap<(usize, Module), [Option<&str>; 2]> = BTreeMap::new();
        for name in shapes.keys() {
            let (layer, module, half) = parse(name).ok_or_else(|| {
                wrong(name, "is none of a LoRA adapter of a decoder's projections, which are all that is read".into())
            })?;
            if layer >= config.num_layers {
                return Err(wrong(name, format!("is of layer {layer}, but the base has {} layers", config.num_layers)));
            }
            if !settings.layers.contains(&layer) || !settings.modules.contains(&module) {
                return Err(wrong(name, format!("is of a projection that {CONFIG} does not name")));
            }
            if names.entry((layer, module)).or_default()[half].replace(name).is_some() {
                return Err(wrong(name, "is there twice, with and without the adapter's name".into()));
            }
        }
        let mut factors = BTreeMap::new();
        let wanted = settings.layers.iter().flat_map(|l| settings.modules.iter().map(|m| (*l, *m)));
        for (layer, module) in wanted {
            let ([Some(a), Some(b)], (out, inputs)) =
                (names.get(&(layer, module)).copied().unwrap_or_default(), module.dim(config, layer))
            else {
                let have = names.get(&(layer, module)).copied().unwrap_or_default();
                let half = if have[0].is_some() { "lora_B" } else { "lora_A" };
                let name = format!("{PREFIX}{layer}.{}.{half}.weight", module.path());
                return Err(wrong(&name, "is missing; fetch the adapter again from where it comes from".into()));
            };
            let r = settings.rank;
            let read = |name: &str, want: [usize; 2]| match shapes.get(name) {
                Some(have) if have[..] != want[..] => {
                    Err(wrong(name, format!("has the shape {have:?}, but with this base it must be {want:?}")))
                }
                _ => file.tensor2(name, want),
            };
            // The shapes first: of an adapter for a wider base they say more than the rank.
            let (a, b) = (read(a, [r, inputs])?, read(b, [out, r])?);
            if r > out.min(inputs) {
                return Err(json.wrong(
                    "r",
                    &format!(
                        "rank {r} is above the dimension {} of {} in layer {layer}; train a smaller one",
                        out.min(inputs),
                        module.name()
                    ),
                ));
            }
            let b = b.mapv(|v| (f64::from(v) * settings.scale) as f32);
            if !b.iter().all(|v| v.is_finite()) {
                return Err(json.wrong("lora_alpha", "makes a weight too large for float32"));
            }
            factors.insert((layer, module), LowRank { a, b });
        }
        // Last: what does not fit says more.
        if let Some(name) = settings.base.as_deref().filter(|name| !named(base, name)) {
            return Err(json.wrong(
                "base_model_name_or_path",
                &format!(
                    "the adapter was made for `{name}`, the base given is {}; on another base it computes something else. If that is the same model under another name, write that name here",
                    base.display()
                ),
            ));
        }
        Ok(Adapter { factors })
    }

    /// The first layer that has one.
    #[must_use]
    pub fn first_layer(&self) -> usize {
        self.factors.keys().next().map_or(0, |(layer, _)| *layer)
    }

    /// Gives every projection its adapter, beside the base's weights.
    ///
    /// # Errors
    /// [`Error::Internal`] for weights of another base than it was read for.
    pub fn attach(&self, w: &mut Weights) -> Result<()> {
        let beyond = || Error::Internal("an adapter of a deeper base".into());
        self.factors.keys().all(|(layer, _)| *layer < w.layers.len()).then_some(()).ok_or_else(beyond)?;
        w.layers.iter_mut().enumerate().try_for_each(|(i, l)| self.attach_to(i, l))
    }

    /// The same for layer `index` alone.
    ///
    /// # Errors
    /// As [`Adapter::attach`].
    pub(super) fn attach_to(&self, index: usize, l: &mut LayerWeights) -> Result<()> {
        for (&(_, module), factors) in self.factors.range((index, Module::ALL[0])..).take_while(|f| f.0.0 == index) {
            let l = Some(l.linear_mut(module)).filter(|l| l.w.dim() == (factors.b.nrows(), factors.a.ncols()));
            l.ok_or_else(|| Error::Internal(format!("no {} in layer {index}", module.name())))?.adapter =
                Some(factors.clone());
        }
        Ok(())
    }

    /// Number of its weights.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.factors.values().map(|f| (f.a.len() + f.b.len()) as u64).sum()
    }
}

/// Whether the base in `dir` goes by `name`: as a path, or its last part as the directory's name, or as what its configuration says that
/// it was loaded from.
fn named(dir: &Path, name: &str) -> bool {
    let canonical = |p: &Path| p.canonicalize().ok();
    let here = canonical(dir);
    if here.is_some() && here == canonical(Path::new(name)) {
        return true;
    }
    let last = |p: &Path| p.file_name().map(|n| n.to_string_lossy().to_lowercase());
    let wanted = last(Path::new(name));
    let config = files::read_optional(&dir.join("config.json"), CONFIG_LIMIT).ok().flatten();
    let config: Option<serde_json::Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let origin = config.as_ref().and_then(|c| c["_name_or_path"].as_str()).and_then(|n| last(Path::new(n)));
    wanted.is_some() && (wanted == here.as_deref().and_then(last) || wanted == origin)
}

fn open_json(dir: &Path) -> Result<Json> {
    let path = dir.join(CONFIG);
    let remedy = "the path must name the directory of an adapter that peft has saved (adapter_config.json, adapter_model.safetensors)";
    Json::parse(&files::read_required(&path, CONFIG_LIMIT, remedy)?, path.display().to_string())
}

/// Layer, projection and half (0 is `A`) of a tensor, with or without the name `default` of the adapter.
fn parse(name: &str) -> Option<(usize, Module, usize)> {
    let (layer, rest) = name.strip_prefix(PREFIX)?.split_once('.')?;
    let module = Module::ALL.into_iter().find(|m| rest.strip_prefix(m.path()).is_some_and(|r| r.starts_with('.')))?;
    let half = match rest.strip_prefix(module.path())? {
        ".lora_A.weight" | ".lora_A.default.weight" => 0,
        ".lora_B.weight" | ".lora_B.default.weight" => 1,
        _ => return None,
    };
    Some((layer.parse().ok()?, module, half))
}

impl Settings {
    fn read(json: &Json, c: &ModelConfig) -> Result<Settings> {
        match json.text_or("peft_type", "")? {
            "LORA" => {}
            "" => return Err(json.missing("peft_type")),
            other => return Err(json.wrong("peft_type", &format!("`{other}` is not supported; supported: LORA"))),
        }
        // Of what is not known, nobody can say that it changes nothing.
        for (name, value) in json.fields() {
            let known = NEUTRAL.contains(&name.as_str()) || READ.contains(&name.as_str());
            if !known && !is_default(value) {
                let text = format!(
                    "{value} changes what the adapter computes, or may; only adapters without it are supported"
                );
                return Err(json.wrong(name, &text));
            }
        }
        match json.text_or("bias", "none")? {
            "none" => {}
            other => return Err(json.wrong("bias", &format!("`{other}`: trained biases are not supported; only none"))),
        }
        if let Some(Value::String(how)) = json.value("init_lora_weights")
            && !["gaussian", "eva", "orthogonal"].contains(&how.as_str())
        {
            let text = format!(
                "`{how}` changes the base's weights too; convert it with peft (save_pretrained with path_initial_model_for_weight_conversion)"
            );
            return Err(json.wrong("init_lora_weights", &text));
        }
        for name in ["layers_pattern", "exclude_modules"] {
            let plain = json.value(name).is_none_or(|v| is_default(v) || v == "layers");
            if !plain {
                return Err(json.wrong(name, "patterns are not supported; name the projections in target_modules"));
            }
        }
        let rank = json.size("r")?;
        if rank == 0 {
            return Err(json.wrong("r", "rank 0: there is nothing to add"));
        }
        let alpha = json.float("lora_alpha")?;
        let by = if json.flag_or("use_rslora", false)? { (rank as f64).sqrt() } else { rank as f64 };
        let base = Some(json.text_or("base_model_name_or_path", "")?).filter(|b| !b.is_empty()).map(str::to_owned);
        Ok(Settings { rank, scale: alpha / by, modules: modules(json)?, layers: layers(json, c)?, base })
    }
}

/// What stands for "not used" in a configuration.
fn is_default(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn modules(json: &Json) -> Result<BTreeSet<Module>> {
    const NAME: &str = "target_modules";
    let known = || Module::ALL.map(Module::name).join(", ");
    let list = match json.value(NAME) {
        Some(Value::String(all)) if all == "all-linear" => return Ok(Module::ALL.into()),
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(Value::String(pattern)) => {
            let text = format!("the pattern `{pattern}` is not supported; give a list of {}, or all-linear", known());
            return Err(json.wrong(NAME, &text));
        }
        _ => return Err(json.wrong(NAME, &format!("must be a list of {}", known()))),
    };
    let one = |v: &Value| {
        let name = v.as_str().unwrap_or_default();
        // peft matches the end of a projection's path.
        let found = Module::ALL.into_iter().find(|m| m.path() == name || m.name() == name);
        found.ok_or_else(|| json.wrong(NAME, &format!("{v} is not supported; supported: {}", known())))
    };
    list.iter().map(one).collect()
}

fn layers(json: &Json, c: &ModelConfig) -> Result<BTreeSet<usize>> {
    const NAME: &str = "layers_to_transform";
    let list = match json.value(NAME) {
        None | Some(Value::Null) => return Ok((0..c.num_layers).collect()),
        Some(Value::Array(list)) if !list.is_empty() => list.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let one = |v: &Value| {
        let index = v.as_u64().and_then(|n| usize::try_from(n).ok());
        index.filter(|i| *i < c.num_layers).ok_or_else(|| {
            json.wrong(NAME, &format!("{v} is no layer of the base, which has {} (from 0)", c.num_layers))
        })
    };
    list.iter().map(one).collect()
}

/// `A` as it is multiplied: the norm's gain folded in, every row scaled by a power of two to a norm of 1 to 2; and what a column
/// of `B` is multiplied by for it. So neither what a middle value is rounded to nor the fractions depend on how an adapter's
/// scale is split between its factors.
fn balanced(a: &LowRank, gain: Option<&Array1<f32>>) -> (Array2<f32>, Vec<f32>) {
    let mut w = gain.map_or_else(|| a.a.clone(), |g| folded(&a.a, g));
    let back = w.rows_mut().into_iter().map(|mut row| {
        let norm = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        // A row of zeros stays one; the limits keep both powers within f32.
        let e = if norm > 0.0 { norm.log2().floor().clamp(-60.0, 60.0) as f32 } else { 0.0 };
        row *= (-e).exp2();
        e.exp2()
    });
    let back = back.collect();
    (w, back)
}

fn factors(l: &LayerWeights, module: Module) -> Option<(Array2<f32>, Vec<f32>)> {
    let gain = match module.group() {
        Group::Qkv => Some(&l.input_norm),
        Group::GateUp => Some(&l.post_norm),
        Group::O | Group::Down => None,
    };
    l.linear(module).adapter.as_ref().map(|a| balanced(a, gain))
}

/// The first factors of a group as they are multiplied, in the order of its projections.
pub(super) fn first_factors(l: &LayerWeights, group: Group) -> Vec<Array2<f32>> {
    let modules = Module::ALL.into_iter().filter(|m| m.group() == group);
    modules.filter_map(|m| factors(l, m)).map(|(a, _)| a).collect()
}

/// The second factor of a projection's adapter as it is multiplied.
pub(super) fn second_factor(l: &LayerWeights, module: Module) -> Option<Array2<f32>> {
    let (_, back) = factors(l, module)?;
    l.linear(module).adapter.as_ref().map(|a| &a.b * &Array1::from(back))
}
