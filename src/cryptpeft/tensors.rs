//! Tensors of one safetensors file by name, with errors that say what another tensor makes of the expected shape.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2};

use super::adapter::{Affine, LayerNorm};
use crate::error::{Error, Result};
use crate::model::checkpoint::TensorFile;

/// An open file. `facts` ends the error of a wrong shape: where the expected one comes from.
pub(super) struct Tensors {
    file: TensorFile,
    shapes: BTreeMap<String, Vec<usize>>,
    /// What the file should hold, in errors.
    kind: &'static str,
    pub(super) facts: String,
}

impl Tensors {
    pub(super) fn open(path: PathBuf, kind: &'static str) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let shapes = file.shapes();
        Ok(Tensors { file, shapes, kind, facts: String::new() })
    }

    pub(super) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.shapes.keys().map(String::as_str)
    }

    /// The error of a tensor.
    pub(super) fn wrong(&self, name: &str, text: &str) -> Error {
        Error::Model(format!("{}: the tensor `{name}` {text}", self.path().display()))
    }

    /// The shape of a tensor that has to be there.
    pub(super) fn shape(&self, name: &str) -> Result<&[usize]> {
        self.shapes.get(name).map(Vec::as_slice).ok_or_else(|| {
            self.wrong(name, &format!("is missing; every tensor of {} must be in the file: write it again", self.kind))
        })
    }

    /// The shape of a tensor with `N` axes, none of them empty; `axes` names them in the error.
    pub(super) fn sizes<const N: usize>(&self, name: &str, axes: &str) -> Result<[usize; N]> {
        let shape = self.shape(name)?;
        match <[usize; N]>::try_from(shape) {
            Ok(sizes) if !sizes.contains(&0) => Ok(sizes),
            _ => Err(self.wrong(name, &format!("has the shape {shape:?}, but must be {axes}, none of them 0"))),
        }
    }

    /// The values of a tensor of this shape, row by row.
    pub(super) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let found = self.shape(name)?;
        if found != shape {
            let text = format!("has the shape {found:?}, but must be {shape:?}: {}", self.facts);
            return Err(self.wrong(name, &text));
        }
        self.file.tensor(name, shape)
    }

    pub(super) fn vector(&self, name: &str, len: usize) -> Result<Array1<f32>> {
        Ok(Array1::from_vec(self.values(name, &[len])?))
    }

    pub(super) fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Array2<f32>> {
        self.reshaped(name, &[rows, columns], rows)
    }

    /// A tensor of this shape as a matrix of so many rows.
    pub(super) fn reshaped(&self, name: &str, shape: &[usize], rows: usize) -> Result<Array2<f32>> {
        let values = self.values(name, shape)?;
        let columns = values.len() / rows.max(1);
        Array2::from_shape_vec((rows, columns), values).map_err(|e| Error::Internal(format!("{name}: {e}")))
    }

    pub(super) fn affine(&self, name: &str, out: usize, inputs: usize) -> Result<Affine> {
        let weight = self.matrix(&format!("{name}.weight"), out, inputs)?;
        Ok(Affine { weight, bias: self.vector(&format!("{name}.bias"), out)? })
    }

    pub(super) fn norm(&self, name: &str, len: usize) -> Result<LayerNorm> {
        let weight = self.vector(&format!("{name}.weight"), len)?;
        Ok(LayerNorm { weight, bias: self.vector(&format!("{name}.bias"), len)? })
    }
}
