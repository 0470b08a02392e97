//! Somebody with a valid certificate who does not keep to the protocol.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use trefoil::deploy::config::{Address, Config};
use trefoil::deploy::tls::{self, Secured, Tls};
use trefoil::deploy::wire::{self, Digest, Go, Hello, Nonce, Reply};
use trefoil::error::{Error, Result};
use trefoil::net::tls::TlsChannel;
use trefoil::party::Role;

/// A Client up to the point where the engine starts.
pub struct Attacker {
    pub owner: Arc<TlsChannel>,
    pub helper: Arc<TlsChannel>,
    pub session: Digest,
}

pub const PATIENCE: Duration = Duration::from_secs(5);

pub async fn dial(config: &Path, role: Role) -> Result<Secured> {
    let peers = Config::load(config)?;
    let address = peers.peers().into_iter().find(|(r, _)| *r == role).unwrap().1;
    dial_at(config, address, role).await
}

/// With the certificate of this configuration to an address that need not be in it.
pub async fn dial_at(config: &Path, address: &Address, role: Role) -> Result<Secured> {
    let config = Config::load(config)?;
    let tls = Tls::load(config.tls(), config.role())?;
    tls::connect(&tls, address, role, PATIENCE).await
}

pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

pub async fn say(c: &mut Secured, hello: &Hello) -> Result<()> {
    c.send("test", &wire::encode(hello)?).await
}

pub async fn hear(c: &mut Secured) -> Result<Reply> {
    let bytes = c.recv("test", wire::LONG).await?;
    wire::decode(&bytes).ok_or_else(|| Error::Internal("no reply".into()))
}

/// Opens a session with this nonce; the Owner's answer if it is a refusal.
pub fn open(config: &Path, nonce: Nonce) -> Result<Attacker, Box<Reply>> {
    open_with(config, nonce, None)
}

/// The same, with raw bytes to the Owner before the first frame: four bytes with their number, then they themselves.
pub fn open_with(config: &Path, nonce: Nonce, raw: Option<&[u8]>) -> Result<Attacker, Box<Reply>> {
    block_on(async {
        let mut owner = dial(config, Role::Owner).await.unwrap();
        let mut helper = dial(config, Role::Helper).await.unwrap();
        say(&mut owner, &Hello::Open { nonce }).await.unwrap();
        say(&mut helper, &Hello::Join { nonce }).await.unwrap();
        let session = match hear(&mut owner).await.unwrap() {
            Reply::Welcome { session, .. } => session,
            other => return Err(Box::new(other)),
        };
        hear(&mut helper).await.unwrap();
        let go = wire::encode(&Go { session }).unwrap();
        owner.send("test", &go).await.unwrap();
        helper.send("test", &go).await.unwrap();
        let mut ahead = dial(config, Role::Owner).await.unwrap();
        say(&mut ahead, &Hello::Ahead { session }).await.unwrap();
        assert!(matches!(hear(&mut ahead).await.unwrap(), Reply::Attached));
        if let Some(raw) = raw {
            owner.send("test", raw).await.unwrap();
        }
        let channel = |online: Secured, ahead: Option<Secured>| {
            let online = online.into_stream(None).unwrap();
            let ahead = ahead.map(|a| a.into_stream(None).unwrap());
            Arc::new(TlsChannel::new(online, ahead, 1 << 28).unwrap())
        };
        Ok(Attacker { owner: channel(owner, Some(ahead)), helper: channel(helper, None), session })
    })
}
