//! Labelled images to train adapters on and to measure them: shapes made from a seed, so that anyone has the same without any
//! download, or folders of files, one per label.

use std::path::{Path, PathBuf};

use ndarray::Array3;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use super::adapter::Gaussian;
use super::image::Preprocess;
use super::vit::CHANNELS;
use crate::error::{Error, Result};

/// An image and what it shows.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// `[3, image, image]`, normalised as the backbone takes it.
    pub pixels: Array3<f32>,
    /// Its place in [`Dataset::labels`].
    pub label: usize,
}

/// Labelled images, in two parts that share none.
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// To learn from.
    pub train: Vec<Example>,
    /// To measure on: a fifth of each label's images.
    pub test: Vec<Example>,
    /// Names of the labels.
    pub labels: Vec<String>,
}

/// What the synthetic images show, in the order of their labels.
pub const SHAPES: [&str; 8] = ["disc", "square", "ring", "cross", "triangle", "diamond", "stripes", "checks"];

/// One image or text in so many is of the test part.
pub(super) const PARTS: usize = 5;
/// The most images of a folder: all are held in memory.
const MOST_FILES: usize = 100_000;
/// The largest synthetic set, in numbers: 2 GiB.
const MOST_NUMBERS: usize = 1 << 29;
/// Deviation of the noise on every colour of every pixel, where black is -1 and white 1.
const NOISE: f32 = 0.05;

impl Dataset {
    /// `per_class` images of each of the first `classes` [`SHAPES`], of `image` pixels a side and from -1 to 1: at a random
    /// place, of random size, angle and colours, on a ground that is not even, with noise. Equal seeds give equal images.
    ///
    /// # Errors
    /// [`Error::Config`] for numbers beyond what there is.
    pub fn synthetic(image: usize, classes: usize, per_class: usize, seed: u64) -> Result<Self> {
        let wrong = |text: String| Err(Error::Config(text));
        if !(2..=SHAPES.len()).contains(&classes) {
            return wrong(format!("{classes} classes: the synthetic set has 2 to {}: {SHAPES:?}", SHAPES.len()));
        }
        if per_class < PARTS {
            return wrong(format!(
                "{per_class} images of each class: give {PARTS} or more, of which one is for the test"
            ));
        }
        let numbers = image.saturating_mul(image).saturating_mul(CHANNELS * classes).saturating_mul(per_class);
        if image == 0 || numbers > MOST_NUMBERS {
            return wrong(format!(
                "{classes} times {per_class} images of {image} pixels a side: at least one pixel, and less than 2 GiB; give fewer images"
            ));
        }
        let example = |n: usize| {
            let label = n % classes;
            // A stream each, by label and place among its label's: more images or classes change no other, nor its part.
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream((n / classes * SHAPES.len() + label) as u64 + 1);
            Example { pixels: draw(label, image, &mut rng), label }
        };
        let all: Vec<Example> = (0..classes * per_class).into_par_iter().map(example).collect();
        let (mut train, mut test) = (Vec::new(), Vec::new());
        for (n, example) in all.into_iter().enumerate() {
            if (n / classes) % PARTS == PARTS - 1 { test.push(example) } else { train.push(example) }
        }
        Ok(Dataset { train, test, labels: SHAPES[..classes].iter().map(|s| (*s).to_owned()).collect() })
    }

    /// The PNG and JPEG files of a directory with one folder per label, whose names are the labels. Which fifth of each is
    /// the test part is decided by the seed.
    ///
    /// # Errors
    /// [`Error::Config`] for folders without images or with too few, and naming a file that is none; [`Error::Io`].
    pub fn folder(dir: &Path, preprocess: &Preprocess, seed: u64) -> Result<Self> {
        let wrong = |path: &Path, text: &str| Err(Error::Config(format!("{}: {text}", path.display())));
        let text = "give a directory with one folder of PNG or JPEG files per label, and at least two labels";
        if !dir.is_dir() {
            return wrong(dir, &format!("is no directory; {text}"));
        }
        let mut folders: Vec<PathBuf> = entries(dir)?.into_iter().filter(|path| path.is_dir()).collect();
        folders.sort();
        if folders.len() < 2 {
            return wrong(dir, text);
        }
        let (mut train, mut test, mut labels, mut files) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for (label, folder) in folders.iter().enumerate() {
            let mut paths = images(folder)?;
            if paths.len() < 2 {
                return wrong(folder, "has fewer than two PNG or JPEG files: one to learn from and one for the test");
            }
            files += paths.len();
            if files > MOST_FILES {
                return wrong(dir, &format!("has more than {MOST_FILES} images; give fewer"));
            }
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(label as u64);
            shuffle(&mut paths, &mut rng);
            let of_test = (paths.len() / PARTS).max(1);
            let read = |path: &PathBuf| Ok(Example { pixels: preprocess.file(path)?, label });
            let mut read: Vec<Example> = paths.par_iter().map(read).collect::<Result<_>>()?;
            test.extend(read.drain(..of_test));
            train.extend(read);
            labels.push(folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default());
        }
        Ok(Dataset { train, test, labels })
    }

    /// With the labels in this order, which may have more of them: an adapter's.
    ///
    /// # Errors
    /// [`Error::Config`] naming a label that is not among them.
    pub fn relabelled(mut self, labels: &[String]) -> Result<Self> {
        let places = places(&self.labels, labels)?;
        self.train.iter_mut().chain(&mut self.test).for_each(|e| e.label = places[e.label]);
        self.labels = labels.to_vec();
        Ok(self)
    }

    /// Images from -1 to 1, as [`Dataset::synthetic`] makes them, normalised as a backbone takes them.
    #[must_use]
    pub fn normalised(mut self, preprocess: &Preprocess) -> Self {
        for example in self.train.iter_mut().chain(&mut self.test) {
            for (c, mut colour) in example.pixels.outer_iter_mut().enumerate() {
                let (mean, std) = (preprocess.mean[c], preprocess.std[c]);
                colour.mapv_inplace(|v| ((v + 1.0) * 127.5 * preprocess.rescale - mean) / std);
            }
        }
        self
    }
}

/// Where each of these labels is among an adapter's.
pub(super) fn places(these: &[String], labels: &[String]) -> Result<Vec<usize>> {
    let place = |name: &String| {
        labels.iter().position(|l| l == name).ok_or_else(|| {
            Error::Config(format!("the label `{name}` is none of the adapter's, {labels:?}; give data with those"))
        })
    };
    these.iter().map(place).collect()
}

/// Fisher and Yates.
pub(super) fn shuffle<T>(items: &mut [T], rng: &mut ChaCha8Rng) {
    for i in (1..items.len()).rev() {
        items.swap(i, ((u128::from(rng.next_u64()) * (i as u128 + 1)) >> 64) as usize);
    }
}

/// What is in a directory, but for hidden files.
pub(super) fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io(dir.display().to_string(), e);
    let hidden = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
    let all = std::fs::read_dir(dir).map_err(failed)?.map(|entry| entry.map(|e| e.path()).map_err(failed));
    Ok(all.collect::<Result<Vec<_>>>()?.into_iter().filter(|path| !hidden(path)).collect())
}

/// The PNG and JPEG files directly in `dir`, in the order of their names.
///
/// # Errors
/// [`Error::Io`].
pub fn images(dir: &Path) -> Result<Vec<PathBuf>> {
    let known = |path: &PathBuf| {
        let ending = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
        ending.is_some_and(|e| ["png", "jpg", "jpeg"].contains(&e.as_str()))
    };
    let mut all: Vec<PathBuf> = entries(dir)?.into_iter().filter(known).collect();
    all.sort();
    Ok(all)
}

/// Where the shape is, by the distances from its middle along its own axes, in its radius.
fn within(label: usize, u: f32, v: f32) -> bool {
    let (round, widest) = (u * u + v * v, u.abs().max(v.abs()));
    match SHAPES[label] {
        "disc" => round < 1.0,
        "square" => widest < 0.85,
        "ring" => round < 1.0 && round > 0.36,
        "cross" => widest < 1.0 && u.abs().min(v.abs()) < 0.28,
        "triangle" => v < 0.7 && v > -1.0 && u.abs() < (v + 1.0) * 0.6,
        "diamond" => u.abs() * 1.4 + v.abs() < 1.1,
        "stripes" => widest < 0.95 && (v * 1.6).rem_euclid(1.0) < 0.5,
        _ => widest < 0.95 && ((u * 1.2).rem_euclid(1.0) < 0.5) != ((v * 1.2).rem_euclid(1.0) < 0.5),
    }
}

fn draw(label: usize, image: usize, rng: &mut ChaCha8Rng) -> Array3<f32> {
    let mut uniform =
        |from: f32, to: f32| from + (to - from) * ((rng.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32));
    let radius = uniform(0.28, 0.4);
    let (x, y) = (uniform(radius, 1.0 - radius), uniform(radius, 1.0 - radius));
    let (sin, cos) = uniform(-0.25, 0.25).sin_cos();
    let hue = uniform(0.0, std::f32::consts::TAU);
    let contrast = uniform(0.5, 0.9);
    let third = std::f32::consts::TAU / 3.0;
    // Of each colour: in the shape, on the ground, and how the ground changes across the image.
    let colours: [[f32; 4]; CHANNELS] = std::array::from_fn(|c| {
        let front = 0.5 * (hue - c as f32 * third).cos() + 0.1;
        [front, -front * contrast + uniform(-0.1, 0.1), uniform(-0.15, 0.15), uniform(-0.15, 0.15)]
    });
    let mut noise = Gaussian::new(rng.next_u64());
    Array3::from_shape_fn((CHANNELS, image, image), |(c, row, column)| {
        let at = |n: usize| (n as f32 + 0.5) / image as f32;
        let (right, down) = (at(column), at(row));
        let (dx, dy) = ((right - x) / radius, (down - y) / radius);
        let [front, ground, across, along] = colours[c];
        let shown = within(label, dx * cos + dy * sin, dy * cos - dx * sin);
        let value = if shown { front } else { ground + across * (right - 0.5) + along * (down - 0.5) };
        (value + NOISE * noise.next()).clamp(-1.0, 1.0)
    })
}
