//! The loss curve as SVG.

use plotters::prelude::*;

use crate::error::{Error, Result};

type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

const FONT: &str = "sans-serif";
/// Apart also for those who cannot tell red from green (Okabe and Ito).
const BLUE: RGBColor = RGBColor(0, 114, 178);
const ORANGE: RGBColor = RGBColor(230, 159, 0);

/// The training loss of every step and its running mean; the held-out loss as a line across. `stage` is the step at which the second
/// stage of a distillation began, whose loss is another quantity.
pub(super) fn svg(losses: &[f32], stage: usize, held_out: f64) -> Result<String> {
    let mut out = String::new();
    draw(&mut out, losses, stage, held_out).map_err(|e| Error::Internal(format!("drawing loss.svg: {e}")))?;
    Ok(out)
}

fn draw(out: &mut String, losses: &[f32], stage: usize, held_out: f64) -> Drawn {
    let root = SVGBackend::with_string(out, (720, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let top = losses.iter().copied().fold(held_out as f32, f32::max).max(1e-3) * 1.05;
    let mut chart = ChartBuilder::on(&root)
        .caption("loss", (FONT, 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        // Not whole numbers: of few of them plotters may search for labels for ever.
        .build_cartesian_2d(0f32..losses.len().max(1) as f32, 0f32..top)?;
    chart
        .configure_mesh()
        .x_label_formatter(&|x| format!("{x:.0}"))
        .x_desc("step")
        .y_desc("loss")
        .max_light_lines(0)
        .draw()?;
    let points = losses.iter().enumerate().map(|(i, loss)| (i as f32, *loss));
    chart
        .draw_series(LineSeries::new(points, BLUE.mix(0.35)))?
        .label("training")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], BLUE.mix(0.35)));
    // Over about a fiftieth of the run, not across the stages.
    let reach = (losses.len() / 50).max(1);
    let mean = |i: usize| {
        let from = (i + 1).saturating_sub(reach).max(if i >= stage { stage.min(i) } else { 0 });
        let part = &losses[from..=i];
        part.iter().sum::<f32>() / part.len() as f32
    };
    chart
        .draw_series(LineSeries::new((0..losses.len()).map(|i| (i as f32, mean(i))), BLUE.stroke_width(2)))?
        .label("training, running mean")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], BLUE.stroke_width(2)));
    let line = [(stage as f32, held_out as f32), (losses.len() as f32, held_out as f32)];
    chart
        .draw_series(LineSeries::new(line, ORANGE.stroke_width(2)))?
        .label("held out, at the end")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 14, y)], ORANGE.stroke_width(2)));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_any_length_are_drawn() {
        for n in [0, 1, 2, 20, 700] {
            let losses: Vec<f32> = (0..n).map(|i| 5.0 / (i + 1) as f32).collect();
            let svg = svg(&losses, n / 3, 0.5).unwrap();
            assert!(svg.contains("running mean") && svg.trim_end().ends_with("</svg>"));
        }
    }
}
