//! `trefoil certs` and `trefoil init` as their users meet them: request, sign, show; files that only their owner can read;
//! and what is refused.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;
use tempfile::TempDir;
use trefoil::Role;
use trefoil::deploy::certs::{Authority, Key, Request, Validity, now, write_new, write_private};
use trefoil::deploy::config::Config;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    fn command(&self, args: &str) -> Command {
        let mut command = Command::cargo_bin("trefoil").unwrap();
        command.current_dir(self.0.path()).args(args.split_whitespace());
        command
    }

    /// What a command prints that succeeds. No private key is in it.
    #[track_caller]
    fn ok(&self, args: &str) -> String {
        let out = self.command(args).output().unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{args}: {stderr}");
        assert!(!stdout.contains("PRIVATE") && !stderr.contains("PRIVATE"), "{args}: {stdout}{stderr}");
        stdout.into_owned()
    }

    /// Fails with all of these in its message, and leaves the directory as it was.
    #[track_caller]
    fn refused(&self, args: &str, parts: &[&str]) {
        let before = tree(self.0.path());
        let out = self.command(args).output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code().is_some_and(|c| c != 0), "{args}: {:?}", out.status);
        assert!(!stderr.contains("panicked") && out.stdout.is_empty(), "{args}: {stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{args}: `{part}` is not in: {stderr}");
        }
        assert!(before == tree(self.0.path()), "{args}: files changed");
    }

    fn show(&self, files: &str) -> Vec<Value> {
        let Value::Array(all) = serde_json::from_str(&self.ok(&format!("certs show --json {files}"))).unwrap() else {
            panic!("no array")
        };
        all
    }
}

/// Whether it was made to last this many days, seconds ago.
fn lasts(shown: &Value, days: i64) -> bool {
    shown["days_left"].as_i64().is_some_and(|left| left == days || left == days - 1)
}

/// All files below a directory with their contents.
fn tree(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(tree(&path));
        } else {
            all.push((path.clone(), std::fs::read(&path).unwrap()));
        }
    }
    all.sort();
    all
}

#[cfg(unix)]
#[track_caller]
fn only_keys_are_private(dir: &Path, keys: usize) {
    use std::os::unix::fs::PermissionsExt;
    let mut found = 0;
    for (path, content) in tree(dir) {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        let key = path.extension().is_some_and(|e| e == "key");
        assert_eq!(key, mode == 0o600, "{}: {mode:o}", path.display());
        assert_eq!(key, String::from_utf8_lossy(&content).contains("PRIVATE KEY"), "{}", path.display());
        found += usize::from(key);
    }
    assert_eq!(found, keys);
}

#[cfg(not(unix))]
fn only_keys_are_private(_: &Path, _: usize) {}

#[test]
fn request_sign_show() {
    let at = Place::new();
    at.ok("certs authority --out ca --name Notary");
    at.ok("certs request --role owner --name Provider --host owner.example --host 192.0.2.1 --out owner");
    at.ok("certs request --role client --name alice --out alice");
    let signed =
        at.ok("certs sign --csr owner/owner.csr --role owner --ca ca/ca.pem --ca-key ca/ca.key --out owner/owner.pem");
    for part in ["owner", "Provider", "owner.example, 192.0.2.1", "valid until"] {
        assert!(signed.contains(part), "{signed}");
    }
    at.ok("certs sign --csr alice/client.csr --role client --ca ca/ca.pem --ca-key ca/ca.key --out alice/client.pem --days 7");
    only_keys_are_private(at.0.path(), 3);

    let shown = at.show("owner/owner.pem alice/client.pem ca/ca.pem");
    let [owner, alice, ca] = &shown[..] else { panic!("{shown:?}") };
    assert_eq!(
        (&owner["name"], &owner["role"], &owner["issuer"]),
        (&"Provider".into(), &"owner".into(), &"Notary".into())
    );
    assert_eq!((&owner["dns"][0], &owner["ips"][0]), (&"owner.example".into(), &"192.0.2.1".into()));
    assert_eq!((&owner["key"]["matches"], &owner["authority"]), (&true.into(), &false.into()));
    assert_eq!((&alice["role"], &alice["dns"]), (&"client".into(), &Value::Array(vec![])));
    assert!(lasts(owner, 90) && lasts(alice, 7) && lasts(ca, 730));
    assert_eq!((&ca["role"], &ca["authority"], &ca["self_signed"]), (&Value::Null, &true.into(), &true.into()));
    assert!(owner["fingerprint"].as_str().unwrap().starts_with("sha256:"));
    assert!(owner["not_after"].as_str().unwrap().ends_with('Z'));

    // The key of another beside it.
    std::fs::copy(at.path("alice/client.key"), at.path("ca/ca.key")).unwrap();
    assert_eq!(at.show("ca/ca.pem")[0]["key"]["matches"], false);
    let text = at.ok("certs show ca/ca.pem owner/owner.pem");
    for part in ["NOT the key", "matches", "subject:     \"Provider\"", "days left", "role:        authority"] {
        assert!(text.contains(part), "{text}");
    }
    at.refused(
        "certs sign --csr alice/client.csr --role client --ca ca/ca.pem --ca-key ca/ca.key --out new.pem",
        &["do not belong together", "ca/ca.pem", "ca/ca.key"],
    );
}

#[test]
fn what_is_not_signed() {
    let at = Place::new();
    at.ok("certs authority --out ca");
    at.ok("certs request --role helper --name Third --host helper.example --out helper");
    let sign = "certs sign --ca ca/ca.pem --ca-key ca/ca.key";
    at.refused(
        &format!("{sign} --csr helper/helper.csr --role owner --out x.pem"),
        &["helper/helper.csr", "helper", "owner", "Third"],
    );
    at.refused(&format!("{sign} --csr ca/ca.pem --role owner --out x.pem"), &["no PEM certificate request"]);
    at.refused(&format!("{sign} --csr missing.csr --role owner --out x.pem"), &["missing.csr"]);
    at.refused(
        &format!("{sign} --csr helper/helper.csr --role king --out x.pem"),
        &["king", "owner, client or helper"],
    );
    at.refused(&format!("{sign} --csr helper/helper.csr --role helper --out x.pem --days 0"), &["--days"]);
    at.refused(&format!("{sign} --csr helper/helper.csr --role helper --out x.pem --days 730000"), &["--days"]);
    at.refused(&format!("{sign} --csr helper/helper.csr --role helper --out ca/ca.pem"), &["already exists"]);

    let damaged = at.read("helper/helper.csr").replacen('M', "N", 1);
    std::fs::write(at.path("damaged.csr"), damaged).unwrap();
    at.refused(&format!("{sign} --csr damaged.csr --role helper --out x.pem"), &["damaged.csr"]);

    // An authority that is over, and one that ends too early.
    for (name, days) in [("old", -1), ("short", 10)] {
        let now = now();
        let validity = Validity { not_before: now - 30 * 86_400, not_after: now + days * 86_400 + 600 };
        let authority = Authority::new("Old", validity).unwrap();
        write_new(&at.path(&format!("{name}.pem")), authority.certificate_pem()).unwrap();
        write_private(&at.path(&format!("{name}.key")), &authority.key_pem()).unwrap();
    }
    let rest = "--csr helper/helper.csr --role helper --out x.pem";
    at.refused(&format!("certs sign --ca old.pem --ca-key old.key {rest}"), &["expired on"]);
    at.refused(&format!("certs sign --ca short.pem --ca-key short.key {rest}"), &["--days 10 at most"]);
    at.ok(&format!("{sign} {rest}"));
}

#[cfg(unix)]
#[test]
fn a_key_that_others_can_read_does_not_sign() {
    use std::os::unix::fs::PermissionsExt;
    let at = Place::new();
    at.ok("certs authority --out ca");
    at.ok("certs request --role client --name alice --out alice");
    std::fs::set_permissions(at.path("ca/ca.key"), std::fs::Permissions::from_mode(0o644)).unwrap();
    at.refused(
        "certs sign --csr alice/client.csr --role client --ca ca/ca.pem --ca-key ca/ca.key --out x.pem",
        &["ca/ca.key", "0644", "chmod 600"],
    );
}

#[test]
fn requests() {
    let at = Place::new();
    at.refused("certs request --role owner --name x --out o", &["--host"]);
    at.refused("certs request --role helper --name x --out o", &["--host"]);
    at.refused("certs request --role owner --name x --host a:1 --out o", &["a:1", "without scheme, port"]);
    at.refused("certs request --role client --name x --out o --days 3", &["--self-signed"]);
    at.refused("certs request --role client --name x --out o --reuse-key", &["client.key"]);

    at.ok("certs request --role owner --name x --host h.example --out o --self-signed --days 5");
    let (key, first) = (at.read("o/owner.key"), at.read("o/owner.pem"));
    at.refused(
        "certs request --role owner --name y --host h.example --out o",
        &["owner.key", "already exists", "--reuse-key"],
    );
    at.ok("certs request --role owner --name y --host h.example --out o --self-signed --reuse-key");
    assert_eq!(at.read("o/owner.key"), key);
    assert_ne!(at.read("o/owner.pem"), first);
    let shown = at.show("o/owner.pem");
    assert_eq!(
        (&shown[0]["name"], &shown[0]["self_signed"], &shown[0]["authority"]),
        (&"y".into(), &true.into(), &false.into())
    );
    assert!(lasts(&shown[0], 90) && shown[0]["key"]["matches"] == true);
    only_keys_are_private(at.0.path(), 1);
}

#[test]
fn a_trial_at_once() {
    let at = Place::new();
    let said = at.ok("certs init --out certs --host owner=127.0.0.1 --host helper=localhost --host helper=::1 --client alice --client bob");
    assert!(said.contains("FOR TRIALS ONLY") && said.contains("every key"), "{said}");
    only_keys_are_private(at.0.path(), 5);
    let shown = at.show("certs/ca.pem certs/owner.pem certs/helper.pem certs/alice.pem certs/bob.pem");
    let roles: Vec<&str> = shown[1..].iter().map(|one| one["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["owner", "helper", "client", "client"]);
    assert!(shown.iter().all(|one| one["key"]["matches"] == true && one["issuer"] == "Trefoil trial authority"));
    assert_eq!((&shown[2]["dns"][0], &shown[2]["ips"][0]), (&"localhost".into(), &"::1".into()));

    let init = "certs init --host owner=a.example --host helper=b.example";
    at.refused(&format!("{init} --out certs"), &["already exists"]);
    at.refused(&format!("{init} --out new --client ../alice"), &["../alice"]);
    at.refused(&format!("{init} --out new --client Owner"), &["somebody else's"]);
    at.refused(&format!("{init} --out new --client a --client A"), &["somebody else's"]);
    at.refused("certs init --out new --host owner=a.example", &["helper", "--host"]);
    at.refused("certs init --out new --host client=a.example --host owner=a", &["needs no host"]);
    at.ok(&format!("{init} --out new"));
    assert!(at.path("new/client.pem").exists());
}

#[test]
fn shows_what_is_wrong() {
    let at = Place::new();
    std::fs::write(at.path("text.pem"), "hello").unwrap();
    std::fs::write(at.path("binary.pem"), [0x30, 0x82, 0xff]).unwrap();
    at.refused("certs show text.pem", &["text.pem", "no CERTIFICATE"]);
    at.refused("certs show binary.pem", &["binary.pem", "DER"]);
    at.refused("certs show missing.pem", &["missing.pem"]);
    at.ok("certs authority --out .");
    at.refused("certs show ca.key", &["ca.key", "private key"]);

    let authority = Authority::new("Past", Validity { not_before: 0, not_after: 100 }).unwrap();
    let request = Request::new(Role::Client, "late\u{202e}", Vec::new()).unwrap();
    let old = Validity { not_before: 0, not_after: 100 };
    write_new(&at.path("old.pem"), &authority.issue(&request, &Key::generate().unwrap(), old).unwrap()).unwrap();
    let text = at.ok("certs show old.pem");
    // What would turn the terminal's writing direction is shown escaped.
    assert!(text.contains("EXPIRED") && text.contains("late\\u{202e}"), "{text}");
}

#[test]
fn first_configurations() {
    let at = Place::new();
    for role in Role::ALL {
        at.ok(&format!("init {role}"));
        at.ok(&format!("init {role} --out {role}.toml"));
        assert_eq!(at.read(&format!("{role}.toml")), at.read(&format!("configs/{role}.toml")));
        assert_eq!(Config::load(&at.path(&format!("configs/{role}.toml"))).unwrap().role(), role);
        at.refused(&format!("init {role}"), &["already exists", "--force"]);
        at.ok(&format!("init {role} --force"));
    }
    at.refused("init king", &["owner, client or helper"]);
    at.refused("init client --listen 127.0.0.1:1 --out a.toml", &["--listen", "client"]);
    at.refused("init helper --owner a:1 --out a.toml", &["--owner", "helper"]);
    // As a whole or not at all.
    at.ok("init owner --name one --host a --out first/owner.toml");
    at.refused("init owner --name two --host a --out first/second.toml", &["owner.key"]);
    assert!(!at.path("first/second.toml").exists());
    at.refused("certs show /dev/zero", &["/dev/zero", "not a regular file"]);
    at.refused("certs show nothing.pem", &["nothing.pem", "no such file"]);
}
