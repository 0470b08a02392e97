//! With two prompts and two sets of weights under the same public facts, names, lengths and order of all messages are the
//! same.

use std::sync::{Arc, Mutex};

use trefoil::generate::{Local, LocalOptions};
use trefoil::model::{ModelConfig, Weights};
use trefoil::net::Lane;
use trefoil::party::Role;
use trefoil::world::Setup;

use crate::model::{llama, plan_of, qwen3};

/// Lane, tag and length of a message.
type Fact = (Lane, u64, usize);

/// All that is public of a session's messages.
#[derive(Debug, PartialEq)]
struct Facts {
    /// What each party received, in order.
    received: [Vec<Fact>; 3],
    /// What each party sent, in order, on the online lane and ahead: a thread each, at Client and Helper.
    sent: [[Vec<Fact>; 2]; 3],
}

impl Facts {
    fn assert_same(&self, other: &Facts) {
        let all = |f: &Facts| f.received.iter().chain(f.sent.iter().flatten()).cloned().collect::<Vec<_>>();
        for (i, (a, b)) in all(self).iter().zip(all(other)).enumerate() {
            let first = a.iter().zip(&b).position(|(a, b)| a != b);
            assert!(*a == b, "sequence {i}: {} and {} messages, the first difference at {first:?}", a.len(), b.len());
        }
    }
}

fn session(weights: &Weights, private_layers: Option<usize>, prompts: &[&[u32]]) -> Facts {
    let views: [_; 3] = std::array::from_fn(|_| Arc::new(Mutex::new(Vec::new())));
    let sent: [Arc<Mutex<[Vec<Fact>; 2]>>; 3] = Default::default();
    let rewrites = sent.each_ref().map(|sent| {
        let sent = Arc::clone(sent);
        let rewrite: trefoil::net::tamper::Rewrite = Arc::new(move |lane, frame| {
            sent.lock().unwrap()[usize::from(lane == Lane::Ahead)].push((lane, frame.tag, frame.payload.len()));
            Some(frame)
        });
        Some(rewrite)
    });
    let setup = Setup { views: views.each_ref().map(|v| Some(Arc::clone(v))), rewrites, ..Setup::default() };
    let mut local =
        Local::start(weights.clone(), None, LocalOptions { setup, ..LocalOptions::new(private_layers) }).unwrap();
    for prompt in prompts {
        let out = local.generate(prompt, 4, 0.0, 0, false, &mut |_| true).unwrap();
        assert_eq!(out.tokens.len(), 4);
    }
    local.finish().unwrap();
    let fact = |(lane, tag, bytes): &(Lane, u64, Vec<u8>)| (*lane, *tag, bytes.len());
    Facts {
        received: views.map(|v| v.lock().unwrap().iter().map(fact).collect()),
        sent: sent.map(|s| std::mem::take(&mut *s.lock().unwrap())),
    }
}

/// Two sets of random weights whose calibrated plans are the same.
fn same_plan(config: &ModelConfig, private_layers: Option<usize>) -> [Weights; 2] {
    let mut all = (1..200).map(|seed| Weights::random(config.clone(), seed).unwrap());
    let first = all.next().unwrap();
    let plan = plan_of(&first, private_layers);
    let second = all.find(|w| plan_of(w, private_layers) == plan).unwrap();
    [first, second]
}

#[test]
fn messages_depend_on_public_facts_only() {
    for (config, private) in [(llama(2, 2), Some(2)), (llama(1, 2), Some(1)), (qwen3(), None)] {
        let weights = same_plan(&config, private);
        let prompts: [[&[u32]; 2]; 2] = [[&[1, 2, 3], &[4, 5]], [&[31, 0, 7], &[9, 9]]];
        let mut runs = Vec::new();
        for w in &weights {
            runs.extend(prompts.iter().map(|p| session(w, private, p)));
        }
        let all: Vec<Fact> = Role::ALL.iter().flat_map(|r| runs[0].received[r.index()].clone()).collect();
        assert!(all.len() > 300, "{} messages", all.len());
        for other in &runs[1..] {
            runs[0].assert_same(other);
        }
        // Longer prompts are a public fact that shows.
        assert!(session(&weights[0], private, &[&[1, 2, 3, 4], &[4, 5]]) != runs[0]);
    }
}
