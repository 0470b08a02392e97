//! A search as SVG.

use std::path::Path;

use plotters::prelude::*;

use super::{Record, Target, front, read};
use crate::error::{Error, Result};

type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

const FONT: &str = "sans-serif";
/// Apart also for those who cannot tell red from green (Okabe and Ito).
const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(230, 159, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);

/// Draws accuracy against latency of all points of a history, with the Pareto front, into an SVG file.
///
/// # Errors
/// [`Error::Io`], and those of [`read`].
pub fn plot(history: &Path, path: &Path) -> Result<()> {
    let (settings, records) = read(history)?;
    let target = settings.get("target").and_then(|t| serde_json::from_value(t.clone()).ok());
    let mut svg = String::new();
    draw(&mut svg, &records, target).map_err(|e| Error::Internal(format!("drawing {}: {e}", path.display())))?;
    std::fs::write(path, svg).map_err(|e| Error::io(path.display().to_string(), e))
}

/// From the least to the most of some values, and a margin.
fn span(values: impl Iterator<Item = f64> + Clone) -> std::ops::Range<f64> {
    let low = values.clone().fold(f64::INFINITY, f64::min);
    let high = values.fold(f64::NEG_INFINITY, f64::max);
    // Of an empty range plotters may search for labels for ever.
    if !(low.is_finite() && high.is_finite()) {
        return 0.0..1.0;
    }
    let margin = (0.12 * (high - low)).max(0.02 * high.abs()).max(1e-6);
    low - margin..high + margin
}

fn draw(out: &mut String, records: &[Record], target: Option<Target>) -> Drawn {
    let front = front(records);
    let floor = match target {
        Some(Target::Efficiency { floor }) => Some(100.0 * floor),
        _ => None,
    };
    // Milliseconds and per cent.
    let at = |r: &Record| (1e3 * r.latency, 100.0 * r.accuracy);
    let xs = span(records.iter().map(|r| at(r).0));
    let ys = span(records.iter().map(|r| at(r).1).chain(floor));
    let root = SVGBackend::with_string(out, (720, 460)).into_drawing_area();
    root.fill(&WHITE)?;
    let title = match target {
        Some(Target::Utility) => "utility first",
        Some(Target::Efficiency { .. }) => "efficiency first",
        None => "",
    };
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{} adapters, {title}", records.len()), (FONT, 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(xs.clone(), ys)?;
    let narrow = xs.end - xs.start < 10.0;
    chart
        .configure_mesh()
        .x_desc("latency, ms")
        .y_desc("accuracy, %")
        .x_label_formatter(&|x| if narrow { format!("{x:.2}") } else { format!("{x:.0}") })
        .y_label_formatter(&|y| format!("{y:.1}"))
        .max_light_lines(0)
        .draw()?;
    if let Some(floor) = floor {
        chart
            .draw_series(LineSeries::new([(xs.start, floor), (xs.end, floor)], GREEN.stroke_width(1)))?
            .label("floor")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], GREEN.stroke_width(1)));
    }
    // Steps: between two points of the front nothing better was seen than the faster one.
    let mut line: Vec<(f64, f64)> = Vec::new();
    for r in &front {
        line.extend(line.last().map(|last| (at(r).0, last.1)));
        line.push(at(r));
    }
    chart
        .draw_series(LineSeries::new(line, ORANGE.stroke_width(2)))?
        .label("Pareto front")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], ORANGE.stroke_width(2)));
    chart
        .draw_series(records.iter().map(|r| Circle::new(at(r), 4, BLUE.mix(0.6).filled())))?
        .label("evaluated")
        .legend(|(x, y)| Circle::new((x + 7, y), 4, BLUE.mix(0.6).filled()));
    chart.draw_series(front.iter().map(|r| {
        let p = r.point;
        let name = format!("{}/{}/{}", p.heads, p.rank, p.layers);
        EmptyElement::at(at(r)) + Circle::new((0, 0), 4, ORANGE.filled()) + Text::new(name, (6, 6), (FONT, 11))
    }))?;
    if let Some(best) = target.and_then(|t| t.best(records)) {
        chart
            .draw_series([Circle::new(at(best), 8, BLACK.stroke_width(2))])?
            .label("best (heads/rank/layers)")
            .legend(|(x, y)| Circle::new((x + 7, y), 5, BLACK.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()
}
