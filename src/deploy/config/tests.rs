use proptest::prelude::*;

use super::*;
use crate::deploy::init::{Choice, text};

const OWNER: &str = r#"role = "owner"
[tls]
certificate = "c.pem"
key = "/etc/k.key"
ca = "ca.pem"
[listen]
address = "0.0.0.0:7001"
[peers]
helper = "helper.example:7002"
[model]
preparation = "prep"
store = "store"
"#;
const HELPER: &str = r#"role = "helper"
tls = { certificate = "c.pem", key = "k.key", pinned = ["a.pem", "b.pem"] }
listen.address = "[::]:7002"
model.store = "store"
"#;
const CLIENT: &str = r#"role = "client"
[tls]
certificate = "c.pem"
key = "k.key"
ca = "ca.pem"
[peers]
owner = "192.0.2.1:7001"
helper = "[2001:db8::1]:7002"
[model]
public = "public"
"#;

fn parse(text: &str) -> Result<Config> {
    Config::parse(text, Path::new("dir/x.toml"))
}

/// The error of a text, without the name of its file.
#[track_caller]
fn refusal(text: &str) -> String {
    match parse(text) {
        Err(Error::Config(what)) => what.strip_prefix("dir/x.toml:").expect("the file is named").to_owned(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_role_gets_what_it_is_told() {
    let owner = parse(OWNER).unwrap();
    assert_eq!(owner.role(), Role::Owner);
    assert_eq!(owner.tls().certificate, Path::new("dir/c.pem"));
    assert_eq!(owner.tls().key, Path::new("/etc/k.key"));
    assert_eq!(owner.listen(), Some("0.0.0.0:7001".parse().unwrap()));
    assert_eq!(owner.store(), Some(Path::new("dir/store")));
    assert_eq!(owner.limits(), &Limits::default());
    let [(Role::Helper, helper)] = owner.peers()[..] else { panic!() };
    assert_eq!((helper.to_string().as_str(), helper.port), ("helper.example:7002", 7002));

    let helper = parse(HELPER).unwrap();
    assert_eq!((helper.role(), helper.peers().len()), (Role::Helper, 0));
    assert_eq!((helper.tls().ca.as_ref(), helper.tls().pinned.len()), (None, 2));

    let client = parse(CLIENT).unwrap();
    assert_eq!((client.role(), client.listen(), client.store()), (Role::Client, None, None));
    let shown: Vec<String> = client.peers().iter().map(|(role, at)| format!("{role} {at}")).collect();
    assert_eq!(shown, ["owner 192.0.2.1:7001", "helper [2001:db8::1]:7002"]);
}

#[test]
fn limits_and_log_are_taken() {
    let print = format!("sha256:{}", "0aF".repeat(22).get(..64).unwrap());
    let text = OWNER.replace("[listen]", &format!("revoked = [\"{print}\"]\n[listen]"))
        + "[limits]\nsessions = 2\nprompt_tokens = 9\nmemory_gb = 1\nrun_ahead_mb = 0.5\ntimeout_s = 0.25\n\
           handshake_timeout_s = 1\nidle_timeout_s = 2.5\ndrain_s = 0\nopen_logits = true\n\
           [log]\nformat = \"json\"\nlevel = \"debug\"\n";
    let config = parse(&text).unwrap();
    let limits = Limits {
        sessions: 2,
        prompt_tokens: 9,
        memory_bytes: 1_000_000_000,
        run_ahead_bytes: 500_000,
        timeout: Duration::from_millis(250),
        handshake_timeout: Duration::from_secs(1),
        idle_timeout: Duration::from_millis(2500),
        drain: Duration::ZERO,
        open_logits: true,
    };
    assert_eq!(config.limits(), &limits);
    assert_eq!(config.log(), Log { format: LogFormat::Json, level: tracing::Level::DEBUG });
    assert_eq!(config.tls().revoked[0].to_string(), print.to_lowercase());
}

/// What is wrong, where, and what to do.
#[test]
fn mistakes_are_pointed_at() {
    for (base, from, to, parts) in [
        // TOML itself
        (OWNER, "\"prep\"", "\"prep", &["11:", "not valid TOML"][..]),
        (OWNER, "[model]", "[tls]", &["10:2: not valid TOML", "duplicate"]),
        // unknown fields
        (OWNER, "address =", "adress =", &["7:1: listen.adress: there is no such field", "did you mean `address`?"]),
        (OWNER, "[listen]", "[listening]", &["6:2: listening:", "did you mean `listen`?"]),
        (OWNER, "[listen]", "colour = 1\n[listen]", &["6:1: tls.colour:", "certificate, key, ca, pinned, revoked"]),
        // wrong types
        (OWNER, "\"c.pem\"", "7", &["3:15: tls.certificate: ", "expected a string"]),
        (OWNER, "ca =", "pinned = [1]\nca =", &["5:11: tls.pinned: ", "expected a string"]),
        // missing
        (OWNER, "role = \"owner\"", "", &["1:1: role: missing", "\"owner\", \"client\" or \"helper\""]),
        (OWNER, "certificate = \"c.pem\"", "", &["2:1: tls.certificate: missing"]),
        (OWNER, "key = \"/etc/k.key\"", "", &["2:1: tls.key: missing"]),
        (OWNER, "ca = \"ca.pem\"", "", &["2:1: tls.ca: missing", "pinned"]),
        (OWNER, "address = \"0.0.0.0:7001\"", "", &["6:1: listen.address: missing; the owner needs"]),
        (OWNER, "helper = \"helper.example:7002\"", "", &["8:1: peers.helper: missing; the owner needs", "HOST:7002"]),
        (OWNER, "[peers]\nhelper = \"helper.example:7002\"", "", &["1:8: peers.helper: missing; the owner needs"]),
        (OWNER, "preparation = \"prep\"", "", &["10:1: model.preparation: missing", "trefoil prepare"]),
        (OWNER, "store = \"store\"", "", &["10:1: model.store: missing"]),
        (HELPER, "listen.address = \"[::]:7002\"", "", &["1:8: listen.address: missing; the helper needs"]),
        (HELPER, "model.store = \"store\"", "", &["1:8: model.store: missing; the helper needs"]),
        (CLIENT, "owner = \"192.0.2.1:7001\"", "", &["peers.owner: missing; the client needs"]),
        (CLIENT, "public = \"public\"", "", &["9:1: model.public: missing; the client needs"]),
        // of another role
        (OWNER, "\"owner\"", "\"Owner\"", &["1:8: role: \"Owner\" is no role", "owner, client or helper"]),
        (OWNER, "helper =", "owner = \"o.example:1\"\nhelper =", &["9:9: peers.owner: the owner does not dial"]),
        (OWNER, "store =", "public = \"x\"\nstore =", &["12:10: model.public:", "remove it"]),
        (CLIENT, "[model]", "[listen]\naddress = \"0.0.0.0:1\"\n[model]", &["9:1: [listen]: the client", "remove it"]),
        (CLIENT, "public =", "store = \"s\"\npublic =", &["10:9: model.store: the client keeps no state"]),
        (HELPER, "model.store", "model.preparation = \"p\"\nmodel.store", &["model.preparation: the helper"]),
        (HELPER, "model.store", "peers.helper = \"h:1\"\nmodel.store", &["peers.helper: the helper", "dials nobody"]),
        // values
        (OWNER, "0.0.0.0:7001", "0.0.0.0", &["7:11: listen.address: \"0.0.0.0\" is no address", "0.0.0.0:7001"]),
        (OWNER, "0.0.0.0:7001", "example.org:7001", &["listen.address", "IP:PORT"]),
        (OWNER, "helper.example:7002", "helper.example", &["9:10: peers.helper:", "host:port"]),
        (OWNER, "helper.example:7002", "helper.example:0", &["peers.helper:", "host:port"]),
        (OWNER, "helper.example:7002", "helper.example:70021", &["peers.helper:", "host:port"]),
        (OWNER, "helper.example:7002", "https://helper.example:7002", &["peers.helper:", "host:port"]),
        (OWNER, "helper.example:7002", "2001:db8::1:7002", &["peers.helper:", "[2001:db8::7]:7001"]),
        (OWNER, "helper.example:7002", "192.0.2.300:7002", &["peers.helper:", "host:port"]),
        (CLIENT, "[2001:db8::1]:7002", "192.0.2.1:7001", &["8:10: peers.helper: the same address as the owner's"]),
        (OWNER, "\"c.pem\"", "\"\"", &["3:15: tls.certificate: expected the path"]),
        (OWNER, "ca =", "revoked = [\"sha256:00\"]\nca =", &["5:12: tls.revoked: not a fingerprint", "64 hex digits"]),
    ] {
        assert!(base.contains(from), "{from}");
        let found = refusal(&base.replacen(from, to, 1));
        for part in parts {
            let place = part.split(':').next().is_some_and(|line| line.parse::<u32>().is_ok());
            assert!(if place { found.starts_with(part) } else { found.contains(part) }, "{to}: {found} / {part}");
        }
    }
}

#[test]
fn numbers_have_bounds() {
    for (section, parts) in [
        ("[limits]\nsessions = 0", &["14:12: limits.sessions: 0 does not do: expected 1 to 10000 (default 8)"][..]),
        ("[limits]\nsessions = -1", &["14:12: limits.sessions: -1"]),
        ("[limits]\nsessions = 1.5", &["14:12: limits.sessions: "]),
        ("[limits]\nprompt_tokens = 9223372036854775808", &["14:17: "]),
        ("[limits]\nmemory_gb = nan", &["14:13: limits.memory_gb: NaN"]),
        ("[limits]\nmemory_gb = inf", &["limits.memory_gb: inf"]),
        ("[limits]\nrun_ahead_mb = 0", &["limits.run_ahead_mb: 0 "]),
        ("[limits]\ntimeout_s = -3", &["14:13: limits.timeout_s: -3 does not do"]),
        ("[limits]\nidle_timeout_s = \"600\"", &["14:18: limits.idle_timeout_s: "]),
        ("[limits]\nhandshake_timeout_s = 0", &["limits.handshake_timeout_s: 0 "]),
        ("[limits]\ndrain_s = 1e300", &["limits.drain_s: "]),
        ("[limits]\ntimeout = 3", &["14:1: limits.timeout: ", "did you mean `timeout_s`?"]),
        ("[limits]\nopen_logits = 1", &["14:15: limits.open_logits: "]),
        ("[log]\nformat = \"xml\"", &["14:10: log.format: \"xml\" is unknown: expected text or json"]),
        ("[log]\nlevel = \"loud\"", &["14:9: log.level: \"loud\""]),
    ] {
        let found =
            refusal(&format!("{OWNER}\n{section}\n").replacen("store = \"store\"\n\n", "store = \"store\"\n", 1));
        assert!(parts.iter().all(|part| found.contains(part)), "{section}: {found}");
    }
}

/// A key pasted where its path belongs appears in no message.
#[test]
fn a_pasted_key_is_not_repeated() {
    let text = OWNER.replace("\"/etc/k.key\"", "\"\"\"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n\"\"\"");
    let found = refusal(&text);
    assert!(found.starts_with("4:7: tls.key: expected the path") && !found.contains("c2VjcmV0"), "{found}");
}

#[test]
fn columns_count_characters() {
    let found = refusal(&OWNER.replace("store = ", "\"störe\" = "));
    assert!(found.starts_with("12:1: model.störe"), "{found}");
    let found = refusal("role = \"ö\" x");
    assert!(found.starts_with("1:12: "), "{found}");
}

#[test]
fn files_that_are_no_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.toml");
    let missing = Config::load(&file).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }) && missing.to_string().contains("trefoil init"), "{missing}");
    for (content, part) in [(vec![b'#'; 1_000_001], "larger than"), (vec![0xff; 10], "UTF-8")] {
        std::fs::write(&file, content).unwrap();
        let found = Config::load(&file).unwrap_err().to_string();
        assert!(found.contains("x.toml") && found.contains(part), "{found}");
    }
}

proptest! {
    /// Whatever stands in the file, the answer is a configuration or an error that names it.
    #[test]
    fn no_text_makes_it_panic(text in "\\PC*") {
        if let Err(e) = parse(&text) {
            prop_assert!(e.to_string().starts_with("dir/x.toml:"), "{e}");
        }
    }

    #[test]
    fn no_change_makes_it_panic(role in 0..3usize, at in any::<prop::sample::Index>(), cut in 0..20usize, put in "\\PC{0,12}") {
        let mut text: Vec<char> = text(Role::ALL[role], &Choice::example()).replace("\n# ", "\n").chars().collect();
        let at = at.index(text.len());
        text.splice(at..(at + cut).min(text.len()), put.chars());
        if let Err(e) = parse(&text.iter().collect::<String>()) {
            prop_assert!(e.to_string().starts_with("dir/x.toml:"), "{e}");
        }
    }
}
