//! Configurations: any text is a configuration or an error that points into the file.

use std::path::Path;

use proptest::prelude::*;
use trefoil::deploy::certs::{Details, Fingerprint, Host};
use trefoil::deploy::config::{Address, Config};
use trefoil::deploy::init::{Choice, text};
use trefoil::error::Error;
use trefoil::party::Role;

use crate::fuzz;
use crate::mutate::{apply, changes};

fn parse(text: &str) -> Result<(), TestCaseError> {
    match Config::parse(text, Path::new("dir/some.toml")) {
        Ok(config) => {
            let limits = config.limits();
            prop_assert!(limits.sessions >= 1 && limits.memory_bytes > 0 && !limits.timeout.is_zero());
            prop_assert!(config.listen().is_some() == (config.role() != Role::Client));
        }
        Err(Error::Config(message)) => prop_assert!(message.starts_with("dir/some.toml:"), "{message}"),
        Err(other) => return Err(TestCaseError::fail(format!("{other}"))),
    }
    Ok(())
}

/// Every default written out, so that there is something to change.
fn complete(role: Role) -> String {
    let plain = text(role, &Choice::example());
    let lines = plain.lines().map(|line| match line.strip_prefix("# ") {
        Some(field) if field.contains(" = ") && !field.contains('`') => field,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn configuration() {
    let good: Vec<String> =
        Role::ALL.iter().flat_map(|&role| [text(role, &Choice::trial(role)), complete(role)]).collect();
    let mutated = (prop::sample::select(good), changes())
        .prop_map(|(text, changes)| String::from_utf8_lossy(&apply(text.as_bytes(), &changes)).into_owned());
    fuzz("configuration, mutated", &mutated, |text| parse(&text));
    fuzz("configuration, any text", &any::<String>(), |text| parse(&text));
}

/// What certificates, addresses and names are read from.
#[test]
fn small_things() {
    let texts = prop_oneof![
        any::<String>(),
        "[0-9a-f:.\\[\\]]{0,40}(:[0-9]{1,6})?",
        "[a-z0-9.*-]{0,70}:[0-9]{1,6}",
        "sha256:[0-9a-fA-F]{60,68}",
    ];
    fuzz("hosts, addresses, fingerprints", &texts, |text| {
        if let Ok(address) = text.parse::<Address>() {
            prop_assert_eq!(address.to_string().parse::<Address>().ok(), Some(address));
        }
        if let Ok(host) = text.parse::<Host>() {
            prop_assert!(host.server_name().is_ok());
        }
        if let Ok(print) = text.parse::<Fingerprint>() {
            prop_assert_eq!(print.to_string(), text.to_ascii_lowercase());
        }
        let _ = Details::parse_pem(text.as_bytes());
        Ok(())
    });
}
