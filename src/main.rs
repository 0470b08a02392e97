//! The `trefoil` command. Dispatches; the work is in the library.

use std::io::Write;

use clap::{Parser, Subcommand};
use trefoil::error::{Error, Result};
use trefoil::model::ModelConfig;

#[path = "cli/calibrate.rs"]
mod calibrate;
#[path = "cli/cost.rs"]
mod cost;
#[path = "cli/generate.rs"]
mod generate;

/// Private LLM inference between three parties: the prompt stays with the client, the weights with the provider.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text with owner, client and helper in this process.
    Generate(generate::Args),
    /// Run the float model over text: ranges, headroom, the plan it proposes, what would not fit.
    Calibrate(calibrate::Args),
    /// Predict messages, bytes, time and memory of a request without running it.
    Cost(cost::Args),
}

/// To standard output, at once. A pipe that nobody reads any more ends the output, not the generation's bookkeeping.
fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("standard output", e)),
        _ => Ok(()),
    }
}

/// `--private-layers` as a number of layers from the top; none for all of them and the embedding. By default half.
fn private_layers(option: Option<&str>, config: &ModelConfig) -> Result<Option<usize>> {
    match option {
        None => Ok(Some(config.num_layers.div_ceil(2))),
        Some("all") => Ok(None),
        Some(n) => n.parse().map(Some).map_err(|_| {
            Error::Config(format!("--private-layers {n}: give a number from 0 to {} or 'all'", config.num_layers))
        }),
    }
}

fn main() -> std::process::ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Cost(args) => cost::run(&args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
