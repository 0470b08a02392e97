//! Certificates that are not good: each fault by its own name at both ends, and the daemons go on serving.

use std::path::Path;

use trefoil::deploy::certs::{Authority, Validity, now};
use trefoil::deploy::wire::{Hello, Refusal, Reply};
use trefoil::party::Role;

use crate::attacker::{block_on, dial, dial_at, hear, say};
use crate::support::*;

/// What a Client with this identity hears from each daemon, and what that one logs.
fn refused(trio: &Trio, identity: &str, here: &str, there: &str) {
    let config = trio.site.config(identity, Role::Client, identity, "", &trio.owner.address, &trio.helper.address);
    for (role, daemon) in [(Role::Owner, &trio.owner), (Role::Helper, &trio.helper)] {
        // In TLS 1.3 the dialler is done first: it hears of it with what it reads next.
        let heard = block_on(async { hear(&mut dial(&config, role).await?).await });
        let error = heard.map(|_| ()).unwrap_err();
        assert_eq!(error.code(), "refuses-us", "{error}");
        let text = error.to_string();
        assert!(text.starts_with(&format!("{role} at step")) && text.contains(here), "{text}");
        let line = daemon.wait_code(there);
        assert!(line["error"].as_str().unwrap().contains("127.0.0.1"), "{line}");
    }
    // The command says the same of the one that came first.
    let out = run(&mut trio.generate(&config, 4));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && text.contains(here), "{text}");
    trio.works();
}

fn certified(name: &str, ca: Option<&Authority>, validity: Validity) -> Trio {
    let trio = Trio::new();
    trio.site.certify(name, Role::Client, ca.unwrap_or(&trio.site.ca), validity);
    trio
}

#[test]
fn a_client_of_another_authority() {
    let other = Authority::new("Another authority", Validity::days(30, now())).unwrap();
    let trio = certified("stranger", Some(&other), Validity::days(10, now()));
    refused(&trio, "stranger", "refused our certificate (it does not know who signed it)", "unknown-issuer");
}

#[test]
fn a_client_whose_certificate_has_expired() {
    let trio = certified("late", None, Validity { not_before: day(-20), not_after: day(-1) });
    refused(&trio, "late", "refused our certificate (by its clock the certificate is not valid now)", "expired");
}

#[test]
fn a_client_whose_certificate_is_not_valid_yet() {
    let trio = certified("early", None, Validity { not_before: day(2), not_after: day(20) });
    refused(&trio, "early", "refused our certificate", "not-yet-valid");
}

#[test]
fn a_client_that_is_revoked_while_the_daemons_run() {
    let trio = Trio::new();
    let fingerprint = trio.site.certify("mallory", Role::Client, &trio.site.ca, Validity::days(10, now()));
    let config = trio.site.config("mallory", Role::Client, "mallory", "", &trio.owner.address, &trio.helper.address);
    assert_eq!(tokens(&run(&mut trio.generate(&config, 4))), expected(4));
    revoke(&trio.owner_config, &fingerprint);
    revoke(&trio.helper_config, &fingerprint);
    refused(&trio, "mallory", "refused our certificate (it is on the peer's list of revoked certificates)", "revoked");
}

#[test]
fn the_role_is_the_certificates_not_the_callers() {
    let trio = Trio::new();
    // An owner's certificate in the client's hands: seen before anything is dialled.
    let config = trio.site.config("thief", Role::Client, "owner", "", &trio.owner.address, &trio.helper.address);
    let out = run(&mut trio.generate(&config, 4));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("this certificate's role is owner, but the configuration's role is client"), "{text}");
    // Addresses swapped: the helper is found where the owner should be.
    let config = trio.site.config("swapped", Role::Client, "client", "", &trio.helper.address, &trio.owner.address);
    let out = run(&mut trio.generate(&config, 4));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("its certificate is the helper's where the owner's belongs"), "{text}");
    trio.works();
}

/// Says `hello` to a daemon with the certificate of another party's configuration.
fn out_of_role(trio: &Trio, to: Role, config: &Path, hello: &Hello, code: &str, text: &str) {
    let daemon = if to == Role::Owner { &trio.owner } else { &trio.helper };
    let told = || daemon.lines().iter().filter(|l| l["code"] == code).count();
    let before = told();
    block_on(async {
        let mut c = dial_at(config, &daemon.address.parse().unwrap(), to).await.unwrap();
        say(&mut c, hello).await.unwrap();
        let answer = hear(&mut c).await.unwrap();
        assert!(matches!(answer, Reply::Refused(Refusal::Role)), "{answer:?}");
    });
    daemon.wait(code, |_| told() > before);
    let line = daemon.lines().into_iter().rfind(|l| l["code"] == code).unwrap();
    let error = line["error"].as_str().unwrap();
    assert!(error.contains(" at step `hello (127.0.0.1:") && error.contains(text), "{line}");
}

#[test]
fn what_only_another_role_may_say() {
    let trio = Trio::new();
    let open = Hello::Open { nonce: [1; 32] };
    let offer = Hello::Offer { manifest: vec![b'{'; 64], chunks: vec![0; 32] };
    let pair = Hello::Pair {
        client_nonce: [2; 32],
        owner_nonce: [3; 32],
        client: trio.site.fingerprint("client"),
        preparation: "any".into(),
        agreed: [0; 32],
        half: [0; 32],
        ahead_capacity: 1 << 20,
    };
    let wrong = "its certificate is the owner's where the client's belongs";
    out_of_role(&trio, Role::Owner, &trio.owner_config, &open, "wrong-role", wrong);
    let wrong = "its certificate is the helper's where the client's belongs";
    out_of_role(&trio, Role::Owner, &trio.helper_config, &open, "wrong-role", wrong);
    let wrong = "its certificate is the client's where the owner's belongs";
    out_of_role(&trio, Role::Helper, &trio.client, &pair, "wrong-role", wrong);
    out_of_role(&trio, Role::Helper, &trio.client, &offer, "wrong-role", wrong);
    // The right role, with what belongs elsewhere.
    out_of_role(&trio, Role::Owner, &trio.client, &pair, "malformed", "client at step");
    out_of_role(&trio, Role::Helper, &trio.owner_config, &open, "malformed", "owner at step");
    trio.works();
}

#[test]
fn a_client_refuses_servers_that_it_cannot_verify() {
    let trio = Trio::new();
    let other = Authority::new("Another authority", Validity::days(30, now())).unwrap();
    std::fs::write(trio.site.path("other.pem"), other.certificate_pem()).unwrap();
    let config = trio.site.config("wary", Role::Client, "client", "", &trio.owner.address, &trio.helper.address);
    let text = std::fs::read_to_string(&config).unwrap().replace("ca = \"ca.pem\"", "ca = \"other.pem\"");
    std::fs::write(&config, text).unwrap();
    let out = run(&mut trio.generate(&config, 4));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("neither pinned nor signed by our CA"), "{text}");
    // With the peers' certificates pinned instead, no authority is needed.
    let pinned = std::fs::read_to_string(&config)
        .unwrap()
        .replace("ca = \"other.pem\"", "pinned = [\"owner.pem\", \"helper.pem\"]");
    std::fs::write(&config, pinned).unwrap();
    assert_eq!(tokens(&run(&mut trio.generate(&config, 4))), expected(4));
    // A name that is not in the certificate.
    let port = trio.owner.address.rsplit(':').next().unwrap();
    let config =
        trio.site.config("named", Role::Client, "client", "", &format!("localhost:{port}"), &trio.helper.address);
    let out = run(&mut trio.generate(&config, 4));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.contains("its certificate is not for localhost"), "{text}");
}
