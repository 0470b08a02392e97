//! The `trefoil` command. Dispatches; the work is in the library.

use clap::{Parser, Subcommand};

#[path = "cli/generate.rs"]
mod generate;
#[path = "cli/prepare.rs"]
mod prepare;

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
    /// Prepare a model for three hosts: what owner, clients and helper each get.
    Prepare(prepare::Args),
}

fn main() -> std::process::ExitCode {
    let result = match Cli::parse().command {
        Command::Generate(args) => generate::run(&args),
        Command::Prepare(args) => prepare::run(&args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
