//! A program that is a Client: it asks Owner and Helper of a deployment, or without a configuration all three parties in this process.
//!
//! ```sh
//! cargo run --release --example embed -- "It was a bright morning" [configs/client.toml]
//! ```

use std::io::Write;

use trefoil::client::{Client, Event, Request};
use trefoil::generate::LocalOptions;

#[tokio::main]
async fn main() -> trefoil::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let prompt = arguments.next().unwrap_or_else(|| "It was a bright morning".into());
    let client = match arguments.next() {
        Some(configuration) => Client::connect(configuration).await?,
        // The upper half of the bundled model's layers is private; 4 requests may wait.
        None => Client::local("models/quill-4m", LocalOptions::new(Some(4)), 4).await?,
    };
    let request = Request { max_tokens: Some(24), temperature: 0.7, seed: Some(1), ..Request::text(prompt) };
    let mut answer = client.generate(request)?;
    while let Some(event) = answer.next().await {
        match event? {
            Event::Text(piece) => {
                print!("{piece}");
                let _ = std::io::stdout().flush();
            }
            Event::Done(end) => println!("\n[{} tokens, the first after {:.0?}]", end.completion_tokens, end.prefill),
        }
    }
    for (link, traffic) in client.state().links {
        println!("{link:<15} {:>9} B online {:>9} B run-ahead", traffic.online_bytes, traffic.ahead_bytes);
    }
    client.close().await;
    Ok(())
}
