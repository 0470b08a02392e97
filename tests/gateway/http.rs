//! HTTP as bytes: a test has to be able to do it wrong.
#![allow(dead_code)] // every test file uses a part of it

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// What came back.
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    /// Reads to the end of the connection; `None` if it ends before an answer.
    pub fn read(c: &mut TcpStream) -> Option<Reply> {
        let mut bytes = Vec::new();
        // A connection that is reset has said what it wanted to.
        let _ = c.read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
        let body = if chunked { unchunked(body) } else { body.to_owned() };
        Some(Reply { status, head: head.to_owned(), body })
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

fn unchunked(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let n = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if n == 0 || rest.len() < n {
            break;
        }
        out += &rest[..n];
        body = rest[n..].trim_start_matches("\r\n");
    }
    out
}

pub fn connect(address: &str) -> TcpStream {
    try_connect(address).unwrap()
}

fn try_connect(address: &str) -> std::io::Result<TcpStream> {
    let c = TcpStream::connect(address)?;
    c.set_read_timeout(Some(Duration::from_secs(60)))?;
    Ok(c)
}

/// Sends a request; the answer is still to be read.
pub fn send(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> TcpStream {
    try_send(address, method, path, headers, body).unwrap()
}

/// As [`send`], where nobody may listen.
pub fn try_send(
    address: &str,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> std::io::Result<TcpStream> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    let usual = [("Host", "localhost"), ("Content-Type", "application/json")];
    let given = |name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    for (name, value) in usual.iter().filter(|(name, _)| !given(name)).chain(headers) {
        head += &format!("{name}: {value}\r\n");
    }
    let mut c = try_connect(address)?;
    // It may be refused before all of it has been sent.
    let _ = c.write_all(format!("{head}\r\n{body}").as_bytes());
    Ok(c)
}

pub fn request(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Option<Reply> {
    Reply::read(&mut send(address, method, path, headers, body))
}

pub fn get(address: &str, path: &str, headers: &[(&str, &str)]) -> Reply {
    request(address, "GET", path, headers, "").expect("an answer")
}

pub fn post(address: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
    request(address, "POST", path, headers, body).expect("an answer")
}

/// The chunks of a streamed answer, which has to end as OpenAI's do.
pub fn stream(address: &str, path: &str, body: &Value) -> Vec<Value> {
    let reply = post(address, path, &[], &body.to_string());
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(reply.head.to_lowercase().contains("text/event-stream"));
    let data: Vec<&str> = reply.body.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    let Some((&"[DONE]", chunks)) = data.split_last() else { panic!("no end: {}", reply.body) };
    chunks.iter().map(|c| serde_json::from_str(c).unwrap()).collect()
}
