//! Adapters in a directory: `adapter.safetensors` with the tensors as CryptPEFT names them, and `adapter_config.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ndarray::{Array1, Array2};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::adapter::{AdapterConfig, AdapterLayer, AdapterWeights, Affine, Block, EPS, LayerNorm};
use super::tensors::Tensors;
use crate::error::{Error, Result};
use crate::model::config_json::Json;
use crate::model::files;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter.safetensors";
/// What the tensors may also be called.
const ALTERNATIVE: &str = "model.safetensors";
/// The largest `adapter_config.json` that is read, in bytes.
const CONFIG_LIMIT: u64 = 4 << 20;
const PREFIX: &str = "adapters.adapter_layer_";
/// The fields of `adapter_config.json`.
const FIELDS: [&str; 4] = ["heads", "scale", "eps", "labels"];

impl AdapterWeights {
    /// Reads the adapters in `dir`; the configuration comes from the shapes and `adapter_config.json`. With
    /// `backbone_tokens`, they must be made for that many tokens.
    ///
    /// # Errors
    /// [`Error::Model`] naming the field, or the tensor with the shape that it has and the one that it should have;
    /// [`Error::Io`].
    pub fn open(dir: &Path, backbone_tokens: Option<usize>) -> Result<(AdapterConfig, Self)> {
        let json = open_json(dir)?;
        let path = [TENSORS, ALTERNATIVE].map(|name| dir.join(name)).into_iter().find(|path| path.exists());
        let path = path.ok_or_else(|| {
            let text = format!("neither {TENSORS} nor {ALTERNATIVE} is there; give the directory of a trained adapter");
            Error::Model(format!("{}: {text}", dir.display()))
        })?;
        let mut file = Tensors::open(path, "a CryptPEFT adapter")?;
        let config = configuration(&json, &mut file)?;
        if let Some(tokens) = backbone_tokens.filter(|n| *n != config.tokens) {
            let name = format!("{PREFIX}{}.blks.blk_0.self_attention.attn_reset.weight", config.layers[0]);
            let have = config.tokens;
            return Err(file.wrong(&name, &format!(
                "has the shape [{have}, {have}], but must be [{tokens}, {tokens}]: the backbone has {tokens} tokens; use the backbone that the adapter was trained on"
            )));
        }
        let layers = config.layers.iter().map(|i| read_layer(&file, &config, *i)).collect::<Result<_>>()?;
        let ln = file.norm("ln", config.hidden)?;
        let head = file.affine("heads.head", config.classes, config.hidden)?;
        let weights = AdapterWeights { layers, ln, head };
        let known: BTreeSet<String> = weights.named(&config).into_iter().map(|(name, ..)| name).collect();
        if let Some(name) = file.names().find(|name| name.starts_with("adapters.") && !known.contains(*name)) {
            let text = format!(
                "is none of the tensors of adapters with {} blocks each; all must be built alike, and qkv has no bias",
                config.blocks
            );
            return Err(file.wrong(name, &text));
        }
        Ok((config, weights))
    }

    /// Writes the directory `dir`, which [`AdapterWeights::open`] reads.
    ///
    /// # Errors
    /// [`Error::Model`] where the configuration cannot be; [`Error::Shape`] where the weights are not of it;
    /// [`Error::Io`].
    pub fn save(&self, config: &AdapterConfig, dir: &Path) -> Result<()> {
        config.check("the adapter")?;
        self.check_shapes(config)?;
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir.display().to_string(), e))?;
        let mut fields = json!({ "heads": config.heads, "scale": config.scale });
        if config.eps != EPS {
            fields["eps"] = config.eps.into();
        }
        if !config.labels.is_empty() {
            fields["labels"] = config.labels.clone().into();
        }
        let all = self.named(config);
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let all: Vec<_> = all.into_iter().map(|(name, shape, values)| (name, shape, bytes(&values))).collect();
        let views = all.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            view.map(|v| (name.as_str(), v)).map_err(|e| Error::Internal(format!("{name}: {e}")))
        });
        let path = dir.join(TENSORS);
        safetensors::serialize_to_file(views.collect::<Result<Vec<_>>>()?, None, &path).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(e) => Error::io(path.display().to_string(), e),
            other => Error::Internal(format!("{}: {other}", path.display())),
        })?;
        let path = dir.join(CONFIG);
        std::fs::write(&path, format!("{fields:#}\n")).map_err(|e| Error::io(path.display().to_string(), e))
    }

    /// Whether the weights have the shapes of the configuration.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the first tensor that has not.
    pub fn check_shapes(&self, config: &AdapterConfig) -> Result<()> {
        let wrong = |lhs, rhs| Err(Error::Shape { op: "CryptPEFT adapter", lhs, rhs });
        let blocks = self.layers.iter().map(|layer| layer.blocks.len()).collect::<Vec<_>>();
        if blocks.len() != config.layers.len() || blocks.iter().any(|n| *n != config.blocks) {
            let want = format!("{} blocks in each of the layers {:?}", config.blocks, config.layers);
            return wrong(format!("layers of {blocks:?} blocks"), want);
        }
        let want = shapes(config);
        for (name, shape, _) in self.named(config) {
            match want.get(&name) {
                Some(want) if *want != shape => return wrong(format!("{name} {shape:?}"), format!("{want:?}")),
                _ => {}
            }
        }
        Ok(())
    }

    /// All tensors: name, shape, values.
    fn named(&self, config: &AdapterConfig) -> Vec<(String, Vec<usize>, Vec<f32>)> {
        let mut all = Named(Vec::new());
        for (i, layer) in config.layers.iter().zip(&self.layers) {
            let p = format!("{PREFIX}{i}");
            all.affine(format!("{p}.lora_A"), &layer.lora_a);
            for (j, block) in layer.blocks.iter().enumerate() {
                let b = format!("{p}.blks.blk_{j}");
                all.norm(format!("{b}.ln_1"), &block.ln_1);
                all.matrix(format!("{b}.self_attention.qkv.weight"), &block.qkv);
                all.affine(format!("{b}.self_attention.attn_reset"), &block.attn_reset);
                all.affine(format!("{b}.self_attention.proj"), &block.proj);
                all.norm(format!("{b}.ln_2"), &block.ln_2);
                all.affine(format!("{b}.mlp.0"), &block.mlp_0);
                all.affine(format!("{b}.mlp.3"), &block.mlp_3);
            }
            all.affine(format!("{p}.lora_B"), &layer.lora_b);
        }
        all.norm("ln".to_owned(), &self.ln);
        all.affine("heads.head".to_owned(), &self.head);
        all.0
    }
}

/// Tensors with their names, shapes and values.
struct Named(Vec<(String, Vec<usize>, Vec<f32>)>);

impl Named {
    fn matrix(&mut self, name: String, m: &Array2<f32>) {
        self.0.push((name, m.shape().to_vec(), m.iter().copied().collect()));
    }

    fn vector(&mut self, name: String, v: &Array1<f32>) {
        self.0.push((name, v.shape().to_vec(), v.to_vec()));
    }

    fn affine(&mut self, name: String, affine: &Affine) {
        self.matrix(format!("{name}.weight"), &affine.weight);
        self.vector(format!("{name}.bias"), &affine.bias);
    }

    fn norm(&mut self, name: String, norm: &LayerNorm) {
        self.vector(format!("{name}.weight"), &norm.weight);
        self.vector(format!("{name}.bias"), &norm.bias);
    }
}

/// The shape of every tensor.
fn shapes(config: &AdapterConfig) -> BTreeMap<String, Vec<usize>> {
    let (d, r, t) = (config.hidden, config.rank, config.tokens);
    let mut all = BTreeMap::new();
    let mut add = |name: String, out: usize, inputs: &[usize]| {
        all.insert(format!("{name}.weight"), [&[out], inputs].concat());
        all.insert(format!("{name}.bias"), vec![out]);
    };
    for i in &config.layers {
        let p = format!("{PREFIX}{i}");
        add(format!("{p}.lora_A"), r, &[d]);
        add(format!("{p}.lora_B"), d, &[r]);
        for j in 0..config.blocks {
            let b = format!("{p}.blks.blk_{j}");
            add(format!("{b}.ln_1"), r, &[]);
            add(format!("{b}.self_attention.qkv"), 3 * r, &[r]);
            add(format!("{b}.self_attention.attn_reset"), t, &[t]);
            add(format!("{b}.self_attention.proj"), r, &[r]);
            add(format!("{b}.ln_2"), r, &[]);
            add(format!("{b}.mlp.0"), r, &[r]);
            add(format!("{b}.mlp.3"), r, &[r]);
        }
    }
    add("ln".to_owned(), d, &[]);
    add("heads.head".to_owned(), config.classes, &[d]);
    all
}

fn open_json(dir: &Path) -> Result<Json> {
    let path = dir.join(CONFIG);
    let remedy = "it must say how many heads the adapters have: {\"heads\": 3}";
    let bytes = files::read_required(&path, CONFIG_LIMIT, remedy)?;
    let json = Json::parse(&bytes, path.display().to_string())?;
    match json.fields().keys().find(|name| !FIELDS.contains(&name.as_str())) {
        Some(name) => Err(json.wrong(name, &format!("is not read; the fields are {FIELDS:?}: remove it"))),
        None => Ok(json),
    }
}

/// The `N` of the names that start with `PREFIX N .` and go on with `rest`.
fn numbers(file: &Tensors, prefix: &str) -> Result<Vec<usize>> {
    let mut all = BTreeSet::new();
    for name in file.names() {
        let Some(rest) = name.strip_prefix(prefix) else { continue };
        let number = rest.split_once('.').map_or(rest, |(number, _)| number);
        match number.parse::<usize>() {
            Ok(n) if n.to_string() == number => all.insert(n),
            _ => return Err(file.wrong(name, &format!("should have a number after `{prefix}`; rename it"))),
        };
    }
    Ok(all.into_iter().collect())
}

/// The configuration by the shapes of the first adapter and of the head.
fn configuration(json: &Json, file: &mut Tensors) -> Result<AdapterConfig> {
    let layers = numbers(file, PREFIX)?;
    let Some(first) = layers.first().map(|i| format!("{PREFIX}{i}")) else {
        return Err(file.wrong(&format!("{PREFIX}*.lora_A.weight"), "is missing: there is no adapter of any layer"));
    };
    let lora_a = format!("{first}.lora_A.weight");
    let [rank, hidden] = file.sizes(&lora_a, "[rank, hidden]")?;
    let blocks = numbers(file, &format!("{first}.blks.blk_"))?;
    if blocks.is_empty() || blocks.last() != Some(&(blocks.len() - 1)) {
        let text = format!("is of the blocks {blocks:?}; they must be counted from 0 without a gap");
        return Err(file.wrong(&format!("{first}.blks"), &text));
    }
    let reset = format!("{first}.blks.blk_0.self_attention.attn_reset.weight");
    let [tokens, keys] = file.sizes(&reset, "[tokens, tokens]")?;
    if tokens != keys {
        let text = format!("has the shape [{tokens}, {keys}], but must be square: it maps every key to a key");
        return Err(file.wrong(&reset, &text));
    }
    let [classes, _] = file.sizes("heads.head.weight", "[classes, hidden]")?;
    file.facts = format!(
        "`{lora_a}` has the rank {rank} and the hidden size {hidden}, `{reset}` {tokens} tokens, `heads.head.weight` {classes} classes; tensors of different adapters do not go together"
    );
    let config = AdapterConfig {
        hidden,
        rank,
        heads: json.size("heads")?,
        blocks: blocks.len(),
        layers,
        tokens,
        classes,
        scale: json.float_or("scale", 1.0)? as f32,
        eps: json.float_or("eps", EPS)?,
        labels: labels(json)?,
    };
    config.check(&format!("{} with {CONFIG}", file.path().display()))?;
    Ok(config)
}

fn labels(json: &Json) -> Result<Vec<String>> {
    let Some(value) = json.value("labels") else { return Ok(Vec::new()) };
    let texts = value
        .as_array()
        .and_then(|list| list.iter().map(|label| label.as_str().map(str::to_owned)).collect::<Option<Vec<String>>>());
    texts.ok_or_else(|| json.expected("labels", "a list of strings", value))
}

fn read_layer(file: &Tensors, config: &AdapterConfig, i: usize) -> Result<AdapterLayer> {
    let (d, r, tokens) = (config.hidden, config.rank, config.tokens);
    let p = format!("{PREFIX}{i}");
    let block = |j: usize| -> Result<Block> {
        let b = format!("{p}.blks.blk_{j}");
        Ok(Block {
            ln_1: file.norm(&format!("{b}.ln_1"), r)?,
            qkv: file.matrix(&format!("{b}.self_attention.qkv.weight"), 3 * r, r)?,
            attn_reset: file.affine(&format!("{b}.self_attention.attn_reset"), tokens, tokens)?,
            proj: file.affine(&format!("{b}.self_attention.proj"), r, r)?,
            ln_2: file.norm(&format!("{b}.ln_2"), r)?,
            mlp_0: file.affine(&format!("{b}.mlp.0"), r, r)?,
            mlp_3: file.affine(&format!("{b}.mlp.3"), r, r)?,
        })
    };
    Ok(AdapterLayer {
        lora_a: file.affine(&format!("{p}.lora_A"), r, d)?,
        blocks: (0..config.blocks).map(block).collect::<Result<_>>()?,
        lora_b: file.affine(&format!("{p}.lora_B"), d, r)?,
    })
}
