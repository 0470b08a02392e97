//! Sessions that go well, one after another and side by side.

use std::time::Duration;

use trefoil::party::Role;

use crate::support::*;

#[test]
fn three_processes_give_the_tokens_of_one() {
    let mut trio = Trio::new();
    let out = run(&mut trio.generate(&trio.client, 24));
    assert_eq!(tokens(&out), expected(24));
    let report = report(&out);
    // All six directed links are accounted for, those that the client does not see included.
    for link in ["client->owner", "owner->client", "client->helper", "owner->helper", "helper->owner"] {
        let bytes = report["links"][link]["online_bytes"].as_u64().unwrap();
        assert!(bytes > 0, "{link}: {report:#}");
    }
    assert!(report["links"]["client->owner"]["ahead_bytes"].as_u64().unwrap() > 1000);
    assert!(report["session"]["owner"].as_str().unwrap().contains("sha256:"));

    // Four at once, then one more; sampled tokens as in one process, too.
    let four: Vec<_> = (0..4).map(|_| trio.generate(&trio.client, 8)).collect();
    let outs: Vec<_> = std::thread::scope(|s| {
        let running: Vec<_> = four.into_iter().map(|mut c| s.spawn(move || run(&mut c))).collect();
        running.into_iter().map(|r| r.join().unwrap()).collect()
    });
    outs.iter().for_each(|out| assert_eq!(tokens(out), expected(8)));
    let sampled = ["--temperature", "1.5", "--seed", "7"];
    let local = run(trefoil()
        .args(["generate", "--json", "--prompt", PROMPT, "--max-new-tokens", "8", "--model", MODEL])
        .args(sampled));
    let out = run(trio.generate(&trio.client, 8).args(sampled));
    assert_eq!(tokens(&out), tokens(&local));

    // SIGTERM with nothing to do ends both at once, in an orderly way.
    for party in [&mut trio.owner, &mut trio.helper] {
        party.signal("-TERM");
        assert!(party.wait_exit(Duration::from_secs(10)).success());
        party.wait("last line", |l| l["message"] == "stopped");
    }
}

#[test]
fn sigterm_lets_a_running_session_end() {
    let mut trio = Trio::new();
    let mut c = trio.generate(&trio.client, 24);
    let out = std::thread::scope(|s| {
        let running = s.spawn(|| run(&mut c));
        trio.owner.wait("a session", |l| l["message"] == "session begins");
        trio.owner.signal("-TERM");
        trio.helper.signal("-TERM");
        running.join().unwrap()
    });
    assert_eq!(tokens(&out), expected(24));
    for party in [&mut trio.owner, &mut trio.helper] {
        assert!(party.wait_exit(Duration::from_secs(10)).success());
    }
    // Nobody is let in any more.
    let out = run(&mut trio.generate(&trio.client, 4));
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("cannot be reached"));
}

#[test]
fn more_sessions_than_the_limit_are_refused_and_prompts_beyond_it_too() {
    let mut site = Site::new();
    site.limits += "sessions = 1\nprompt_tokens = 12\n";
    let trio = Trio::at(site);
    let mut long = trio.generate(&trio.client, 40);
    let out = std::thread::scope(|s| {
        let running = s.spawn(|| run(&mut long));
        trio.owner.wait("a session", |l| l["message"] == "session begins");
        let refused = run(&mut trio.generate(&trio.client, 4));
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(text.contains("owner") && text.contains("already serves 1 sessions"), "{text}");
        running.join().unwrap()
    });
    assert!(out.status.success());
    let mut long = trefoil();
    long.args(["generate", "--prompt", &"many words ".repeat(30), "--config"]).arg(&trio.client);
    let text = String::from_utf8(run(&mut long).stderr).unwrap();
    assert!(text.contains("the owner takes 12 at most"), "{text}");
    trio.works();
}

#[test]
fn limits_hold_at_each_party() {
    // The Client's own.
    let trio = Trio::new();
    let text = std::fs::read_to_string(&trio.client).unwrap();
    for (limit, says) in
        [("prompt_tokens = 2", "raise [limits] prompt_tokens"), ("memory_gb = 0.002", "[limits] memory_gb")]
    {
        std::fs::write(&trio.client, text.replace("[limits]\n", &format!("[limits]\n{limit}\n"))).unwrap();
        let out = run(&mut trio.generate(&trio.client, 4));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(says), "{said}");
    }
    std::fs::write(&trio.client, text).unwrap();
    trio.works();
    // A store is one party's, and a model that does not fit is not served.
    let twin = trio.site.config("helper", Role::Helper, "helper", "127.0.0.1:0", "", "");
    let refused = |says: &str| {
        let out = run(trefoil().args(["party", "--config"]).arg(&twin));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(says), "{said}");
    };
    refused("another party that runs on this machine uses this directory");
    let Trio { site, owner, helper, .. } = trio;
    drop((owner, helper));
    let text = std::fs::read_to_string(&twin).unwrap();
    std::fs::write(&twin, text.replace("[limits]\n", "[limits]\nmemory_gb = 0.002\n")).unwrap();
    refused("[limits] memory_gb");
    drop(site);
}
