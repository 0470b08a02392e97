//! How far a model is: a bar on a terminal, nothing in a log.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use trefoil::model::progress::{Progress, Stage};

/// What to tell while a model is loaded and prepared, and the bar that shows it: to be cleared then.
pub fn bar(show: bool) -> (Progress, ProgressBar) {
    // indicatif draws on a terminal only; a log gets none of it.
    let target = if show { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(None, target);
    let style =
        |template: &str| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let (known, unknown) =
        (style("{msg} {wide_bar} {bytes} of {total_bytes}, {eta}"), style("{spinner} {msg}, {elapsed}"));
    let shown = bar.clone();
    let progress = Progress::new(move |stage, done, total| {
        let what = match stage {
            Stage::Weights => "weights",
            Stage::Calibration => "calibration",
            Stage::Shares => "shares of the weights",
        };
        // Another stage, or the same now with a length, or begun anew.
        if shown.message() != what || (total > 0 && (shown.length() != Some(total) || done < shown.position())) {
            shown.set_style(if total > 0 { known.clone() } else { unknown.clone() });
            shown.set_message(what);
            shown.reset();
        }
        if total > 0 {
            shown.set_length(total);
            shown.set_position(done);
        } else {
            shown.enable_steady_tick(std::time::Duration::from_millis(200));
        }
    });
    (progress, bar)
}
