//! Rows as SVG: time against context, and what a token's cost is made of.

use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{Operation, Report, Row, Step};
use crate::error::{Error, Result};
use crate::ledger::Kind;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;
/// Of one bar after the other, a name and the lengths of its parts.
type Bars = Vec<(&'static str, Vec<f64>)>;

const FONT: &str = "sans-serif";
/// Apart also for those who cannot tell red from green (Okabe and Ito).
const COLOURS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];
const PANEL: (u32, u32) = (620, 420);
const TITLE: u32 = 30;

/// A directory for plots.
#[derive(Clone, Debug)]
pub struct Plots(PathBuf);

impl Plots {
    /// Makes the directory and tries to write in it: before anything is measured.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn into_dir(dir: &Path) -> Result<Plots> {
        let failed = |e| Error::io(format!("--plot {}", dir.display()), e);
        std::fs::create_dir_all(dir).map_err(failed)?;
        let probe = dir.join(".trefoil-bench");
        std::fs::write(&probe, []).and_then(|()| std::fs::remove_file(&probe)).map_err(failed)?;
        Ok(Plots(dir.to_path_buf()))
    }

    /// Writes `context.svg` and `cost.svg`; returns their paths.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, report: &Report) -> Result<Vec<PathBuf>> {
        let plots = [("context.svg", context(&report.rows)), ("cost.svg", cost(&report.rows))];
        let write = |(name, svg): (&str, std::result::Result<String, String>)| {
            let path = self.0.join(name);
            let svg = svg.map_err(|e| Error::Internal(format!("drawing {name}: {e}")))?;
            std::fs::write(&path, svg).map_err(|e| Error::io(path.display().to_string(), e))?;
            Ok(path)
        };
        plots.into_iter().map(write).collect()
    }
}

/// An image of panels, `across` by `down`, under a title each row.
fn svg(
    across: usize,
    titles: &[String],
    draw: impl Fn(usize, &[Area<'_>]) -> Drawn,
) -> std::result::Result<String, String> {
    let mut out = String::new();
    let size = (PANEL.0 * across as u32, (PANEL.1 + TITLE) * titles.len() as u32);
    {
        let root = SVGBackend::with_string(&mut out, size).into_drawing_area();
        let all = || -> Drawn {
            root.fill(&WHITE)?;
            for (i, (row, title)) in root.split_evenly((titles.len(), 1)).iter().zip(titles).enumerate() {
                let row = row.titled(title, (FONT, 18))?;
                draw(i, &row.split_evenly((1, across)))?;
            }
            root.present()
        };
        all().map_err(|e| e.to_string())?;
    }
    Ok(out)
}

fn subject(row: &Row) -> String {
    let layers = if row.layers_measured == row.layers_total {
        String::new()
    } else {
        format!(", times extrapolated from {} of {} layers", row.layers_measured, row.layers_total)
    };
    format!("{}{layers}; network {}; {} threads, {}", row.preset, row.net, row.threads, row.isa)
}

/// Rows and where they stand.
type Points<'a> = Vec<(f64, &'a Row)>;
/// A figure of a row, if it has it.
type Figure = fn(&Row) -> Option<f64>;

const TIMES: [(&str, Figure); 3] = [
    ("sustained", |r| Some(r.ms_per_token)),
    ("run-ahead ready", |r| r.ms_per_token_ready),
    ("float model", |r| Some(r.float_ms_per_token)),
];

/// Milliseconds per token against the context of decode tests, and against the prompt of prefills.
fn context(rows: &[Row]) -> std::result::Result<String, String> {
    let tokens = |r: &Row, kind: &str| r.test.strip_prefix(kind).and_then(|n| n.parse::<f64>().ok());
    let mut panels: Vec<(String, &str, Points<'_>)> = Vec::new();
    for r in rows.iter().filter(|r| tokens(r, "tg").is_some()) {
        let point = (r.context as f64, r);
        let title = format!("decode, {}", r.test);
        match panels.iter_mut().find(|(t, ..)| *t == title) {
            Some((_, _, points)) => points.push(point),
            None => panels.push((title, "cached positions", vec![point])),
        }
    }
    let mut prefills: Points<'_> = rows.iter().filter_map(|r| Some((tokens(r, "pp")?, r))).collect();
    if !prefills.is_empty() {
        prefills.sort_by(|a, b| a.0.total_cmp(&b.0));
        panels.push(("prefill".into(), "tokens of the prompt", prefills));
    }
    let Some(first) = rows.first() else { return svg(1, &["nothing measured".into()], |_, _| Ok(())) };
    svg(panels.len(), &[subject(first)], |_, areas| {
        areas.iter().zip(&panels).try_for_each(|(area, (title, x, points))| lines(area, title, x, points))
    })
}

fn lines(area: &Area<'_>, title: &str, x: &str, points: &[(f64, &Row)]) -> Drawn {
    let most = |f: &dyn Fn(&(f64, &Row)) -> f64| points.iter().map(f).fold(0.0, f64::max);
    let right = most(&|(x, _)| *x).max(1.0) * 1.1;
    let top = most(&|(_, r)| TIMES.iter().filter_map(|(_, of)| of(r)).fold(0.0, f64::max)).max(1e-6) * 1.25;
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..right, 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc("ms per token")
        .max_light_lines(0)
        .x_label_formatter(&|x| if right < 10.0 { format!("{x:.1}") } else { format!("{x:.0}") })
        .draw()?;
    for ((name, of), colour) in TIMES.iter().zip(COLOURS) {
        let line = || points.iter().filter_map(|(x, row)| Some((*x, of(row)?)));
        chart
            .draw_series(LineSeries::new(line(), colour.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], colour.filled()));
        chart.draw_series(line().map(|at| {
            EmptyElement::at(at)
                + Circle::new((0, 0), 3, colour.filled())
                + Text::new(short(at.1), (4, -14), (FONT, 12).into_font().color(&colour))
        }))?;
    }
    let mut labels = chart.configure_series_labels();
    labels.position(SeriesLabelPosition::UpperLeft).background_style(WHITE.mix(0.8)).border_style(BLACK).draw()
}

/// For every row: the time of a ready token, what all parties compute, what they send, by kind of operation.
fn cost(rows: &[Row]) -> std::result::Result<String, String> {
    let titles: Vec<String> =
        rows.iter().map(|r| format!("{}, context {}, per token ({})", r.test, r.context, subject(r))).collect();
    if rows.is_empty() {
        return svg(1, &["nothing measured".into()], |_, _| Ok(()));
    }
    svg(3, &titles, |i, areas| {
        let row = &rows[i];
        let panels = [
            ("ready token, by the Owner's clock", "ms", READY.as_slice(), ready(row)),
            ("computing from cold, each party's own clock", "ms", &COMPUTING, computing(row)),
            ("sent on all links", "kB", &SENT, sent(row)),
        ];
        areas.iter().zip(panels).try_for_each(|(area, (title, unit, parts, of))| bars(area, title, unit, parts, &of))
    })
}

const READY: [&str; 3] = ["compute", "wait for a peer", "network"];
const COMPUTING: [&str; 5] =
    ["Owner", "Helper, online", "Client (run-ahead)", "Helper, run-ahead", "PRF streams of all"];
const SENT: [&str; 2] = ["online", "run-ahead"];

/// Kinds that can be seen, with the lengths of their parts.
fn kinds(of: impl Fn(Kind) -> Vec<f64>) -> Bars {
    let all = Kind::ALL.map(|kind| (kind.name(), of(kind)));
    let sum = |parts: &[f64]| parts.iter().sum::<f64>();
    // What would not be seen leaves its room to others.
    let least = all.iter().map(|(_, parts)| sum(parts)).sum::<f64>() / 1e3;
    all.into_iter().filter(|(_, parts)| sum(parts) > least).collect()
}

fn ready(row: &Row) -> Bars {
    kinds(|kind| {
        let step = row.ready_by_operation.get(kind.name()).copied().unwrap_or_default();
        let Step { compute_ms, wait_ms, network_ms } = step;
        vec![compute_ms, wait_ms, network_ms]
    })
}

fn operations(row: &Row, kind: Kind) -> [Operation; 3] {
    let of =
        |party: &str| row.by_operation.get(party).and_then(|ops| ops.get(kind.name())).copied().unwrap_or_default();
    ["owner", "client", "helper"].map(of)
}

fn computing(row: &Row) -> Bars {
    kinds(|kind| {
        let all = operations(row, kind);
        let [owner, client, helper] = all;
        vec![
            owner.computing() - owner.streams(),
            helper.compute_ms - helper.streams_ms,
            client.computing() - client.streams(),
            helper.ahead_compute_ms - helper.ahead_streams_ms,
            all.iter().map(Operation::streams).sum(),
        ]
    })
}

fn sent(row: &Row) -> Bars {
    kinds(|kind| {
        let all = operations(row, kind);
        let kilo = |f: fn(&Operation) -> u64| all.iter().map(f).sum::<u64>() as f64 / 1e3;
        vec![kilo(|o| o.online_bytes), kilo(|o| o.ahead_bytes)]
    })
}

/// Bars from the left, the first at the top, the sum of their parts beside each.
fn bars(area: &Area<'_>, title: &str, unit: &str, parts: &[&str], bars: &Bars) -> Drawn {
    let sum = |bar: &[f64]| bar.iter().sum::<f64>();
    // With room for the legend.
    let right = bars.iter().map(|(_, bar)| sum(bar)).fold(1e-9, f64::max) * 1.7;
    let n = bars.len().max(1) as f64;
    // From the top, as in a pass. Names are drawn as text: plotters' axis of names may search for its labels for ever.
    let y = |i: usize| n - i as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 16))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(140)
        .build_cartesian_2d(0.0..right, 0.0..n)?;
    chart.configure_mesh().disable_y_mesh().max_light_lines(0).x_desc(unit).y_labels(0).draw()?;
    for (j, (part, colour)) in parts.iter().zip(COLOURS).enumerate() {
        let bar = |(i, (_, bar)): (usize, &(&str, Vec<f64>))| {
            let from = sum(&bar[..j]);
            let mut bar = Rectangle::new([(from, y(i)), (from + bar[j], y(i + 1))], colour.filled());
            bar.set_margin(3, 3, 0, 0);
            bar
        };
        chart
            .draw_series(bars.iter().enumerate().map(bar))?
            .label(*part)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], colour.filled()));
    }
    let names = TextStyle::from((FONT, 12)).pos(Pos::new(HPos::Right, VPos::Center));
    let texts = |(i, (name, bar)): (usize, &(&str, Vec<f64>))| {
        let (name, middle) = (name.replace('_', " "), y(i) - 0.5);
        let name = EmptyElement::at((0.0, middle)) + Text::new(name, (-8, 0), names.clone());
        let total = EmptyElement::at((sum(bar), middle)) + Text::new(short(sum(bar)), (4, -6), (FONT, 12));
        (name, total)
    };
    let (names, totals): (Vec<_>, Vec<_>) = bars.iter().enumerate().map(texts).unzip();
    chart.draw_series(names)?;
    chart.draw_series(totals)?;
    let mut labels = chart.configure_series_labels();
    labels.position(SeriesLabelPosition::LowerRight).background_style(WHITE.mix(0.8)).border_style(BLACK).draw()
}

/// Three significant digits.
fn short(v: f64) -> String {
    match v {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        _ => format!("{v:.2}"),
    }
}
