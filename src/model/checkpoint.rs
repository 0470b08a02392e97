//! A Hugging Face checkpoint on disk: `model.safetensors`, or shards listed in `model.safetensors.index.json`. The files
//! are mapped, not read; a tensor becomes memory only when asked for, after its shape was compared with what the
//! configuration says, so no file can make us allocate more than it holds itself. Every weight must be finite.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use ndarray::{Array1, Array2};
use safetensors::tensor::{Dtype, Metadata};

use super::config::ModelConfig;
use super::files;
use super::mmap::MappedFile;
use crate::error::{Error, Result};

/// The largest shard index that is read, in bytes.
const INDEX_LIMIT: u64 = 64 << 20;
/// The largest safetensors header, in bytes; the format's own limit.
const HEADER_LIMIT: u64 = 100_000_000;
/// The most shards; the largest public models have a few hundred.
const SHARDS_LIMIT: usize = 4096;

const REFETCH: &str = "fetch it again from where the model comes from";

/// An open model directory: the configuration, and the weight files mapped. The files must stay as they are meanwhile.
#[derive(Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    shards: Vec<Shard>,
    /// Which shard holds a tensor.
    place: BTreeMap<String, usize>,
}

/// One mapped safetensors file.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    bytes: MappedFile,
    header: Metadata,
    /// Where in `bytes` the tensors begin.
    data_start: usize,
}

impl Checkpoint {
    /// Opens the model directory `dir` and checks the headers of all its weight files.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file, what is wrong with it and what to do; [`Error::Io`] when the system refuses.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = ModelConfig::open(dir)?;
        let single = dir.join("model.safetensors");
        let index_path = dir.join("model.safetensors.index.json");
        if single.exists() {
            let shard = Shard::open(single)?;
            let place = shard.header.tensors().into_keys().map(|name| (name, 0)).collect();
            return Ok(Checkpoint { config, shards: vec![shard], place });
        }
        let Some(index) = files::read_optional(&index_path, INDEX_LIMIT)? else {
            let remedy = if dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists()
            {
                "pytorch_model.bin is not read; convert it with transformers (AutoModelForCausalLM.from_pretrained(dir).save_pretrained(dir))"
            } else {
                "the path must name a Hugging Face model directory with its weights"
            };
            return Err(Error::Model(format!(
                "{}: neither model.safetensors nor model.safetensors.index.json is there; {remedy}",
                dir.display()
            )));
        };
        Self::open_shards(dir, config, &index_path, &index)
    }

    fn open_shards(dir: &Path, config: ModelConfig, index_path: &Path, index: &[u8]) -> Result<Self> {
        let wrong = |text: String| Error::Model(format!("{}: {text}", index_path.display()));
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let index: Index =
            serde_json::from_slice(index).map_err(|e| wrong(format!("is not a shard index ({e}); {REFETCH}")))?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        if names.len() > SHARDS_LIMIT {
            return Err(wrong(format!("names {} shards; at most {SHARDS_LIMIT} are read", names.len())));
        }
        let mut shards = Vec::new();
        let mut number = BTreeMap::new();
        for name in names {
            // The index comes from somebody else: it may not lead us to other files of this machine.
            let mut parts = Path::new(name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(wrong(format!(
                    "names the shard `{name}`, which is not a plain file name; a shard must lie beside its index"
                )));
            }
            let path = dir.join(name);
            if !path.exists() {
                return Err(wrong(format!(
                    "names the shard `{name}`, which is not there; fetch it from where the model comes from"
                )));
            }
            number.insert(name.clone(), shards.len());
            shards.push(Shard::open(path)?);
        }
        let mut place = BTreeMap::new();
        for (tensor, file) in index.weight_map {
            if let Some(&shard) = number.get(&file) {
                place.insert(tensor, shard);
            }
        }
        Ok(Checkpoint { config, shards, place })
    }

    /// What `config.json` says.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether there is a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    /// The matrix `name`, which must be `shape[0]` x `shape[1]`, as f32.
    ///
    /// # Errors
    /// [`Error::Model`] naming file and tensor when it is missing, of another shape or type, or not finite throughout.
    pub fn tensor2(&self, name: &str, shape: [usize; 2]) -> Result<Array2<f32>> {
        let values = self.tensor(name, &shape)?;
        Array2::from_shape_vec(shape, values).map_err(|e| Error::Internal(format!("{name}: {e}")))
    }

    /// The vector `name`, which must be of length `len`, as f32.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor2`].
    pub fn tensor1(&self, name: &str, len: usize) -> Result<Array1<f32>> {
        Ok(Array1::from_vec(self.tensor(name, &[len])?))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.shard(name)?.tensor(name, shape)
    }

    /// The tensor `name` of this shape as it lies in the file: its number format and its bytes.
    pub(crate) fn stored(&self, name: &str, shape: &[usize]) -> Result<(Dtype, &[u8])> {
        self.shard(name)?.stored(name, shape)
    }

    fn shard(&self, name: &str) -> Result<&Shard> {
        self.place.get(name).and_then(|&i| self.shards.get(i)).ok_or_else(|| {
            let place = match self.shards.as_slice() {
                [only] => only.path.display().to_string(),
                _ => "model.safetensors.index.json".to_owned(),
            };
            Error::Model(format!(
                "{place}: the tensor `{name}` is missing; the weights are not those that config.json describes, {REFETCH}"
            ))
        })
    }
}

/// One safetensors file by itself, of whatever tensors.
#[derive(Debug)]
pub(crate) struct TensorFile(Shard);

impl TensorFile {
    /// Opens the file and checks its header.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file, [`Error::Io`].
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        Shard::open(path).map(TensorFile)
    }

    /// What it is called in errors.
    pub(crate) fn path(&self) -> &Path {
        &self.0.path
    }

    /// All its tensors with their shapes, by name.
    pub(crate) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.0.header.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect()
    }

    /// The tensor `name` of this shape, row by row, as f32.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor2`].
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.0.tensor(name, shape)
    }

    /// As [`Checkpoint::tensor2`].
    pub(crate) fn tensor2(&self, name: &str, shape: [usize; 2]) -> Result<Array2<f32>> {
        Array2::from_shape_vec(shape, self.0.tensor(name, &shape)?).map_err(|e| Error::Internal(format!("{name}: {e}")))
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let bytes = MappedFile::open(&path)?;
        let (header, data_start) =
            read_header(&bytes).map_err(|text| Error::Model(format!("{}: {text}; {REFETCH}", path.display())))?;
        Ok(Shard { path, bytes, header, data_start })
    }

    fn wrong(&self, name: &str, text: String) -> Error {
        Error::Model(format!("{}: the tensor `{name}` {text}", self.path.display()))
    }

    fn stored(&self, name: &str, shape: &[usize]) -> Result<(Dtype, &[u8])> {
        let wrong = |text| self.wrong(name, text);
        let info = self
            .header
            .info(name)
            .ok_or_else(|| wrong(format!("should be here according to the index, but is missing; {REFETCH}")))?;
        if info.shape != shape {
            return Err(wrong(format!(
                "has the shape {:?}, but by config.json it must be {shape:?}; the two are not of one model",
                info.shape
            )));
        }
        let (from, to) = info.data_offsets;
        // Checked when the header was read; `get` so that no mistake there can become a panic.
        let bytes = self
            .bytes
            .get(self.data_start..)
            .and_then(|data| data.get(from..to))
            .ok_or_else(|| wrong(format!("lies beyond the end of the file; {REFETCH}")))?;
        Ok((info.dtype, bytes))
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let wrong = |text| self.wrong(name, text);
        let (dtype, bytes) = self.stored(name, shape)?;
        let values = match dtype {
            Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::BF16 => bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F16 => widen_f16(bytes),
            other => {
                return Err(wrong(format!(
                    "is stored as {other:?}; only F32, F16 and BF16 are read: convert it with transformers (model.to(torch.bfloat16).save_pretrained(dir))"
                )));
            }
        };
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(at) => Err(wrong(format!(
                "has the value {} at {}; every weight must be a finite number, {REFETCH}",
                values[at],
                position(at, shape)
            ))),
        }
    }
}

/// Parses and checks a header: its tensors must tile the rest of the file exactly. Returns it and where it ends.
fn read_header(bytes: &[u8]) -> std::result::Result<(Metadata, usize), String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("is {} bytes long, too short for a safetensors file", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > HEADER_LIMIT {
        return Err(format!(
            "claims a header of {length} bytes, above the limit of {HEADER_LIMIT}; the file is corrupt or no safetensors file"
        ));
    }
    let header = usize::try_from(length).ok().and_then(|n| rest.get(..n)).ok_or_else(|| {
        format!("claims a header of {length} bytes but ends after {}; the file is truncated or corrupt", rest.len())
    })?;
    let data_start = 8 + header.len();
    // Parsed here rather than by `SafeTensors::deserialize`, whose sum of the lengths a hostile header can overflow.
    let header: Metadata = serde_json::from_slice(header).map_err(|e| format!("has a corrupt header ({e})"))?;
    let have = bytes.len() - data_start;
    let want = header.data_len();
    if have != want {
        let what = if have < want { "truncated" } else { "followed by other data" };
        return Err(format!("holds {have} bytes of tensors where its header lists {want}; the file is {what}"));
    }
    Ok((header, data_start))
}

/// In blocks, since the conversion of a slice uses the processor's own instruction and that of one value does not.
fn widen_f16(bytes: &[u8]) -> Vec<f32> {
    let mut values = vec![0.0; bytes.len() / 2];
    let mut block = [half::f16::ZERO; 1024];
    for (from, to) in bytes.chunks(2 * block.len()).zip(values.chunks_mut(block.len())) {
        let block = &mut block[..to.len()];
        for (h, b) in block.iter_mut().zip(from.as_chunks::<2>().0) {
            *h = half::f16::from_le_bytes(*b);
        }
        block.convert_to_f32_slice(to);
    }
    values
}

/// The index of element `at` in row-major order, as `[i, j]`.
fn position(mut at: usize, shape: &[usize]) -> String {
    let mut index = vec![0; shape.len()];
    for (i, n) in index.iter_mut().zip(shape).rev() {
        *i = at % n;
        at /= n;
    }
    format!("{index:?}")
}
