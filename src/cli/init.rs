//! `trefoil init`: a first configuration, and an identity.

use std::path::PathBuf;

use trefoil::deploy::certs::{Host, Request};
use trefoil::deploy::init::{self, Choice};
use trefoil::{Error, Result, Role};

/// Options of `trefoil init`.
#[derive(clap::Args)]
pub struct Args {
    /// Whose configuration: owner, client or helper.
    #[arg(value_name = "ROLE")]
    role: Role,
    /// The file to write. Default: configs/ROLE.toml
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Where to listen (owner, helper). Default: every interface, port 7001 (owner) or 7002 (helper).
    #[arg(long, value_name = "IP:PORT")]
    listen: Option<String>,
    /// Where the owner is dialled (client).
    #[arg(long, value_name = "HOST:PORT")]
    owner: Option<String>,
    /// Where the helper is dialled (owner, client).
    #[arg(long, value_name = "HOST:PORT")]
    helper: Option<String>,
    /// Also make a key and a self-signed certificate of this name, in certs/ beside configs/, for the peers to pin; and
    /// trust the peers by their certificates certs/ROLE.pem instead of by an authority.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Host in that certificate, as peers dial it (owner, helper); may be repeated.
    #[arg(long = "host", value_name = "HOST", requires = "name")]
    hosts: Vec<Host>,
    /// Replace the configuration if it exists.
    #[arg(long)]
    force: bool,
}

/// Runs the command.
///
/// # Errors
/// If a file exists or cannot be written, or an address is none.
pub fn run(a: &Args) -> Result<()> {
    let given = [
        ("--listen", a.listen.is_some(), a.role != Role::Client),
        ("--owner", a.owner.is_some(), a.role == Role::Client),
        ("--helper", a.helper.is_some(), a.role != Role::Helper),
        ("--host", !a.hosts.is_empty(), a.role != Role::Client),
    ];
    if let Some((option, ..)) = given.iter().find(|(_, given, useful)| *given && !useful) {
        return Err(Error::Config(format!("{option} is of no use to the {}: leave it out", a.role)));
    }
    let file = a.out.clone().unwrap_or_else(|| PathBuf::from(format!("configs/{}.toml", a.role)));
    let example = Choice::example();
    let choice = Choice {
        listen: a.listen.clone(),
        owner: a.owner.clone().unwrap_or(example.owner),
        helper: a.helper.clone().unwrap_or(example.helper),
        pinned: a.name.is_some(),
    };
    let request = a.name.as_deref().map(|name| Request::new(a.role, name, a.hosts.clone())).transpose()?;
    // As a whole or not at all: what stands in the way is looked for before anything is written.
    init::free(&file, a.force)?;
    let identity = request.map(|request| init::identity(&request, &file)).transpose()?;
    init::write(a.role, &choice, &file, a.force)?;
    println!("wrote {}: look through it", file.display());
    if let Some((certificate, fingerprint)) = identity {
        println!("wrote {}: send it to the two peers, for their certs/", certificate.display());
        println!("fingerprint {fingerprint}: to compare by another way than the file came");
        println!("wrote its key beside it: it stays on this machine");
        let peers = Role::ALL.into_iter().filter(|&r| r != a.role).map(|r| format!("certs/{r}.pem"));
        println!("expects the peers' certificates as {}", peers.collect::<Vec<_>>().join(" and "));
    }
    Ok(())
}
