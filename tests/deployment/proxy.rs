//! A slow network between two parties: bytes go through as they are, no faster than told.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

pub struct Proxy {
    pub address: String,
    /// Bytes per second towards `target`; 0 is as fast as it goes.
    rate: Arc<AtomicU64>,
    forwarded: Arc<AtomicU64>,
}

impl Proxy {
    pub fn to(target: &str) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (rate, forwarded): (Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
        let proxy = Proxy { address, rate: Arc::clone(&rate), forwarded: Arc::clone(&forwarded) };
        let target = target.to_string();
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                // A target that is down: the one who dials sees its connection closed.
                let Ok(far) = TcpStream::connect(&target) else { continue };
                let _ = (near.set_nodelay(true), far.set_nodelay(true));
                let (from, to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                let (rate, forwarded) = (Arc::clone(&rate), Arc::clone(&forwarded));
                thread::spawn(move || copy(from, to, Some((&rate, &forwarded))));
                thread::spawn(move || copy(far, near, None));
            }
        });
        proxy
    }

    pub fn limit(&self, bytes_per_second: u64) {
        self.rate.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Bytes sent towards the target so far.
    pub fn forwarded(&self) -> u64 {
        self.forwarded.load(Ordering::Relaxed)
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, throttle: Option<(&AtomicU64, &AtomicU64)>) {
    let mut bytes = vec![0; 16 << 10];
    while let Ok(n) = from.read(&mut bytes) {
        if n == 0 || to.write_all(&bytes[..n]).is_err() {
            break;
        }
        if let Some((rate, forwarded)) = throttle {
            forwarded.fetch_add(n as u64, Ordering::Relaxed);
            let rate = rate.load(Ordering::Relaxed);
            if rate > 0 {
                thread::sleep(Duration::from_secs_f64(n as f64 / rate as f64));
            }
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
