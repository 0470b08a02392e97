//! The engine by itself: numbers that the Client has are shared, multiplied by a matrix that only the Owner has, and opened to the
//! Client. In a test of one's own the three parties run in one process just so, and their traffic can be asserted.
//!
//! ```sh
//! cargo run --release --example sharing
//! ```

use std::sync::mpsc::channel;

use ndarray::array;
use trefoil::Role;
use trefoil::prf::PreparationSeed;
use trefoil::protocol::embedding::source;
use trefoil::protocol::input::input;
use trefoil::protocol::linear::{OwnerMatrix, owner_linear};
use trefoil::protocol::open::open;
use trefoil::ring::fixed;
use trefoil::session::Scope;
use trefoil::share::Rows;
use trefoil::world::{Keys, Setup, World};

/// Ring bits, and fraction bits of the Client's numbers and of the Owner's.
const K: u32 = 48;
const F: u32 = 12;

fn main() -> trefoil::Result<()> {
    // Before anybody has an input: the Owner's matrix, of which the others have a mask or its seed.
    let weights = array![[1.5f32, -2.0, 0.25], [0.0, 3.0, -1.0]];
    let seed = PreparationSeed::fresh()?;
    let owner = OwnerMatrix::quantise(0, "w", weights.view(), None, F)?;
    let helper = OwnerMatrix::helper(0, 2, 3, F, owner.helper_words(&seed)?)?;
    let parts = [owner, OwnerMatrix::client(0, 2, 3, F, seed), helper];

    let numbers = [0.5, 1.0, -4.0];
    let (give, given) = channel();
    let words = numbers.iter().map(|&x| fixed::encode(x, F, K)).collect();
    give.send(words).map_err(|_| trefoil::Error::Internal("nobody takes the input".into()))?;
    let (source, (sink, opened)) = (source(given), channel());

    // Every party runs this same program in its own threads; they share nothing but channels.
    let world = World::new(Keys::fresh()?, &Setup::default());
    world.run(1, &[1], |s| {
        let client = s.role() == Role::Client;
        let rows = Rows::even(s.tokens(), numbers.len());
        let x = input(s, &Scope::new("x"), &rows, K, F, client.then_some(&source))?;
        let y = owner_linear(s, &Scope::new("w"), &x, &parts[s.role().index()])?;
        open(s, &Scope::new("y"), &y, client.then_some(&sink))
    })?;
    let result: Vec<f64> =
        opened.iter().next().unwrap_or_default().into_iter().map(|y| fixed::decode(y, 2 * F, K)).collect();
    println!("the client gave {numbers:?} and got {result:?}");
    for from in Role::ALL {
        for to in Role::ALL.into_iter().filter(|&to| to != from) {
            let sent = world.sent(from, to);
            println!("{from}->{to}: {} B online, {} B run-ahead", sent.online_bytes, sent.ahead_bytes);
        }
    }
    assert_eq!(result, [-2.25, 7.0]);
    Ok(())
}
