//! The `trefoil` command. Dispatches; the work is in the library.

use std::collections::BTreeMap;
use std::io::Write;

use clap::{Parser, Subcommand};
use trefoil::error::{Error, Result};
use trefoil::generate::LinkReport;

#[path = "cli/adapter.rs"]
mod adapter;
#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/calibrate.rs"]
mod calibrate;
#[path = "cli/certs.rs"]
mod certs;
#[path = "cli/changes.rs"]
mod changes;
#[path = "cli/chat.rs"]
mod chat;
#[path = "cli/cost.rs"]
mod cost;
#[path = "cli/doctor.rs"]
mod doctor;
#[cfg(feature = "train")]
#[path = "cli/finetune.rs"]
mod finetune;
#[path = "cli/generate.rs"]
mod generate;
#[path = "cli/init.rs"]
mod init;
#[path = "cli/inspect.rs"]
mod inspect;
#[path = "cli/party.rs"]
mod party;
#[path = "cli/prepare.rs"]
mod prepare;
#[path = "cli/private.rs"]
mod private;
#[path = "cli/progress.rs"]
mod progress;
#[path = "cli/recommend.rs"]
mod recommend;
#[path = "cli/serve.rs"]
mod serve;
#[path = "cli/source.rs"]
mod source;
#[cfg(feature = "train")]
#[path = "cli/study.rs"]
mod study;

/// Private LLM inference between three parties: the prompt stays with the client, the weights with the provider.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Generate text: with owner, client and helper in this process, or as the client of a deployment (--config).
    Generate(Box<generate::Args>),
    /// Serve OpenAI's API and a chat page on this machine, as the client of a deployment (--config) or with all three parties here.
    Serve(Box<serve::Args>),
    /// Chat in the terminal, as the client of a deployment (--config) or with all three parties here.
    Chat(chat::Args),
    /// Run as owner or helper until SIGTERM or Ctrl-C.
    Party(party::Args),
    /// Make, sign and show the certificates by which parties on different hosts know each other.
    Certs(certs::Args),
    /// Write a commented configuration for a party.
    Init(init::Args),
    /// Prepare a model for three hosts: what owner, clients and helper each get.
    Prepare(prepare::Args),
    /// Run the float model over text: ranges, headroom, the plan it proposes, what would not fit.
    Calibrate(calibrate::Args),
    /// Predict messages, bytes, time and memory of a request without running it.
    Cost(cost::Args),
    /// Say what a model is, what of it is public and private, and what it would cost.
    Inspect(inspect::Args),
    /// Predict which techniques that make a model cheaper pay for a request and a network.
    Recommend(recommend::Args),
    /// Measure prefill and decode, with random weights at a published shape or of a model: time, traffic and memory, beside the float model.
    Bench(bench::Args),
    /// Train a model to be private and cheap to serve: layers frozen, adapters, merged heads, another softmax.
    #[cfg(feature = "train")]
    Finetune(Box<finetune::Args>),
    /// Not in this build: train a model to be private and cheap to serve. Build with `--features train`.
    #[cfg(not(feature = "train"))]
    #[command(disable_help_flag = true)]
    Finetune(Untrained),
    /// Private adapters over a public vision transformer or language model: train them, measure them, classify with them.
    Adapter(Box<adapter::Args>),
    /// Train, score and run every technique that makes a model cheaper, and put them in one table (the paper's ablation).
    #[cfg(feature = "train")]
    Study(Box<study::Args>),
    /// Not in this build: train and measure every technique, in one table. Build with `--features train`.
    #[cfg(not(feature = "train"))]
    #[command(disable_help_flag = true)]
    Study(Untrained),
    /// Find what keeps a party from serving, with a remedy for each finding; measure its links. Exit code 1 if anything fails.
    Doctor(doctor::Args),
}

/// Whatever a command takes that is not in this build.
#[cfg(not(feature = "train"))]
#[derive(clap::Args)]
struct Untrained {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _options: Vec<String>,
}

/// To standard output, at once. A pipe that nobody reads any more ends the output, not the generation's bookkeeping.
fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("standard output", e)),
        _ => Ok(()),
    }
}

fn main() -> std::process::ExitCode {
    trefoil::deploy::release::tune_allocator();
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Party(args) => party::run(&args),
        Command::Certs(args) => certs::run(&args),
        Command::Init(args) => init::run(&args),
        Command::Prepare(args) => prepare::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Cost(args) => cost::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Recommend(args) => recommend::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Adapter(args) => adapter::run(&args),
        #[cfg(feature = "train")]
        Command::Finetune(args) => finetune::run(&args),
        #[cfg(feature = "train")]
        Command::Study(args) => study::run(&args),
        #[cfg(not(feature = "train"))]
        Command::Finetune(_) | Command::Study(_) => Err(Error::Config(
            "this trefoil was built without training; build it with: cargo build --release --features train".into(),
        )),
        Command::Doctor(args) => match doctor::run(&args) {
            Ok(true) => Ok(()),
            // What fails is in the list.
            Ok(false) => return std::process::ExitCode::FAILURE,
            Err(error) => Err(error),
        },
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// The traffic of each directed link, in the summary of a command.
fn show_links(links: &BTreeMap<String, LinkReport>) {
    let mb = |b: u64| b as f64 / 1e6;
    for (link, l) in links {
        let (online, ahead) = (mb(l.online_bytes), mb(l.ahead_bytes));
        eprintln!("{link:<15} {online:>9.3} MB online {ahead:>9.3} MB run-ahead {:>7} messages", l.messages);
    }
}
