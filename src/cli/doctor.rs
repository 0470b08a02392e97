//! `trefoil doctor`: what keeps a party from serving, and what to do about it.

use std::path::PathBuf;

use trefoil::deploy::doctor::{Diagnosis, Status, examine};
use trefoil::error::{Error, Result};

/// Options of `trefoil doctor`.
#[derive(clap::Args)]
pub struct Args {
    /// The configuration of the party on this machine: owner, helper or client. Its daemon may run meanwhile.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command. `false` if something fails.
///
/// # Errors
/// If there is no examination at all.
pub fn run(a: &Args) -> Result<bool> {
    let diagnosis = examine(&a.config)?;
    let text = if a.json {
        let json =
            serde_json::to_string_pretty(&diagnosis).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        format!("{json}\n")
    } else {
        text(&diagnosis)
    };
    super::say(&text)?;
    Ok(diagnosis.status() != Status::Fail)
}

fn text(d: &Diagnosis) -> String {
    let mut out = String::new();
    for f in &d.findings {
        let mark = match f.status {
            Status::Ok => "ok  ",
            Status::Warn => "WARN",
            Status::Fail => "FAIL",
        };
        out += &format!("{mark}  {:<26} {}\n", f.check, f.found);
        if let Some(remedy) = &f.remedy {
            out += &format!("      {:<26} -> {remedy}\n", "");
        }
    }
    if let Some(p) = &d.prediction {
        out += &format!(
            "\npredicted  {:.1} ms per token ({:.1} ms with run-ahead already there), {:.0} ms to the first of {} prompt tokens\n           {}; assumes {}\n",
            p.token_sustained_ms, p.token_ready_ms, p.prefill_ms, p.prompt_tokens, p.network, p.assumes
        );
    }
    let count = |status| d.findings.iter().filter(|f| f.status == status).count();
    out += &format!("\n{} ok, {} warnings, {} failures\n", count(Status::Ok), count(Status::Warn), count(Status::Fail));
    out
}
