//! HTTP connections: bounded in number, in time and in size, so that nobody who opens many, or says little, keeps others out.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::Request;
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame, Incoming, SizeHint};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tower::ServiceExt;

/// Connections at a time; fewer if the process may not have twice as many files.
const MOST: usize = 1024;
/// A request's head has to come within this, also the next one of a connection that is kept.
const HEAD: Duration = Duration::from_secs(15);
/// The largest head of a request, in bytes.
const HEAD_BYTES: usize = 32 << 10;
/// A connection may be closed for a new one when nothing has happened on it for this long.
const QUIET: Duration = Duration::from_millis(500);
/// The same while an answer is written: whoever does not read it keeps no place. Streams say something every 10 s.
const STALLED: Duration = Duration::from_secs(30);
/// The same while an answer is worked on.
const WORKING: Duration = Duration::from_secs(600);

/// A connection, seen from outside.
struct Entry {
    close: Arc<Notify>,
    doing: Doing,
    since: Instant,
}

/// What a connection is at.
#[derive(Clone, Copy, PartialEq)]
enum Doing {
    /// Waits for a request, or for all of one's head.
    Nothing,
    /// Waits for a request's body.
    Body,
    /// Works on an answer.
    Answer,
    /// Writes one.
    Write,
}

/// All of them, by number.
#[derive(Clone, Default)]
struct Entries(Arc<Mutex<BTreeMap<u64, Entry>>>);

impl Entries {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the one on which nothing has happened for longest, unless all are at work.
    fn make_room(&self, most: usize) -> bool {
        let mut all = self.lock();
        if all.len() < most {
            return true;
        }
        let quiet = |e: &Entry| {
            let limit = match e.doing {
                Doing::Nothing | Doing::Body => QUIET,
                Doing::Write => STALLED,
                Doing::Answer => WORKING,
            };
            e.since.elapsed() >= limit
        };
        let idle = all.iter().filter(|(_, e)| quiet(e)).min_by_key(|(_, e)| e.since).map(|(number, _)| *number);
        // Out of the count at once, so that the next newcomer chooses another one.
        let gone = idle.and_then(|number| all.remove(&number));
        gone.is_some_and(|entry| {
            entry.close.notify_one();
            true
        })
    }

    fn enter(&self, number: u64) -> Arc<Notify> {
        let close = Arc::new(Notify::new());
        self.lock().insert(number, Entry { close: Arc::clone(&close), doing: Doing::Nothing, since: Instant::now() });
        close
    }

    fn now(&self, number: u64, doing: Doing) {
        if let Some(e) = self.lock().get_mut(&number) {
            (e.doing, e.since) = (doing, Instant::now());
        }
    }
}

/// An entry that goes with its connection, whatever ends that.
struct Entered(Entries, u64);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

/// A request that is being answered, to the last byte of its answer.
struct Active(Entries, u64);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.now(self.1, Doing::Nothing);
    }
}

/// A request's body. One that comes piece by piece is one that comes; behind its end the answer is worked on.
struct Watched {
    body: Incoming,
    entries: Entries,
    number: u64,
}

impl hyper::body::Body for Watched {
    type Data = <Incoming as hyper::body::Body>::Data;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let more = matches!(frame, Some(Ok(_))) && !self.body.is_end_stream();
        self.entries.now(self.number, if more { Doing::Body } else { Doing::Answer });
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// How many connections this process can have, after raising its limit as far as it may.
fn most() -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
    let files = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |n| n as usize);
    MOST.min(files / 2).max(8)
}

/// Serves until `stop` changes, then lets requests that run end.
pub(crate) async fn serve(listener: TcpListener, router: Router, mut stop: watch::Receiver<bool>) {
    let (entries, most) = (Entries::default(), most());
    let mut tasks = tokio::task::JoinSet::new();
    let (mut said, mut dropped) = (None, 0u64);
    for number in 0.. {
        let accepted = tokio::select! {
            _ = stop.changed() => break,
            accepted = listener.accept() => accepted,
        };
        while tasks.try_join_next().is_some() {}
        let (tcp, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if !entries.make_room(most) {
            dropped += 1;
            // One line a second, however many there are.
            if said.is_none_or(|at: Instant| at.elapsed() >= Duration::from_secs(1)) {
                tracing::warn!(%from, most, dropped, "too many connections at work: dropped");
                (said, dropped) = (Some(Instant::now()), 0);
            }
            continue;
        }
        let close = entries.enter(number);
        tasks.spawn(connection(tcp, from, number, (entries.clone(), close), router.clone(), stop.clone()));
    }
    drop(listener);
    while tasks.join_next().await.is_some() {}
}

async fn connection(
    tcp: TcpStream,
    from: SocketAddr,
    number: u64,
    (entries, close): (Entries, Arc<Notify>),
    router: Router,
    mut stop: watch::Receiver<bool>,
) {
    let entered = Entered(entries.clone(), number);
    let _ = tcp.set_nodelay(true);
    let seen = entries.clone();
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let (router, entries) = (router.clone(), seen.clone());
        async move {
            let reading = if request.is_end_stream() { Doing::Answer } else { Doing::Body };
            entries.now(number, reading);
            let active = Active(entries.clone(), number);
            let mut request = request.map(|body| Body::new(Watched { body, entries, number }));
            request.extensions_mut().insert(ConnectInfo(from));
            let response = match router.oneshot(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            };
            active.0.now(number, Doing::Write);
            // Streamed answers are at work until their body ends.
            let kept = response.map(|body| {
                body.map_frame(move |frame| {
                    active.0.now(active.1, Doing::Write);
                    frame
                })
            });
            Ok::<_, Infallible>(kept)
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_BYTES).keep_alive(true);
    let connection = builder.serve_connection(TokioIo::new(tcp), service);
    tokio::pin!(connection);
    tokio::select! {
        // Whatever is wrong with it, it was told; and it says nothing about others.
        _ = connection.as_mut() => {}
        () = close.notified() => {}
        _ = stop.changed() => {
            connection.as_mut().graceful_shutdown();
            let idle = async {
                while entries.lock().get(&number).is_some_and(|e| e.doing != Doing::Nothing) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                // The last bytes are on their way.
                tokio::time::sleep(Duration::from_millis(100)).await;
            };
            tokio::select! { _ = connection.as_mut() => {}, () = idle => {} }
        }
    }
    drop(entered);
}
