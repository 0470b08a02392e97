//! PNG and JPEG files made into what a backbone takes: turned upright, resized, cropped, normalised.
//!
//! A file is bounded in bytes and pixels before anything is decoded, and so is what it is resized to.

use std::io::Cursor;
use std::path::Path;

use image::imageops::FilterType;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits, imageops};
use ndarray::Array3;

use super::vit::{CHANNELS, Layout, VitConfig};
use crate::error::{Error, Result};
use crate::model::config_json::Json;
use crate::model::files;

/// The largest image file, in bytes.
const FILE_LIMIT: u64 = 64 << 20;
/// The widest and highest image, in pixels.
const SIDE_LIMIT: u32 = 16_384;
/// The most bytes that an image may have when decoded.
const DECODED_LIMIT: u64 = 256 << 20;
/// How many times longer than the other side one may be: an image is resized to a given shorter side.
const RATIO_LIMIT: u32 = 32;
/// The largest `preprocessor_config.json` that is read, in bytes.
const CONFIG_LIMIT: u64 = 1 << 20;

/// How an image is made ready for a backbone.
#[derive(Clone, Debug, PartialEq)]
pub struct Preprocess {
    /// Height and width of the result.
    pub image: usize,
    /// The shorter side is made this long and the middle is cut out; without it, both sides are made `image` long.
    pub shorter: Option<usize>,
    /// How an image is resized.
    pub filter: Filter,
    /// What a byte is multiplied by.
    pub rescale: f32,
    /// Taken from each colour after that.
    pub mean: [f32; CHANNELS],
    /// What each colour is divided by then.
    pub std: [f32; CHANNELS],
}

/// How an image is resized, each over the whole area of a new pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Pillow's 2.
    Bilinear,
    /// Pillow's 3.
    Bicubic,
    /// Pillow's 1.
    Lanczos,
}

impl From<Filter> for FilterType {
    fn from(filter: Filter) -> Self {
        match filter {
            Filter::Bilinear => FilterType::Triangle,
            Filter::Bicubic => FilterType::CatmullRom,
            Filter::Lanczos => FilterType::Lanczos3,
        }
    }
}

impl Preprocess {
    /// As the models of a layout are trained: of Hugging Face resized to the image and from -1 to 1; of torchvision by
    /// ImageNet's mean and deviation, from an image 256 / 224 as large.
    #[must_use]
    pub fn new(config: &VitConfig) -> Self {
        let image = config.image;
        let plain = Preprocess {
            image,
            shorter: None,
            filter: Filter::Bilinear,
            rescale: 1.0 / 255.0,
            mean: [0.5; CHANNELS],
            std: [0.5; CHANNELS],
        };
        match config.layout {
            Layout::HuggingFace => plain,
            Layout::Torchvision => Preprocess {
                shorter: Some((image * 256).div_ceil(224)),
                mean: [0.485, 0.456, 0.406],
                std: [0.229, 0.224, 0.225],
                ..plain
            },
        }
    }

    /// As `preprocessor_config.json` beside the backbone says, or else as [`Preprocess::new`].
    ///
    /// # Errors
    /// [`Error::Model`] naming the field that is not understood, or gives images of another size than the backbone takes.
    pub fn open(backbone: &Path, config: &VitConfig) -> Result<Self> {
        let default = Preprocess::new(config);
        let name = "preprocessor_config.json";
        let path = if backbone.is_dir() { backbone.join(name) } else { backbone.with_file_name(name) };
        let Some(bytes) = files::read_optional(&path, CONFIG_LIMIT)? else { return Ok(default) };
        let json = Json::parse(&bytes, path.display().to_string())?;
        let filter = match json.optional_size("resample")? {
            None => default.filter,
            Some(2) => Filter::Bilinear,
            Some(3) => Filter::Bicubic,
            Some(1) => Filter::Lanczos,
            Some(other) => {
                let text = format!("is {other}; 1 (Lanczos), 2 (bilinear) and 3 (bicubic) are implemented");
                return Err(json.wrong("resample", &text));
            }
        };
        if !json.flag_or("do_resize", true)? {
            return Err(
                json.wrong("do_resize", "is false, but images of other sizes have to be resized: set it to true")
            );
        }
        let rescale =
            if json.flag_or("do_rescale", true)? { json.float_or("rescale_factor", 1.0 / 255.0)? } else { 1.0 };
        let (mean, std) = if json.flag_or("do_normalize", true)? {
            (colours(&json, "image_mean", [0.5; CHANNELS])?, colours(&json, "image_std", [0.5; CHANNELS])?)
        } else {
            ([0.0; CHANNELS], [1.0; CHANNELS])
        };
        let rescale = rescale as f32;
        if !(rescale.is_finite() && rescale > 0.0) {
            return Err(json.wrong("rescale_factor", &format!("must be a number above 0, but is {rescale}")));
        }
        if std.iter().any(|v| *v <= 0.0) {
            return Err(json.wrong("image_std", &format!("must be numbers above 0, but is {std:?}")));
        }
        let shorter = shorter_side(&json, config.image)?;
        Ok(Preprocess { image: config.image, shorter, filter, rescale, mean, std })
    }

    /// Reads a PNG or JPEG file: `[3, image, image]`, normalised.
    ///
    /// # Errors
    /// [`Error::Config`] naming the file and what is wrong with it, [`Error::Io`].
    pub fn file(&self, path: &Path) -> Result<Array3<f32>> {
        let bytes = files::read_required(path, FILE_LIMIT, "give the path of a PNG or JPEG image");
        let bytes = bytes.map_err(|e| match e {
            Error::Model(text) => Error::Config(text),
            other => other,
        })?;
        self.decode(&bytes, &path.display().to_string())
    }

    /// As [`Preprocess::file`] of the bytes of a file; `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn decode(&self, bytes: &[u8], what: &str) -> Result<Array3<f32>> {
        let decoded = decode(bytes).map_err(|text| Error::Config(format!("{what}: {text}")))?;
        Ok(self.normalise(&decoded))
    }

    fn normalise(&self, decoded: &DynamicImage) -> Array3<f32> {
        let side = self.image as u32;
        let (width, height) = match self.shorter {
            None => (side, side),
            Some(shorter) => {
                let (w, h, shorter) = (u64::from(decoded.width()), u64::from(decoded.height()), shorter as u64);
                let long = |from: u64, of: u64| (shorter * from / of.max(1)).max(shorter) as u32;
                if w < h { (shorter as u32, long(h, w)) } else { (long(w, h), shorter as u32) }
            }
        };
        let resized = imageops::resize(&decoded.to_rgb8(), width, height, self.filter.into());
        // Half a pixel goes to the even side, as Python rounds.
        let middle = |long: u32| (f64::from(long.saturating_sub(side)) / 2.0).round_ties_even() as u32;
        let (left, top) = (middle(width), middle(height));
        Array3::from_shape_fn((CHANNELS, self.image, self.image), |(c, y, x)| {
            let byte = resized.get_pixel(left + x as u32, top + y as u32).0[c];
            (f32::from(byte) * self.rescale - self.mean[c]) / self.std[c]
        })
    }
}

/// Decodes and turns upright, within the limits.
fn decode(bytes: &[u8]) -> std::result::Result<DynamicImage, String> {
    let mut limits = Limits::default();
    limits.max_image_width = Some(SIDE_LIMIT);
    limits.max_image_height = Some(SIDE_LIMIT);
    limits.max_alloc = Some(DECODED_LIMIT);
    let broken = |e: image::ImageError| format!("cannot be decoded ({e}); save the image again as PNG or JPEG");
    let mut reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| e.to_string())?;
    if reader.format().is_none() {
        return Err("is no image that is known; give a PNG or JPEG file".to_owned());
    }
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    let (short, long) = (width.min(height), width.max(height));
    if long > SIDE_LIMIT || decoder.total_bytes() > DECODED_LIMIT {
        let limit = DECODED_LIMIT >> 20;
        return Err(format!(
            "has {width} x {height} pixels; at most {SIDE_LIMIT} a side and {limit} MiB in all are taken: make it smaller"
        ));
    }
    if short == 0 || long / short >= RATIO_LIMIT {
        return Err(format!("has {width} x {height} pixels; one side may be {RATIO_LIMIT} times the other: cut it"));
    }
    // Unreadable metadata makes an image no less of an image.
    let orientation = decoder.orientation().unwrap_or(image::metadata::Orientation::NoTransforms);
    let mut decoded = DynamicImage::from_decoder(decoder).map_err(broken)?;
    decoded.apply_orientation(orientation);
    Ok(decoded)
}

/// Three finite numbers.
fn colours(json: &Json, name: &str, default: [f32; CHANNELS]) -> Result<[f32; CHANNELS]> {
    let Some(value) = json.value(name) else { return Ok(default) };
    let numbers = value.as_array().map(|list| list.iter().filter_map(|v| v.as_f64()).map(|v| v as f32).collect());
    let numbers: Vec<f32> = numbers.unwrap_or_default();
    match <[f32; CHANNELS]>::try_from(numbers) {
        Ok(colours) if colours.iter().all(|v| v.is_finite()) => Ok(colours),
        _ => Err(json.expected(name, "a list of three numbers", value)),
    }
}

/// To what the shorter side is resized before the middle is cut out, if it is.
fn shorter_side(json: &Json, image: usize) -> Result<Option<usize>> {
    let square = |name: &str| -> Result<Option<usize>> {
        let Some(value) = json.value(name) else { return Ok(None) };
        let Some(object) = value.is_object().then(|| json.object(name)).transpose()?.flatten() else {
            return json.optional_size(name);
        };
        let (height, width) = (object.optional_size("height")?, object.optional_size("width")?);
        if height != width {
            return Err(json.expected(name, "of one height and width", value));
        }
        Ok(height)
    };
    let other = |name: &str, size: usize| {
        let text = format!(
            "gives images of {size} pixels a side, but the backbone takes {image}; the two are not of one model"
        );
        json.wrong(name, &text)
    };
    let crop = json.flag_or("do_center_crop", false)?;
    let shortest = match json.value("size") {
        Some(value) if value.is_object() => {
            json.object("size")?.map_or(Ok(None), |size| size.optional_size("shortest_edge"))?
        }
        _ => None,
    };
    let size = square("size")?.unwrap_or(image);
    let cropped = if crop { square("crop_size")?.unwrap_or(image) } else { shortest.unwrap_or(size) };
    if cropped != image {
        return Err(other(if crop { "crop_size" } else { "size" }, cropped));
    }
    match (shortest, crop) {
        (Some(side), true) if side < image || side > 4 * image => Err(other("size", side)),
        (Some(side), true) => Ok(Some(side)),
        (Some(_), false) => Err(json.wrong("do_center_crop", "must be true where only the shortest edge has a size")),
        (None, true) if size != image => Err(json.wrong("size", "must be the crop's, or have a shortest_edge")),
        (None, _) => Ok(None),
    }
}
