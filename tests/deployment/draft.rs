//! Speculative decoding between three processes over TLS.

use crate::drafts::{disturbed, garbage, write};
use crate::support::*;

#[test]
fn drafts_change_no_token_over_tls() {
    let trio = Trio::new();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write(&at("disturbed"), &disturbed(0.4, 5));
    write(&at("garbage"), &garbage());
    let sampled = ["--temperature", "0.7", "--seed", "5"];
    let plain = run(trio.generate(&trio.client, 24).args(sampled));
    let plain = tokens(&plain);
    for (draft, low, high) in [(MODEL.into(), 1.0, 1.0), (at("disturbed"), 0.3, 0.7), (at("garbage"), 0.0, 0.2)] {
        for (more, want) in [(&[][..], expected(24)), (&sampled[..], plain.clone())] {
            let out = run(trio.generate(&trio.client, 24).arg("--draft").arg(&draft).args(more));
            let report = report(&out);
            assert_eq!(tokens(&out), want, "{}", draft.display());
            let d = &report["draft"];
            let rate = d["rate"].as_f64().unwrap();
            assert!((low..=high).contains(&rate), "{}: {d}", draft.display());
            assert_eq!(report["discarded_slots"], 0);
            // 36 for as many tokens as take two windows in each norm, 32 for few.
            let messages = report["messages_per_private_layer"].as_u64().unwrap();
            assert!((32..=36).contains(&messages), "{messages}");
        }
    }
    // And without, in between: the servers serve both.
    trio.works();
}

/// A draft that cannot be read is refused before anybody is called.
#[test]
fn nobody_is_called_for_a_draft_that_cannot_be_read() {
    let site = Site::new();
    let (owner, helper) = ("127.0.0.1:9", "127.0.0.1:10");
    let client = site.config("client", trefoil::Role::Client, "client", "", owner, helper);
    let draft = site.path("draft");
    write(&draft, &garbage());
    std::fs::write(draft.join("model.safetensors"), b"cut off").unwrap();
    let mut c = trefoil();
    c.args(["generate", "--prompt", PROMPT, "--config"]).arg(&client).arg("--draft").arg(&draft);
    let out = run(&mut c);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && text.contains("model.safetensors") && !text.contains("reached"), "{text}");
}
