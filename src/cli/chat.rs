//! `trefoil chat`: a conversation in the terminal.

use std::io::IsTerminal;

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use trefoil::client::{Client, End, Event, Failure, Limits, Request, State};
use trefoil::error::{Error, Result};
use trefoil::model::chat::Message;

use super::say;

/// Options of `trefoil chat`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    source: super::source::Args,
    /// What the model is told before the chat begins.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Sampling temperature, 0 to 4; 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.7, allow_negative_numbers = true)]
    temperature: f64,
    /// Most tokens of an answer. Default: a quarter of the context, at most 256.
    #[arg(long)]
    max_tokens: Option<usize>,
}

const HELP: &str =
    "/new begins a new chat, /stats shows traffic and times, /quit ends (so does Ctrl-D); Ctrl-C stops an answer.";

/// A conversation.
struct Chat {
    client: Client,
    system: Option<String>,
    turns: Vec<Message>,
    temperature: f64,
    max_tokens: usize,
    last: Option<End>,
}

impl Chat {
    fn messages(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message { role: "system".into(), content: text.clone() });
        system.chain(self.turns.iter().cloned()).collect()
    }

    /// Answers `text`; Ctrl-C stops the answer, of which what was said is kept.
    async fn answer(&mut self, text: String) -> Result<()> {
        let request = if self.client.chats() {
            self.turns.push(Message { role: "user".into(), content: text });
            Request::chat(self.messages())
        } else {
            Request::text(text)
        };
        let request = Request { temperature: self.temperature, max_tokens: Some(self.max_tokens), ..request };
        let mut said = String::new();
        let outcome = self.stream(request, &mut said).await;
        say("\n")?;
        if !self.client.chats() {
            return self.told(outcome);
        }
        match said.is_empty() {
            // What was not answered is not part of the chat.
            true => drop(self.turns.pop()),
            false => self.turns.push(Message { role: "assistant".into(), content: said }),
        }
        self.told(outcome)
    }

    /// What is wrong with one request ends no conversation.
    fn told(&self, outcome: Result<(), Failure>) -> Result<()> {
        match outcome {
            Ok(()) => {}
            Err(Failure::TooLong(why)) => eprintln!("{why}; /new begins a new chat"),
            Err(other) => eprintln!("error: {other}"),
        }
        Ok(())
    }

    async fn stream(&mut self, request: Request, said: &mut String) -> Result<(), Failure> {
        let mut answer = self.client.generate(request)?;
        loop {
            tokio::select! {
                event = answer.next() => match event {
                    Some(Ok(Event::Text(piece))) => {
                        say(&piece)?;
                        *said += &piece;
                    }
                    Some(Ok(Event::Done(end))) => {
                        self.last = Some(end);
                        return Ok(());
                    }
                    Some(Err(e)) => return Err(e),
                    None => return Ok(()),
                },
                _ = tokio::signal::ctrl_c() => {
                    eprint!(" [stopped]");
                    return Ok(());
                }
            }
        }
    }

    fn stats(&self) {
        let State { totals, links, latest, .. } = self.client.state();
        eprintln!(
            "{} requests, {} prompt tokens, {} answer tokens",
            totals.requests, totals.prompt_tokens, totals.completion_tokens
        );
        if let Some(end) = &self.last {
            let each = end.decode.as_secs_f64() * 1e3 / (end.completion_tokens.max(2) - 1) as f64;
            eprintln!(
                "last answer: {} tokens after {} of prompt, first token after {:.0} ms, then {each:.1} ms each",
                end.completion_tokens,
                end.prompt_tokens,
                end.prefill.as_secs_f64() * 1e3
            );
        }
        let mb = |bytes: u64| bytes as f64 / 1e6;
        for (name, all) in &links {
            let last = latest.as_ref().and_then(|l| l.links.get(name)).copied().unwrap_or_default();
            eprintln!(
                "{name:<15} {:>9.3} MB online {:>9.3} MB run-ahead {:>7} messages; last answer {:.3} + {:.3} MB, {}",
                mb(all.online_bytes),
                mb(all.ahead_bytes),
                all.messages,
                mb(last.online_bytes),
                mb(last.ahead_bytes),
                last.messages
            );
        }
        if !self.client.facts().local {
            eprintln!("between owner and helper: not seen from here");
        }
    }
}

/// Runs the command, until /quit or the end of the input.
///
/// # Errors
/// Whatever keeps it from a first session.
pub fn run(a: &Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|e| Error::io("starting threads", e))?;
    let client = runtime.block_on(a.source.open(Limits { sessions: 1, waiting: 1 }))?;
    let facts = client.facts().clone();
    let max_tokens = a.max_tokens.unwrap_or((facts.context / 4).clamp(1, 256));
    let system = a.system.clone();
    let mut chat = Chat { client, system, turns: Vec::new(), temperature: a.temperature, max_tokens, last: None };
    let layers = facts.config.num_layers;
    eprintln!(
        "{} of {layers} layers private; owner {}, helper {}. {HELP}",
        layers - facts.public_layers,
        facts.owner,
        facts.helper
    );
    // What is typed is remembered until the end, and never written to disk.
    let mut editor = DefaultEditor::new().map_err(terminal)?;
    let prompt = if std::io::stdin().is_terminal() { "> " } else { "" };
    loop {
        let line = match editor.readline(prompt) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(e) => return Err(terminal(e)),
        };
        let _ = editor.add_history_entry(line.as_str());
        match line.trim() {
            "" => {}
            "/quit" | "/exit" => break,
            "/help" => eprintln!("{HELP}"),
            "/stats" => chat.stats(),
            "/new" => {
                chat.turns.clear();
                eprintln!("a new chat");
            }
            other if other.starts_with('/') => eprintln!("{other}: no such command. {HELP}"),
            text => runtime.block_on(chat.answer(text.to_owned()))?,
        }
    }
    runtime.block_on(chat.client.close());
    Ok(())
}

fn terminal(e: ReadlineError) -> Error {
    Error::Config(format!("the terminal: {e}"))
}
