//! The `trefoil` command. Dispatches; the work is in the library.

use clap::{Parser, Subcommand};

#[path = "cli/generate.rs"]
mod generate;
#[path = "cli/party.rs"]
mod party;

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
    /// Run as owner or helper until SIGTERM or Ctrl-C.
    Party(party::Args),
}

fn main() -> std::process::ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Party(args) => party::run(&args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
