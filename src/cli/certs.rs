//! `trefoil certs`: keys, requests, signatures, and what a certificate says.

use std::path::{Path, PathBuf};

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use trefoil::deploy::certs::{
    AUTHORITY_DAYS, Authority, CERTIFICATE_DAYS, Details, Host, Key, Request, Validity, date, now, read_text,
    write_new, write_private, write_renewed,
};
use trefoil::{Error, Result, Role};

/// Options of `trefoil certs`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make an authority (ca.pem, ca.key) that signs the parties' certificates.
    Authority(AuthorityArgs),
    /// Make a party's key (ROLE.key) and a request for a certificate (ROLE.csr) to send to the authority.
    Request(RequestArgs),
    /// Sign a request, as the authority.
    Sign(SignArgs),
    /// Show what certificates say, and whether the keys beside them (same name, .key) are theirs.
    Show(ShowArgs),
    /// Make an authority and all certificates at once, for a TRIAL on one machine: one person then holds every key.
    Init(InitArgs),
}

#[derive(clap::Args)]
struct AuthorityArgs {
    /// Directory to write to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Name of the authority.
    #[arg(long, default_value = "Trefoil authority")]
    name: String,
}

#[derive(clap::Args)]
struct RequestArgs {
    /// The party's role: owner, client or helper.
    #[arg(long)]
    role: Role,
    /// Name of the organisation or user; it appears in logs and errors of the peers.
    #[arg(long)]
    name: String,
    /// A DNS name or IP address by which others dial this party; may be repeated. Owner and helper need one.
    #[arg(long = "host", value_name = "HOST")]
    hosts: Vec<Host>,
    /// Directory to write to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Also make a certificate (ROLE.pem) signed with the key itself, for peers to pin instead of trusting an authority.
    #[arg(long)]
    self_signed: bool,
    /// Validity of the self-signed certificate.
    #[arg(long, requires = "self_signed", value_name = "N", default_value_t = CERTIFICATE_DAYS, value_parser = days())]
    days: u32,
    /// Renew with the key that is there: it is kept, and request and self-signed certificate are replaced.
    #[arg(long)]
    reuse_key: bool,
}

#[derive(clap::Args)]
struct SignArgs {
    /// The request.
    #[arg(long, value_name = "FILE")]
    csr: PathBuf,
    /// The role you agreed on with whoever sent the request; a request for another is refused.
    #[arg(long)]
    role: Role,
    /// Certificate of the authority.
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// Key of the authority.
    #[arg(long, value_name = "FILE")]
    ca_key: PathBuf,
    /// The certificate to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Validity of the certificate.
    #[arg(long, value_name = "N", default_value_t = CERTIFICATE_DAYS, value_parser = days())]
    days: u32,
}

#[derive(clap::Args)]
struct ShowArgs {
    /// Certificates in PEM; a file may hold several.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Print a JSON array instead.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct InitArgs {
    /// Directory to write to.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A host of a server, as owner=HOST or helper=HOST; may be repeated. Both need one.
    #[arg(long = "host", value_name = "ROLE=HOST", required = true, value_parser = role_and_host)]
    hosts: Vec<(Role, Host)>,
    /// Name of a client, and of its files; may be repeated. Default: one named client.
    #[arg(long = "client", value_name = "NAME")]
    clients: Vec<String>,
}

/// A certificate that outlives two years is one that nobody renews in time.
fn days() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=i64::from(AUTHORITY_DAYS))
}

fn role_and_host(text: &str) -> Result<(Role, Host), String> {
    let (role, host) = text.split_once('=').ok_or("expected owner=HOST or helper=HOST")?;
    match role.parse().map_err(|e: Error| e.to_string())? {
        Role::Client => Err("a client is dialled by nobody and needs no host".into()),
        role => Ok((role, host.parse().map_err(|e: Error| e.to_string())?)),
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever the options or the files got wrong.
pub fn run(a: &Args) -> Result<()> {
    match &a.command {
        Command::Authority(a) => authority(a),
        Command::Request(a) => request(a),
        Command::Sign(a) => sign(a),
        Command::Show(a) => show(a),
        Command::Init(a) => init(a),
    }
}

fn create_directory(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::io(path.display().to_string(), e))
}

/// Before anything is made: a set of files is made as a whole or not at all.
fn refuse_existing<'a>(paths: impl IntoIterator<Item = &'a PathBuf>, remedy: &str) -> Result<()> {
    match paths.into_iter().find(|path| path.symlink_metadata().is_ok()) {
        Some(path) => Err(Error::Config(format!("{} already exists and is not overwritten: {remedy}", path.display()))),
        None => Ok(()),
    }
}

fn authority(a: &AuthorityArgs) -> Result<()> {
    let (certificate, key) = (a.out.join("ca.pem"), a.out.join("ca.key"));
    refuse_existing([&certificate, &key], "move it away, or give another --out")?;
    let authority = Authority::new(&a.name, Validity::days(AUTHORITY_DAYS, now()))?;
    create_directory(&a.out)?;
    write_private(&key, &authority.key_pem())?;
    write_new(&certificate, authority.certificate_pem())?;
    println!("wrote {}: give it to every party, as [tls] ca", certificate.display());
    println!("wrote {}: keep it to yourself; whoever has it can pass for any party", key.display());
    println!("fingerprint {}: to compare by another way than the file came", authority.details().fingerprint);
    Ok(())
}

fn request(a: &RequestArgs) -> Result<()> {
    let request = Request::new(a.role, &a.name, a.hosts.clone())?;
    let file = |extension: &str| a.out.join(format!("{}.{extension}", a.role));
    let (key_file, csr_file, certificate_file) = (file("key"), file("csr"), file("pem"));
    let key = if a.reuse_key {
        Key::load(&key_file)?
    } else {
        let certificate = a.self_signed.then_some(&certificate_file);
        refuse_existing(
            [&key_file, &csr_file].into_iter().chain(certificate),
            "renew with the same key (--reuse-key), move it away, or give another --out",
        )?;
        Key::generate()?
    };
    let csr = request.csr(&key)?;
    let certificate = a.self_signed.then(|| request.self_signed(&key, Validity::days(a.days, now()))).transpose()?;

    create_directory(&a.out)?;
    if !a.reuse_key {
        write_private(&key_file, &key.pem())?;
        println!("wrote {}: keep it on this machine", key_file.display());
    }
    let write = if a.reuse_key { write_renewed } else { write_new };
    write(&csr_file, &csr)?;
    println!("wrote {}: send it to the authority", csr_file.display());
    if let Some(certificate) = certificate {
        write(&certificate_file, &certificate)?;
        println!("wrote {}: send it to the peers, as [tls] pinned", certificate_file.display());
        for details in Details::parse_pem(certificate.as_bytes())? {
            println!("fingerprint {}: to compare by another way than the file came", details.fingerprint);
        }
    }
    Ok(())
}

fn sign(a: &SignArgs) -> Result<()> {
    let authority = Authority::load(&a.ca, &a.ca_key)?;
    let now = now();
    let validity = Validity::days(a.days, now);
    authority.check_dates(validity, now)?;
    refuse_existing([&a.out], "give another --out, or move it away")?;
    let signed = authority
        .sign(&read_text(&a.csr)?, a.role, validity)
        .map_err(|e| Error::Config(format!("{}: {e}", a.csr.display())))?;
    if let Some(directory) = a.out.parent() {
        create_directory(directory)?;
    }
    write_new(&a.out, &signed.pem)?;
    let hosts: Vec<String> = signed.request.hosts().iter().map(Host::to_string).collect();
    println!("signed for the {}: {:?}", signed.request.role(), signed.request.name());
    println!("hosts: {}", if hosts.is_empty() { "none".into() } else { hosts.join(", ") });
    println!("valid until {}", date(validity.not_after));
    println!("wrote {}: send it back, with {}", a.out.display(), a.ca.display());
    Ok(())
}

#[derive(Serialize)]
struct Shown {
    file: String,
    name: String,
    role: Option<String>,
    dns: Vec<String>,
    ips: Vec<String>,
    not_before: Option<String>,
    not_after: Option<String>,
    days_left: i64,
    fingerprint: String,
    issuer: String,
    self_signed: bool,
    authority: bool,
    key: Option<KeyBeside>,
}

/// The key file beside a certificate.
#[derive(Serialize)]
struct KeyBeside {
    file: String,
    matches: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// The key belongs to the first certificate of a file; those after it are its chain.
fn key_beside(file: &Path, details: &Details) -> Option<KeyBeside> {
    let path = file.with_extension("key");
    if path == file || !path.exists() {
        return None;
    }
    let file = path.display().to_string();
    Some(match Key::load(&path) {
        Ok(key) => KeyBeside { file, matches: Some(details.belongs_to(&key)), error: None },
        Err(e) => KeyBeside { file, matches: None, error: Some(e.to_string()) },
    })
}

fn show(a: &ShowArgs) -> Result<()> {
    let now = now();
    let rfc3339 = |seconds| OffsetDateTime::from_unix_timestamp(seconds).ok()?.format(&Rfc3339).ok();
    let mut shown = Vec::new();
    for file in &a.files {
        for (index, details) in Details::load(file)?.into_iter().enumerate() {
            let key = if index == 0 { key_beside(file, &details) } else { None };
            if !a.json {
                print_details(file, &details, key.as_ref(), now);
            }
            shown.push(Shown {
                file: file.display().to_string(),
                role: details.role.map(|role| role.to_string()),
                ips: details.ips.iter().map(ToString::to_string).collect(),
                not_before: rfc3339(details.not_before),
                not_after: rfc3339(details.not_after),
                days_left: details.days_left(now),
                fingerprint: details.fingerprint.to_string(),
                self_signed: details.self_issued,
                authority: details.is_ca,
                key,
                name: details.name,
                dns: details.dns,
                issuer: details.issuer,
            });
        }
    }
    if a.json {
        let text = serde_json::to_string_pretty(&shown).map_err(|e| Error::Internal(e.to_string()))?;
        println!("{text}");
    }
    Ok(())
}

fn print_details(file: &Path, details: &Details, key: Option<&KeyBeside>, now: i64) {
    let names: Vec<String> = details.dns.iter().cloned().chain(details.ips.iter().map(ToString::to_string)).collect();
    let role = match (details.role, details.is_ca) {
        (Some(role), _) => role.to_string(),
        (None, true) => "authority".into(),
        (None, false) => "none: no certificate of a Trefoil party".into(),
    };
    let left = match details.days_left(now) {
        _ if now < details.not_before => "not valid yet".into(),
        days if days < 0 => "EXPIRED".into(),
        days => format!("{days} days left"),
    };
    println!("{}", file.display());
    // Quoted and escaped: a certificate of somebody else's may hold what a terminal would obey.
    println!("  subject:     {:?}", details.name);
    println!("  role:        {role}");
    if !details.is_ca {
        println!(
            "  hosts:       {}",
            if names.is_empty() { "none".into() } else { names.join(", ").escape_debug().to_string() }
        );
    }
    println!("  valid:       {} to {} ({left})", date(details.not_before), date(details.not_after));
    let own = if details.self_issued { " (itself)" } else { "" };
    println!("  issuer:      {:?}{own}", details.issuer);
    println!("  fingerprint: {}", details.fingerprint);
    match key {
        None => {}
        Some(KeyBeside { file, error: Some(error), .. }) => println!("  key:         {file}: {error}"),
        Some(KeyBeside { file, matches: Some(true), .. }) => println!("  key:         {file} matches"),
        Some(KeyBeside { file, .. }) => println!("  key:         {file} is NOT the key of this certificate"),
    }
}

fn init(a: &InitArgs) -> Result<()> {
    let hosts = |role| -> Vec<Host> { a.hosts.iter().filter(|(r, _)| *r == role).map(|(_, h)| h.clone()).collect() };
    let clients = if a.clients.is_empty() { vec!["client".to_owned()] } else { a.clients.clone() };
    let mut parties = Vec::new();
    for role in [Role::Owner, Role::Helper] {
        parties.push((role.to_string(), Request::new(role, &role.to_string(), hosts(role))?));
    }
    for name in clients {
        file_name(&name, &parties)?;
        parties.push((name.clone(), Request::new(Role::Client, &name, Vec::new())?));
    }
    let path = |name: &str, extension: &str| a.out.join(format!("{name}.{extension}"));
    let names = parties.iter().map(|(name, _)| name.as_str()).chain(["ca"]);
    let all: Vec<PathBuf> = names.flat_map(|name| [path(name, "key"), path(name, "pem")]).collect();
    refuse_existing(&all, "move it away, or give another --out")?;

    let now = now();
    let authority = Authority::new("Trefoil trial authority", Validity::days(AUTHORITY_DAYS, now))?;
    create_directory(&a.out)?;
    write_private(&path("ca", "key"), &authority.key_pem())?;
    write_new(&path("ca", "pem"), authority.certificate_pem())?;
    for (name, request) in &parties {
        let key = Key::generate()?;
        let certificate = authority.issue(request, &key, Validity::days(CERTIFICATE_DAYS, now))?;
        write_private(&path(name, "key"), &key.pem())?;
        write_new(&path(name, "pem"), &certificate)?;
        println!("wrote {} and its key: the {}", path(name, "pem").display(), request.role());
    }
    println!("wrote {} and its key: the authority", path("ca", "pem").display());
    println!(
        "FOR TRIALS ONLY: every key was made here, so whoever holds this directory can pass for all parties, and nothing\n\
         separates them. Between organisations each makes its own key: certs request, then certs sign by the authority."
    );
    Ok(())
}

/// Names of clients are names of their files.
fn file_name(name: &str, taken: &[(String, Request)]) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.starts_with(['.', '-']) || !name.chars().all(plain) {
        return Err(Error::Config(format!(
            "--client {name:?}: expected letters, digits, '-', '_' and '.', because files are named after it"
        )));
    }
    // Where the file system does not tell capitals from small letters, the files would be the same.
    if name.eq_ignore_ascii_case("ca") || taken.iter().any(|(other, _)| name.eq_ignore_ascii_case(other)) {
        return Err(Error::Config(format!(
            "--client {name}: files of this name are somebody else's; choose another name"
        )));
    }
    Ok(())
}
