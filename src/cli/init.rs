//! `trefoil init`: a first configuration.

use std::path::PathBuf;

use trefoil::deploy::init;
use trefoil::{Result, Role};

/// Options of `trefoil init`.
#[derive(clap::Args)]
pub struct Args {
    /// Whose configuration: owner, client or helper.
    #[arg(value_name = "ROLE")]
    role: Role,
    /// The file to write. Default: configs/ROLE.toml
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace the file if it exists.
    #[arg(long)]
    force: bool,
}

/// Runs the command.
///
/// # Errors
/// If the file exists or cannot be written.
pub fn run(a: &Args) -> Result<()> {
    let file = a.out.clone().unwrap_or_else(|| PathBuf::from(format!("configs/{}.toml", a.role)));
    init::write(a.role, &file, a.force)?;
    println!("wrote {}: set the addresses and paths in it to yours", file.display());
    Ok(())
}
