//! Memory, threads and descriptors of the daemons stay what they are, session after session. `TREFOIL_SOAK=200` for the
//! figure that counts; without it, as many sessions as show a gross leak.

use crate::support::*;

struct Held {
    memory: u64,
    threads: usize,
    files: usize,
}

fn held(party: &Party) -> Held {
    // Threads of the last session end a moment after its client.
    std::thread::sleep(std::time::Duration::from_millis(300));
    Held { memory: party.memory("VmRSS:"), threads: party.entries("task"), files: party.entries("fd") }
}

#[test]
fn daemons_do_not_grow() {
    let sessions: usize = std::env::var("TREFOIL_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let (warm_up, growth) = if sessions >= 100 { (10, 1.05) } else { (sessions / 2, 1.20) };
    let mut site = Site::new();
    site.limits = "timeout_s = 20\nhandshake_timeout_s = 10\n".into();
    let trio = Trio::at(site);
    let mut before = None;
    for i in 0..sessions {
        if i == warm_up {
            before = Some([held(&trio.owner), held(&trio.helper)]);
        }
        let out = run(&mut trio.generate(&trio.client, 4));
        assert!(out.status.success(), "session {i}: {:#?}", trio.owner.log.lock().unwrap());
        assert_eq!(tokens(&out), expected(4));
        if sessions >= 100 && i % 20 == 19 {
            let [owner, helper] = [&trio.owner, &trio.helper].map(|p| p.memory("VmRSS:") as f64 / 1e6);
            eprintln!("after {:>4} sessions: owner {owner:.1} MB, helper {helper:.1} MB", i + 1);
        }
    }
    compare("one after another", before.unwrap(), [held(&trio.owner), held(&trio.helper)], growth);

    // Side by side they take more, and the allocator keeps some of that; but not more each time.
    let four_at_once = || {
        let four: Vec<_> = (0..4).map(|_| trio.generate(&trio.client, 4)).collect();
        std::thread::scope(|s| {
            let four: Vec<_> = four.into_iter().map(|mut c| s.spawn(move || run(&mut c))).collect();
            four.into_iter().for_each(|out| assert_eq!(tokens(&out.join().unwrap()), expected(4)));
        });
    };
    let rounds = (sessions / 8).clamp(2, 25);
    (0..rounds.div_ceil(3)).for_each(|_| four_at_once());
    let before = [held(&trio.owner), held(&trio.helper)];
    (rounds.div_ceil(3)..rounds).for_each(|_| four_at_once());
    // An arena more or less is of the size of a session.
    compare("four at once", before, [held(&trio.owner), held(&trio.helper)], 1.3);
}

fn compare(how: &str, before: [Held; 2], after: [Held; 2], growth: f64) {
    for ((name, before), after) in ["owner", "helper"].iter().zip(before).zip(after) {
        eprintln!(
            "{name}, {how}: {:.1} MB after the warm-up, {:.1} MB at the end; {} and {} threads, {} and {} files",
            before.memory as f64 / 1e6,
            after.memory as f64 / 1e6,
            before.threads,
            after.threads,
            before.files,
            after.files
        );
        assert!((after.memory as f64) < before.memory as f64 * growth, "{name} grows");
        // Pools that fill as they are used may differ by a few.
        assert!(after.threads <= before.threads + 4 && after.files <= before.files + 4, "{name} leaks");
    }
}
