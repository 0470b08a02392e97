//! Measurements: the three parties in one process, with random weights at the shapes of published models or with a model's own.
//!
//! [`Harness`] runs passes and says what they took; it is what `trefoil bench`, `benches/` and the tests of cost share. Keys
//! are fixed: nothing leaves the process but figures, which depend on neither weights nor inputs. What the figures mean is in `docs/performance.md`.

pub mod adapter;
mod breakdown;
mod harness;
mod measure;
mod options;
mod peak;
mod plaintext;
mod plot;
mod presets;
mod report;
mod shape;
mod subject;

pub use breakdown::{ByOperation, Operation, Step, Steps};
pub use harness::{Harness, Measured, Pace, Part, count, random_weights};
pub use measure::{peak_memory, resident_memory, run, stopwatch};
pub use options::{Options, Test, contexts};
pub use peak::Peak;
pub use plaintext::Plaintext;
pub use plot::Plots;
pub use presets::{PRESETS, Preset};
pub use report::{Report, Row};
pub use shape::source;
pub use subject::{Changes, Model, Shape, Subject};
