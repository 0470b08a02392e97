//! What the gateway answers, path by path.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{ConnectInfo, Extension, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event as Message, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD as STANDARD;
use futures_core::Stream;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::metrics::{Metrics, entropy};
use super::openai::{self, Asked, Envelope, Usage, Wrong};
use crate::client::{Answer, Client, End, Event, Failure};
use crate::error::{Error, PeerFault};

/// The largest body of a request, in bytes.
const BODY: usize = 1 << 20;
/// It has to have come within this.
const BODY_TIME: Duration = Duration::from_secs(30);
/// How long a streamed answer's first piece is waited for, so that what fails at once fails with its own status.
const FIRST: Duration = Duration::from_secs(3);
/// A comment is sent on a silent stream so often, for proxies that close silent connections.
const ALIVE: Duration = Duration::from_secs(10);

/// What all requests share.
pub(super) struct Gateway {
    pub client: Client,
    pub metrics: Metrics,
    /// What `/v1/models` calls the model.
    pub model: String,
    pub network: String,
    /// SHA-256 of the keys that let in; none lets everybody in.
    pub keys: Vec<[u8; 32]>,
    /// It listens to this machine alone, so that a name other than this machine's is somebody else's page talking.
    pub loopback: bool,
    pub started: u64,
    /// What `/ready` said last, and when: whoever asks often has the parties asked once a second.
    pub readiness: tokio::sync::Mutex<Option<(Instant, Result<(), String>)>>,
}

type Shared = State<Arc<Gateway>>;

/// All paths.
pub(super) fn router(gateway: Arc<Gateway>) -> Router {
    let asset = |kind: &'static str, text: &'static str| {
        get(move || async move { ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")], text) })
    };
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/api/state", get(state))
        .route("/metrics", get(metrics))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&gateway), authorised))
        // What follows says nothing about anybody.
        .route("/", asset("text/html; charset=utf-8", include_str!("page/index.html")))
        .route("/page/app.js", asset("text/javascript; charset=utf-8", include_str!("page/app.js")))
        .route("/page/style.css", asset("text/css; charset=utf-8", include_str!("page/style.css")))
        .route("/health", get(|| async { "ok\n" }))
        .route("/ready", get(ready))
        .fallback(nothing)
        .method_not_allowed_fallback(nothing)
        .layer(middleware::from_fn_with_state(Arc::clone(&gateway), watched))
        .with_state(gateway)
}

/// An error's type, as OpenAI names it.
fn kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        s if s.is_client_error() => "invalid_request_error",
        _ => "server_error",
    }
}

fn refusal(status: StatusCode, code: Option<&str>, param: Option<&str>, text: &str) -> Response {
    let mut response = (status, axum::Json(openai::error(kind(status), code, param, text))).into_response();
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

impl From<Wrong> for Response {
    fn from(wrong: Wrong) -> Response {
        refusal(StatusCode::BAD_REQUEST, None, Some(wrong.param), &wrong.text)
    }
}

/// Status, code and text of a request's failure.
fn failure(f: &Failure) -> (StatusCode, &'static str, String) {
    let (status, code) = match f {
        Failure::Invalid(_) => (StatusCode::BAD_REQUEST, "invalid_request"),
        Failure::TooLong(_) => (StatusCode::BAD_REQUEST, "context_length_exceeded"),
        Failure::Busy(_) => (StatusCode::TOO_MANY_REQUESTS, "queue_full"),
        Failure::Closing => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
        Failure::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "gateway_unavailable"),
        Failure::Failed(Error::Peer { kind: PeerFault::Timeout(_), .. }) => {
            (StatusCode::GATEWAY_TIMEOUT, "party_timed_out")
        }
        Failure::Failed(Error::Peer { .. }) => (StatusCode::SERVICE_UNAVAILABLE, "party_unavailable"),
        Failure::Failed(Error::Range { .. }) => (StatusCode::INTERNAL_SERVER_ERROR, "out_of_range"),
        Failure::Failed(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
    };
    (status, code, f.to_string())
}

fn failed(f: &Failure) -> Response {
    let (status, code, text) = failure(f);
    refusal(status, Some(code), None, &text)
}

async fn nothing(method: Method, uri: axum::http::Uri) -> Response {
    let text = format!(
        "{method} {}: there is no such call; there are POST /v1/chat/completions, POST /v1/completions, GET /v1/models, /metrics, /health and /ready",
        uri.path()
    );
    refusal(StatusCode::NOT_FOUND, Some("unknown_url"), None, &text)
}

/// Around every request: whose page it comes from, what a browser may do with the answer, the count.
async fn watched(State(gateway): Shared, request: Request, next: Next) -> Response {
    // Paths that there are not would be labels without end.
    let known =
        ["/v1/chat/completions", "/v1/completions", "/v1/models", "/api/state", "/metrics", "/health", "/ready", "/"];
    let path = known.into_iter().find(|p| *p == request.uri().path()).unwrap_or("other");
    let host = request.headers().get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    let mut response = if gateway.loopback && !is_this_machine(host) {
        // A page that has its own name point here (DNS rebinding) would pass for ours.
        let text = "this gateway listens on this machine alone, and is called localhost or 127.0.0.1; to serve others give --listen";
        refusal(StatusCode::MISDIRECTED_REQUEST, Some("unknown_host"), None, text)
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    let rules = [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
    ];
    for (name, value) in rules {
        headers.insert(name, HeaderValue::from_static(value));
    }
    // Answers are private; the page's own files are not.
    let kind = headers.get(header::CONTENT_TYPE).and_then(|t| t.to_str().ok()).unwrap_or_default();
    if !["text/html", "text/javascript", "text/css"].iter().any(|asset| kind.starts_with(asset)) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    gateway.metrics.responded(path, response.status().as_u16());
    response
}

fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Lets in whoever has a key, and says who it is.
async fn authorised(State(gateway): Shared, mut request: Request, next: Next) -> Response {
    let caller = match caller(&gateway, request.headers(), request.extensions().get()) {
        Some(caller) => caller,
        None => {
            let text = "no such API key: send a key of the gateway's --api-keys file as `Authorization: Bearer KEY`";
            let mut response = refusal(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), None, text);
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            return response;
        }
    };
    request.extensions_mut().insert(caller);
    next.run(request).await
}

/// Whose turn a request takes: a key's, or without keys an address's.
#[derive(Clone, Copy)]
struct Caller(u64);

fn caller(gateway: &Gateway, headers: &HeaderMap, from: Option<&ConnectInfo<SocketAddr>>) -> Option<Caller> {
    if gateway.keys.is_empty() {
        let ip = from.map(|ConnectInfo(from)| from.ip().to_string()).unwrap_or_default();
        let hash = Sha256::digest(ip.as_bytes());
        return Some(Caller(u64::from_le_bytes(hash[..8].try_into().ok()?)));
    }
    let given = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = given.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    // Hashes are compared, of which nobody can choose a part: how long it takes says nothing.
    let hash: [u8; 32] = Sha256::digest(key.trim().as_bytes()).into();
    gateway.keys.iter().position(|k| *k == hash).map(|i| Caller(i as u64))
}

/// The JSON object that a request brings.
async fn object(request: Request) -> Result<(Caller, Map<String, Value>), Response> {
    let json = request.headers().get(header::CONTENT_TYPE).and_then(|t| t.to_str().ok()).unwrap_or_default();
    // Of other types a browser sends for any page without asking.
    if !json.trim_start().to_ascii_lowercase().starts_with("application/json") {
        let text = "the body has to be JSON: send `Content-Type: application/json`";
        return Err(refusal(StatusCode::UNSUPPORTED_MEDIA_TYPE, None, None, text));
    }
    let caller = request.extensions().get::<Caller>().copied().unwrap_or(Caller(0));
    let long = |()| {
        let text = format!("the body is longer than {BODY} bytes: send less");
        refusal(StatusCode::PAYLOAD_TOO_LARGE, None, None, &text)
    };
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > BODY as u64) {
        return Err(long(()));
    }
    let body: Bytes = match tokio::time::timeout(BODY_TIME, to_bytes(request.into_body(), BODY)).await {
        Ok(Ok(body)) => body,
        Ok(Err(e)) if std::error::Error::source(&e).is_some_and(|s| s.is::<http_body_util::LengthLimitError>()) => {
            return Err(long(()));
        }
        Ok(Err(_)) => return Err(refusal(StatusCode::BAD_REQUEST, None, None, "the body ends in the middle")),
        Err(_) => {
            let text = format!("the body has not come within {} s", BODY_TIME.as_secs());
            return Err(refusal(StatusCode::REQUEST_TIMEOUT, None, None, &text));
        }
    };
    match serde_json::from_slice(&body) {
        Ok(Value::Object(fields)) => Ok((caller, fields)),
        Ok(_) => Err(refusal(StatusCode::BAD_REQUEST, None, None, "the body holds JSON, but no object")),
        // Where it stops being JSON, not what stands there.
        Err(e) => {
            let text = format!("the body is not JSON (line {}, column {})", e.line(), e.column());
            Err(refusal(StatusCode::BAD_REQUEST, None, None, &text))
        }
    }
}

async fn chat(State(gateway): Shared, request: Request) -> Response {
    complete(&gateway, request, true).await.unwrap_or_else(|refused| refused)
}

async fn completion(State(gateway): Shared, request: Request) -> Response {
    complete(&gateway, request, false).await.unwrap_or_else(|refused| refused)
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn usage(end: &End) -> Usage {
    let (prompt_tokens, completion_tokens) = (end.prompt_tokens, end.completion_tokens);
    Usage { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens }
}

fn finish(end: &End) -> &'static str {
    if end.stopped { "stop" } else { "length" }
}

async fn complete(gateway: &Arc<Gateway>, request: Request, chat: bool) -> Result<Response, Response> {
    let (Caller(caller), fields) = object(request).await?;
    let asked = if chat { openai::chat(&fields) } else { openai::completion(&fields) }?;
    let Asked { mut request, model, stream, include_usage } = asked;
    if let Some(model) = model.filter(|m| *m != gateway.model) {
        let shown: String = model.chars().take(80).collect();
        let text = format!("there is no model `{shown}` here; the model is `{}`", gateway.model);
        return Err(refusal(StatusCode::NOT_FOUND, Some("model_not_found"), Some("model"), &text));
    }
    request.caller = caller;
    // Templates and tokenizers take their time with long texts.
    let client = gateway.client.clone();
    let asked = tokio::task::spawn_blocking(move || client.generate(request)).await;
    let asked = asked.unwrap_or_else(|_| Err(Failure::Failed(Error::Internal("reading a request panicked".into()))));
    let mut answer = asked.map_err(|f| failed(&f))?;
    let mut id = [0; 12];
    let _ = getrandom::fill(&mut id);
    let id: String = id.iter().map(|b| format!("{b:02x}")).collect();
    let envelope = Envelope {
        id: format!("{}-{id}", if chat { "chatcmpl" } else { "cmpl" }),
        created: unix_time(),
        model: gateway.model.clone(),
        chat,
        include_usage,
    };
    if !stream {
        let (text, end) = answer.text().await.map_err(|f| failed(&f))?;
        gateway.metrics.ended(&end);
        return Ok(axum::Json(envelope.whole(&text, finish(&end), usage(&end))).into_response());
    }
    let first = match tokio::time::timeout(FIRST, answer.next()).await {
        Ok(Some(Err(f))) => return Err(failed(&f)),
        Ok(first) => first,
        Err(_) => None,
    };
    let (send, receive) = mpsc::channel(64);
    tokio::spawn(speak(Arc::clone(gateway), envelope, first, answer, send));
    let sse = Sse::new(Messages(receive)).keep_alive(KeepAlive::new().interval(ALIVE));
    Ok(sse.into_response())
}

/// Puts an answer on the wire as it comes. Ends when the caller goes away; the answer, dropped, then ends the request.
async fn speak(
    gateway: Arc<Gateway>,
    envelope: Envelope,
    first: Option<Result<Event, Failure>>,
    mut answer: Answer,
    out: mpsc::Sender<Message>,
) {
    let json = |value: &Value| Message::default().data(value.to_string());
    if let Some(opening) = envelope.opening()
        && out.send(json(&opening)).await.is_err()
    {
        return;
    }
    let (mut next, mut done) = (first, false);
    loop {
        let event = match next.take() {
            Some(event) => Some(event),
            None => tokio::select! {
                event = answer.next() => event,
                () = out.closed() => return,
            },
        };
        let chunks = match event {
            Some(Ok(Event::Text(piece))) => vec![envelope.piece(&piece)],
            Some(Ok(Event::Done(end))) => {
                gateway.metrics.ended(&end);
                done = true;
                envelope.closing(finish(&end), usage(&end))
            }
            Some(Err(f)) => {
                let (status, code, text) = failure(&f);
                let _ = out.send(json(&openai::error(kind(status), Some(code), None, &text))).await;
                return;
            }
            None if done => {
                let _ = out.send(Message::default().data("[DONE]")).await;
                return;
            }
            // Whoever answered is gone without a word.
            None => {
                let text = "the answer has broken off";
                let _ = out.send(json(&openai::error("server_error", Some("internal"), None, text))).await;
                return;
            }
        };
        for chunk in &chunks {
            if out.send(json(chunk)).await.is_err() {
                return;
            }
        }
    }
}

/// Messages that another task sends.
struct Messages(mpsc::Receiver<Message>);

impl Stream for Messages {
    type Item = Result<Message, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|message| message.map(Ok))
    }
}

impl Gateway {
    fn card(&self) -> Value {
        let facts = self.client.facts();
        json!({"id": self.model, "object": "model", "created": self.started, "owned_by": facts.owner, "max_model_len": facts.context})
    }
}

async fn models(State(gateway): Shared) -> Response {
    axum::Json(json!({"object": "list", "data": [gateway.card()]})).into_response()
}

async fn model(State(gateway): Shared, axum::extract::Path(id): axum::extract::Path<String>) -> Response {
    if id == gateway.model {
        return axum::Json(gateway.card()).into_response();
    }
    let text = format!("there is no such model; the model is `{}`", gateway.model);
    refusal(StatusCode::NOT_FOUND, Some("model_not_found"), Some("model"), &text)
}

/// Whether a request would be taken now.
async fn ready(State(gateway): Shared) -> Response {
    let mut last = gateway.readiness.lock().await;
    let fresh = last.as_ref().filter(|(at, _)| at.elapsed() < Duration::from_secs(1)).map(|(_, said)| said.clone());
    let said = match fresh {
        Some(said) => said,
        None => {
            // Anybody may ask: who and why, but no addresses and names.
            let said = gateway.client.reachable().await.map_err(|e| match &e {
                Error::Peer { role, .. } => format!("{role}: {}", e.code()),
                other => other.code().to_owned(),
            });
            *last = Some((Instant::now(), said.clone()));
            said
        }
    };
    match said {
        Ok(()) => "ready\n".into_response(),
        Err(why) => {
            let text = format!("not ready: {why}");
            refusal(StatusCode::SERVICE_UNAVAILABLE, Some("not_ready"), None, &text)
        }
    }
}

async fn metrics(State(gateway): Shared) -> Response {
    match gateway.metrics.text() {
        Ok(text) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], Body::from(text)).into_response()
        }
        Err(e) => failed(&Failure::Failed(e)),
    }
}

/// What the page shows.
async fn state(State(gateway): Shared, Extension(Caller(caller)): Extension<Caller>) -> Response {
    let (state, facts) = (gateway.client.state(), gateway.client.facts());
    let samples: Map<String, Value> = gateway
        .client
        .samples(caller)
        .into_iter()
        .map(|(link, bytes)| (link, json!({"bytes": STANDARD.encode(&bytes), "entropy": entropy(&bytes)})))
        .collect();
    let ([limit, open, busy], [waiting_limit, waiting]) = (state.sessions, state.queue);
    axum::Json(json!({
        "release": env!("CARGO_PKG_VERSION"),
        "mode": if facts.local { "local" } else { "deployment" },
        "network": gateway.network,
        "model": {
            "id": gateway.model,
            "layers": facts.config.num_layers,
            "public_layers": facts.public_layers,
            "private_embedding": facts.private_embedding,
            "private_head": facts.private_head,
            "context": facts.context,
            "chat": gateway.client.chats(),
        },
        "parties": {"client": "this process", "owner": facts.owner, "helper": facts.helper},
        "sessions": {"limit": limit, "open": open, "busy": busy},
        "queue": {"limit": waiting_limit, "waiting": waiting},
        "totals": state.totals,
        "links": state.links,
        "last": state.latest,
        "samples": samples,
    }))
    .into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_machine() {
        for host in ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "127.9.9.9", "[::1]:8080"] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in ["", "example.org:8080", "localhost.example.org", "10.0.0.1", "[::2]:1", "127.0.0.1.nip.io"] {
            assert!(!is_this_machine(host), "{host}");
        }
    }
}
