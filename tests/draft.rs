//! Speculative decoding: drafts change how many passes an answer takes, and none of its tokens; who says something about drafts
//! that cannot be is blamed for it.

#[path = "support/drafts.rs"]
mod drafts;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use assert_cmd::Command;
use drafts::*;
use serde_json::Value;
use trefoil::error::{Error, PeerFault, Result};
use trefoil::generate::{Draft, Drafts, Generation, Local, LocalOptions, Stop, check};
use trefoil::model::{ModelConfig, TextCodec, Weights};
use trefoil::net::tamper::Rewrite;
use trefoil::party::Role;
use trefoil::session::Scope;
use trefoil::world::{Keys, Setup};

const PROMPT: &str = "It was a bright morning";
const NEW: usize = 32;

fn prompt() -> Vec<u32> {
    TextCodec::open(&quill()).unwrap().encode(PROMPT).unwrap()
}

/// Seeded: rounding, which masks vary, could decide between tokens that are equally likely.
fn options(private: Option<usize>) -> LocalOptions {
    LocalOptions { keys: Some(Keys::seeded(3)), ..LocalOptions::new(private) }
}

fn open(private: Option<usize>) -> Local {
    Local::open(&quill(), options(private)).unwrap()
}

fn draft(w: Weights, tokens: usize) -> Draft {
    Draft::new(w, tokens).unwrap()
}

fn generate(local: &mut Local, new: usize, temperature: f64) -> Generation {
    local.generate(&prompt(), new, temperature, 5, false, &mut |_| true).unwrap()
}

/// Every figure fits: each pass gives its accepted drafts and one token more.
fn consistent(g: &Generation) {
    let Drafts { accepted, passes, drafted } = g.drafts;
    assert_eq!(g.tokens.len(), 1 + passes + accepted, "{:?}", g.drafts);
    assert!(accepted <= drafted);
    assert_eq!(g.decode.len(), g.tokens.len() - 1);
}

#[test]
fn drafts_change_no_token_whatever_their_rate() {
    let mut local = open(Some(3));
    let temperatures = [0.0, 0.7, 1.0];
    let want = temperatures.map(|t| generate(&mut local, NEW, t));
    assert!(want[0].tokens != want[1].tokens && want[1].tokens != want[2].tokens);
    for g in &want {
        assert_eq!((g.drafts, g.tokens.len()), (Drafts::default(), NEW));
    }
    // By way of a directory, as a user has it.
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &disturbed(0.4, 5));
    type Make<'a> = &'a dyn Fn() -> Draft;
    let own: Make<'_> = &|| Draft::open(&quill(), 4, &quill()).unwrap();
    let middling: Make<'_> = &|| Draft::open(dir.path(), 4, &quill()).unwrap();
    let useless: Make<'_> = &|| draft(garbage(), 4);
    for (what, make, low, high) in
        [("own", own, 1.0, 1.0), ("disturbed", middling, 0.3, 0.7), ("garbage", useless, 0.0, 0.2)]
    {
        local.draft_with(make()).unwrap();
        for (t, want) in temperatures.into_iter().zip(&want) {
            let got = generate(&mut local, NEW, t);
            eprintln!("{what}, temperature {t}: {:?}, rate {:.2}", got.drafts, got.drafts.rate());
            assert_eq!(got.tokens, want.tokens, "{what}, temperature {t}");
            consistent(&got);
            let rate = got.drafts.rate();
            assert!((low..=high).contains(&rate), "{what}, temperature {t}: {rate}");
            if (what, t) == ("garbage", 0.0) {
                assert_eq!((got.drafts.accepted, got.drafts.passes), (0, NEW - 1));
            }
            if what == "own" {
                // Five tokens a pass.
                assert_eq!(got.drafts.passes, (NEW - 1).div_ceil(5));
            }
        }
    }
    let report = local.finish().unwrap();
    assert_eq!((report.discarded_passes, report.discarded_bytes), (0, 0), "nothing was walked ahead in vain");
    assert_eq!(report.tokens, 12 * NEW as u64);
    // An exchange more or less is none: a layer of a pass that verifies has the messages of one token.
    assert_eq!(report.layer_messages.iter().max(), Some(&36));
}

/// One draft and sixteen; all layers private, the embedding too, which the Client cannot look up; logits for a check.
#[test]
fn one_draft_and_sixteen_with_a_private_embedding_too() {
    for private in [Some(1), None] {
        let mut local = open(private);
        let want = generate(&mut local, NEW, 0.0);
        for n in [1, 16] {
            for by in [0.0, 0.4] {
                local.draft_with(draft(disturbed(by, 5), n)).unwrap();
                let got = local.generate(&prompt(), NEW, 0.0, 5, true, &mut |_| true).unwrap();
                assert_eq!(got.tokens, want.tokens);
                consistent(&got);
                assert!(got.drafts.drafted <= n * got.drafts.passes);
                assert_eq!(got.logits.len(), got.tokens.len());
                let c = check(&weights(), &prompt(), &got, false);
                assert!(c.agree == c.of && c.max_kl < 1e-2, "{c:?}");
            }
        }
        local.finish().unwrap();
    }
}

#[test]
fn an_answer_ends_in_the_middle_of_what_was_accepted() {
    let mut local = open(Some(1));
    let all = generate(&mut local, NEW, 0.0).tokens;
    local.draft_with(draft(weights(), 4)).unwrap();
    // After the first, within a pass, at its end, and after it.
    for stop in [1, 3, 6, 7] {
        let mut seen = Vec::new();
        let got = local.generate(&prompt(), NEW, 0.0, 5, false, &mut |id| {
            seen.push(id);
            seen.len() < stop
        });
        let got = got.unwrap();
        assert_eq!((got.stop, &got.tokens[..]), (Stop::Caller, &all[..stop]));
        assert_eq!(seen, got.tokens, "nothing after it is shown");
        consistent(&got);
        assert_eq!(got.drafts.accepted, got.drafts.drafted, "drafts after the end are not counted");
    }
    // By length, wherever that is in a pass.
    for new in 1..9 {
        let got = generate(&mut local, new, 0.0);
        assert_eq!((got.stop, &got.tokens[..]), (Stop::Length, &all[..new]));
        consistent(&got);
    }
    local.finish().unwrap();
    // By an end token: a token that first comes as the fourth or later.
    let end = (3..NEW).find(|&i| i % 5 != 0 && !all[..i].contains(&all[i])).unwrap();
    let mut w = weights();
    w.config.eos_ids = vec![all[end]];
    let text = TextCodec::open(&quill()).unwrap().encode(trefoil::model::calibrate::DEFAULT_TEXT).unwrap();
    let mut local = Local::start(w, Some(text), options(Some(1))).unwrap();
    local.draft_with(draft(weights(), 4)).unwrap();
    let got = generate(&mut local, NEW, 0.0);
    assert_eq!((got.stop, &got.tokens[..]), (Stop::EndToken, &all[..=end]));
    local.finish().unwrap();
}

#[test]
fn contexts_are_not_exceeded() {
    // The model's own: the answer is as long as without drafts, and its last passes are short.
    let context = 20;
    let limited = LocalOptions { max_positions: Some(context), ..options(Some(1)) };
    let mut local = Local::open(&quill(), limited).unwrap();
    let want = generate(&mut local, 100, 0.0).tokens;
    assert_eq!(want.len(), context - prompt().len() + 1);
    for w in [weights(), garbage()] {
        local.draft_with(draft(w, 16)).unwrap();
        assert_eq!(generate(&mut local, 100, 0.0).tokens, want);
    }
    local.finish().unwrap();
    // The draft's: beyond it there are none, and passes of one token.
    let mut local = open(Some(1));
    let want = generate(&mut local, NEW, 0.0).tokens;
    let mut small = weights();
    small.config.max_positions = 16;
    local.draft_with(draft(small, 4)).unwrap();
    let got = generate(&mut local, NEW, 0.0);
    assert_eq!(got.tokens, want);
    consistent(&got);
    // Six tokens of the prompt and one of the answer, then ten that fit.
    assert_eq!(got.drafts, Drafts { drafted: 8, accepted: 8, passes: NEW - 1 - 8 });
    // A prompt beyond it.
    let mut tiny = weights();
    tiny.config.max_positions = 3;
    local.draft_with(draft(tiny, 4)).unwrap();
    let got = generate(&mut local, 6, 0.0);
    assert_eq!((got.tokens, got.drafts.drafted), (want[..6].to_vec(), 0));
    local.finish().unwrap();
}

/// A model that runs in no time.
fn tiny() -> Weights {
    let config = ModelConfig {
        hidden_size: 16,
        intermediate_size: 24,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 8,
        vocab_size: 32,
        max_positions: 24,
        eos_ids: vec![],
        ..weights().config
    };
    let mut w = Weights::random(config, 5).unwrap();
    // Logits far enough apart that rounding does not decide.
    w.head.as_mut().unwrap().mapv_inplace(|w| 100.0 * w);
    w
}

/// What comes of a Client whose word after pass `pass` is `said` at the Owner (0), the Helper (1) or both (2).
fn lied(pass: u64, at: usize, said: &[u8]) -> Result<Generation> {
    let tag = Scope::new("request").address(pass, "request.turn").tag();
    let (said, count) = (said.to_vec(), AtomicUsize::new(0));
    let rewrite: Rewrite = Arc::new(move |_, mut f| {
        // The Owner is told first.
        if f.tag == tag && [count.fetch_add(1, Ordering::SeqCst), 2].contains(&at) {
            f.payload.clone_from(&said);
        }
        Some(f)
    });
    let setup = Setup { timeout: Duration::from_secs(2), ..options(None).setup };
    let setup = Setup { rewrites: [None, Some(rewrite), None], ..setup };
    let mut local = Local::start(tiny(), None, LocalOptions { setup, ..options(Some(1)) }).unwrap();
    // Drafts what the model is least likely to say.
    let mut never = tiny();
    never.head.as_mut().unwrap().mapv_inplace(|w| -w);
    local.draft_with(draft(never, 4)).unwrap();
    match local.generate(&[1, 2, 3], 12, 0.0, 5, false, &mut |_| true) {
        Ok(g) => local.finish().map(|_| g),
        Err(e) => Err(local.root_cause(e)),
    }
}

#[test]
fn who_says_what_cannot_be_is_blamed() {
    // After the prompt's pass (number 1) comes pass 2: go, accepted, positions.
    let honest = lied(2, 2, &[1, 0, 5]).unwrap();
    assert_eq!((honest.tokens.len(), honest.drafts.accepted, honest.drafts.passes), (12, 0, 11));
    for (pass, said, what) in [
        (2, [1, 1, 5], "more drafts accepted"),
        (3, [1, 5, 1], "more drafts accepted"),
        (3, [1, 255, 255], "more drafts accepted"),
        (2, [1, 0, 0], "without tokens"),
        (2, [1, 0, 6], "more drafts than"),
        (3, [1, 0, 255], "more drafts than"),
        (3, [0, 0, 3], "an end with"),
        (3, [7, 0, 1], "control byte"),
        // 10 of 12 tokens are given out: two positions are left, and not three.
        (11, [1, 0, 3], "beyond"),
    ] {
        for at in [0, 1] {
            match lied(pass, at, &said) {
                Err(Error::Peer { role: Role::Client, step, kind: PeerFault::Malformed(why) }) => {
                    assert!(why.contains(what), "{said:?}: {why}");
                    assert!(step.contains("request.turn"), "{step}");
                }
                other => panic!("{said:?} before pass {pass}, at {at}: {other:?}"),
            }
        }
    }
    for at in [0, 1] {
        for said in [&[1, 0][..], &[1, 0, 5, 0], &[]] {
            let got = lied(2, at, said);
            assert!(
                matches!(got, Err(Error::Peer { role: Role::Client, kind: PeerFault::Length { .. }, .. })),
                "{got:?}"
            );
        }
        // Possible, but not what the other was told: the two no longer compute the same, and notice.
        for said in [[1, 0, 2], [0, 0, 0]] {
            let got = lied(2, at, &said);
            assert!(matches!(got, Err(Error::Peer { .. })), "{said:?} at {at}: {got:?}");
        }
    }
}

fn trefoil(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_trefoil")).args(args).output().unwrap()
}

#[test]
fn the_command_reports_drafts() {
    let model = quill();
    let model = model.to_str().unwrap();
    let base = ["generate", "--prompt", PROMPT, "--max-new-tokens", "12", "--private-layers", "2", "--model", model];
    let json = |more: &[&str]| -> Value {
        let out = trefoil(&[&base[..], &["--json"], more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        serde_json::from_slice(&out.stdout).unwrap()
    };
    let (with, without) = (json(&["--draft", model, "--draft-tokens", "3"]), json(&[]));
    assert_eq!(with["tokens"], without["tokens"]);
    assert!(without.get("draft").is_none());
    let d = &with["draft"];
    assert_eq!((d["model"].as_str(), d["tokens"].as_u64()), (Some(model), Some(3)));
    // 11 tokens in passes of 4, 4 and 3.
    assert_eq!((d["drafted"].as_u64(), d["accepted"].as_u64(), d["passes"].as_u64()), (Some(8), Some(8), Some(3)));
    assert_eq!(d["rate"].as_f64(), Some(1.0));
    assert_eq!(with["discarded_slots"], 0);
    assert_eq!(with["messages_per_private_layer"], 36);
    let messages = |r: &Value| r["links"]["owner->helper"]["messages"].as_u64().unwrap();
    assert!(3 * messages(&with) < 2 * messages(&without), "{} {}", messages(&with), messages(&without));
    let four = json(&["--draft", model, "--draft-tokens", "4"]);
    assert_eq!(four["tokens"], without["tokens"]);
    assert!(5 * messages(&four) <= 2 * messages(&without), "{} {}", messages(&four), messages(&without));
    let out = trefoil(&[&base[..], &["--draft", model]].concat());
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    // Four drafts by default: 5, 5 and 1 tokens.
    assert!(text.contains("drafts        8 of 8 accepted (100 %), 3 decode passes, 4 drafts each at most"), "{text}");
}

#[test]
fn a_draft_that_does_not_fit_is_refused_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let model = quill();
    let refused = |draft: &Path, more: &[&str], says: &[&str]| {
        let (draft, model) = (draft.to_str().unwrap(), model.to_str().unwrap());
        // With nobody to talk to: the draft is looked at first.
        let out = trefoil(&[&["generate", "--prompt", PROMPT, "--model", model, "--draft", draft][..], more].concat());
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && !text.contains("preparing"), "{text}");
        for s in says {
            assert!(text.contains(s), "{s}: {text}");
        }
    };
    let fresh = |name: &str| {
        let at = dir.path().join(name);
        write(&at, &garbage());
        at
    };
    for n in ["0", "17"] {
        refused(&fresh("good"), &["--draft-tokens", n], &["--draft-tokens", "1 to 16"]);
    }
    refused(&dir.path().join("none"), &[], &["none", "config.json"]);
    let cut = fresh("cut");
    let file = std::fs::OpenOptions::new().write(true).open(cut.join("model.safetensors")).unwrap();
    file.set_len(100_000).unwrap();
    refused(&cut, &[], &["cut", "model.safetensors"]);
    let other = fresh("other");
    let text = std::fs::read_to_string(other.join("tokenizer.json")).unwrap();
    std::fs::write(other.join("tokenizer.json"), text + "\n").unwrap();
    refused(&other, &[], &["other", "quill-4m", "tokenizer.json", "same family"]);
    let fewer = fresh("fewer");
    let text = std::fs::read_to_string(fewer.join("config.json")).unwrap();
    std::fs::write(fewer.join("config.json"), text.replace("2048", "1024")).unwrap();
    refused(&fewer, &[], &["fewer", "1024", "2048", "quill-4m", "same tokenizer"]);
    let none = fresh("untokenized");
    std::fs::remove_file(none.join("tokenizer.json")).unwrap();
    refused(&none, &[], &["untokenized", "tokenizer.json"]);
    // Without a draft there is nothing to count.
    let out = trefoil(&["generate", "--prompt", PROMPT, "--draft-tokens", "4"]);
    assert!(String::from_utf8_lossy(&out.stderr).contains("--draft <DIR>"));
}
