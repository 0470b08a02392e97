//! Three parties as real processes over TLS on this machine, and an attacker with valid certificates.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use trefoil::deploy::certs::{Authority, Details, Host, Key, Request, Validity, now, write_private};
use trefoil::deploy::party::Daemon;
use trefoil::model::TextCodec;
use trefoil::party::Role;

pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/quill-4m");
pub const PROMPT: &str = "It was a bright morning";

pub fn trefoil() -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_trefoil"));
    c.env_remove("RUST_LOG");
    c
}

/// A daemon whose log is kept.
pub struct Party {
    child: Child,
    pub log: Arc<Mutex<Vec<String>>>,
    pub address: String,
}

impl Party {
    pub fn start(config: &Path) -> Party {
        Party::start_as(config, "json", &[])
    }

    /// With a log of this format, and this environment.
    pub fn start_as(config: &Path, format: &str, environment: &[(&str, &str)]) -> Party {
        let mut child = trefoil()
            .args(["party", "--log", format, "--config"])
            .arg(config)
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log: Arc<Mutex<Vec<String>>> = Arc::default();
        let (lines, stderr) = (Arc::clone(&log), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).for_each(|l| lines.lock().unwrap().push(l));
        });
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").map(str::to_owned);
        let address = address.unwrap_or_else(|| panic!("did not start: {:?}", log.lock().unwrap()));
        Party { child, log, address }
    }

    pub fn lines(&self) -> Vec<Value> {
        self.log.lock().unwrap().iter().filter_map(|l| serde_json::from_str(l).ok()).collect()
    }

    /// Waits for a line that `is` it.
    pub fn wait(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(line) = self.lines().into_iter().find(&is) {
                return line;
            }
            assert!(Instant::now() < deadline, "no {what} in the log: {:#?}", self.log.lock().unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for an error of this code.
    pub fn wait_code(&self, code: &str) -> Value {
        self.wait(code, |line| line["code"] == code)
    }

    pub fn signal(&self, signal: &str) {
        let done = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    pub fn kill(&mut self) {
        self.signal("-KILL");
        self.child.wait().unwrap();
    }

    /// Whether it still runs.
    pub fn alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn wait_exit(&mut self, limit: Duration) -> std::process::ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "did not end: {:#?}", self.log.lock().unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Entries of a directory of this process in /proc: `task`, `fd`.
    pub fn entries(&self, directory: &str) -> usize {
        std::fs::read_dir(format!("/proc/{}/{directory}", self.child.id())).unwrap().count()
    }

    /// The kernel's figure for resident memory, in bytes.
    pub fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Party {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A preparation of the bundled model, made once for all tests of a process.
pub fn preparation() -> &'static Path {
    static PREPARED: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let made = PREPARED.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("prep");
        prepare(&out, &[]);
        (dir, out)
    });
    &made.1
}

pub fn prepare(out: &Path, more: &[&str]) {
    let done = trefoil().args(["prepare", "--model", MODEL, "--out"]).arg(out).args(more).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Certificates and configurations of a deployment in a directory of its own.
pub struct Site {
    pub dir: TempDir,
    pub ca: Authority,
    /// Appended to `[limits]`.
    pub limits: String,
    /// Appended to `[tls]`.
    pub tls: String,
    pub preparation: PathBuf,
    /// Whether servers tell their metrics, at a port of the system's choice.
    pub metrics: bool,
}

pub fn day(days: i64) -> i64 {
    now() + days * 86_400
}

impl Site {
    pub fn new() -> Site {
        let ca = Authority::new("Test authority", Validity::days(30, now())).unwrap();
        let site = Site {
            dir: tempfile::tempdir().unwrap(),
            ca,
            limits: "timeout_s = 5\nhandshake_timeout_s = 5\n".into(),
            tls: String::new(),
            preparation: preparation().to_path_buf(),
            metrics: false,
        };
        std::fs::write(site.path("ca.pem"), site.ca.certificate_pem()).unwrap();
        for role in Role::ALL {
            site.certify(&role.to_string(), role, &site.ca, Validity::days(20, now()));
        }
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `name.pem` and `name.key`; returns the fingerprint.
    pub fn certify(&self, name: &str, role: Role, ca: &Authority, validity: Validity) -> String {
        let hosts: Vec<Host> = if role == Role::Client { vec![] } else { vec!["127.0.0.1".parse().unwrap()] };
        let key = Key::generate().unwrap();
        let pem = ca.issue(&Request::new(role, name, hosts).unwrap(), &key, validity).unwrap();
        std::fs::write(self.path(&format!("{name}.pem")), &pem).unwrap();
        let _ = std::fs::remove_file(self.path(&format!("{name}.key")));
        write_private(&self.path(&format!("{name}.key")), &key.pem()).unwrap();
        self.fingerprint(name)
    }

    /// Of the certificate `name`.
    pub fn fingerprint(&self, name: &str) -> String {
        let pem = std::fs::read(self.path(&format!("{name}.pem"))).unwrap();
        Details::parse_pem(&pem).unwrap()[0].fingerprint.to_string()
    }

    /// Writes the configuration `name.toml` of `role`, which presents the certificate `identity`.
    pub fn config(&self, name: &str, role: Role, identity: &str, listen: &str, owner: &str, helper: &str) -> PathBuf {
        let (limits, tls, prep) = (&self.limits, &self.tls, self.preparation.display());
        let own = match role {
            Role::Owner => format!(
                "[listen]\naddress = \"{listen}\"\n[peers]\nhelper = \"{helper}\"\n[model]\npreparation = \"{prep}\"\nstore = \"{name}.state\"\n"
            ),
            Role::Helper => format!("[listen]\naddress = \"{listen}\"\n[model]\nstore = \"{name}.store\"\n"),
            Role::Client => {
                format!("[peers]\nowner = \"{owner}\"\nhelper = \"{helper}\"\n[model]\npublic = \"{prep}/public\"\n")
            }
        };
        let metrics = if self.metrics && role != Role::Client { "[metrics]\nlisten = \"127.0.0.1:0\"\n" } else { "" };
        let text = format!(
            "role = \"{role}\"\n[tls]\ncertificate = \"{identity}.pem\"\nkey = \"{identity}.key\"\nca = \"ca.pem\"\n{tls}{own}[limits]\n{limits}{metrics}"
        );
        let path = self.path(&format!("{name}.toml"));
        std::fs::write(&path, text).unwrap();
        path
    }
}

/// Puts a certificate on a configuration's list of revoked ones.
pub fn revoke(config: &Path, fingerprint: &str) {
    let text = std::fs::read_to_string(config).unwrap();
    let text = text.replace("ca = \"ca.pem\"", &format!("ca = \"ca.pem\"\nrevoked = [\"{fingerprint}\"]"));
    std::fs::write(config, text).unwrap();
}

/// Random bytes, the first of which is given.
pub fn noise(first: u8) -> Vec<u8> {
    let rest = (1..4096u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8);
    std::iter::once(first).chain(rest).collect()
}

/// Owner and Helper running, and a Client's configuration.
pub struct Trio {
    pub site: Site,
    pub owner: Party,
    pub helper: Party,
    pub client: PathBuf,
    pub owner_config: PathBuf,
    pub helper_config: PathBuf,
}

impl Trio {
    pub fn new() -> Trio {
        Trio::at(Site::new())
    }

    pub fn at(site: Site) -> Trio {
        let any = "127.0.0.1:0";
        let config = site.config("helper", Role::Helper, "helper", any, "", "");
        let helper = Party::start(&config);
        // From now on at this port, also after a restart.
        let helper_config = site.config("helper", Role::Helper, "helper", &helper.address, "", "");
        let config = site.config("owner", Role::Owner, "owner", any, "", &helper.address);
        let owner = Party::start(&config);
        let owner_config = site.config("owner", Role::Owner, "owner", &owner.address, "", &helper.address);
        let client = site.config("client", Role::Client, "client", "", &owner.address, &helper.address);
        let trio = Trio { site, owner, helper, client, owner_config, helper_config };
        trio.provisioned();
        trio
    }

    pub fn provisioned(&self) {
        self.owner.wait("provisioning", |l| l["message"] == "the helper has the model");
    }

    pub fn generate(&self, config: &Path, tokens: usize) -> Command {
        let mut c = trefoil();
        c.args(["generate", "--json", "--prompt", PROMPT, "--max-new-tokens", &tokens.to_string(), "--config"]);
        c.arg(config);
        c
    }

    /// A session must work.
    pub fn works(&self) {
        let out = run(&mut self.generate(&self.client, 4));
        assert_eq!(tokens(&out), expected(4), "{}", String::from_utf8_lossy(&out.stderr));
    }
}

/// Runs to the end, which must come within a minute.
pub fn run(c: &mut Command) -> Output {
    let mut child = c.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = |r: &mut dyn Read| {
        let mut bytes = Vec::new();
        r.read_to_end(&mut bytes).unwrap();
        bytes
    };
    std::thread::scope(|s| {
        let (out, err) = (s.spawn(move || read(&mut out)), s.spawn(move || read(&mut err)));
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("the client hangs");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Output { status: child.wait().unwrap(), stdout: out.join().unwrap(), stderr: err.join().unwrap() }
    })
}

pub fn report(out: &Output) -> Value {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

pub fn tokens(out: &Output) -> Vec<u64> {
    report(out)["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect()
}

/// Waits until the Helper has the model of an Owner in this process.
pub fn provisioned(owner: &Daemon) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !owner.provisioned() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The tokens of the prompt.
pub fn prompt() -> Vec<u32> {
    TextCodec::open(&preparation().join("public")).unwrap().encode(PROMPT).unwrap()
}

/// What one process says to the prompt.
pub fn expected(n: usize) -> Vec<u64> {
    static LOCAL: OnceLock<Vec<u64>> = OnceLock::new();
    let all = LOCAL.get_or_init(|| {
        let out =
            run(trefoil().args(["generate", "--json", "--prompt", PROMPT, "--max-new-tokens", "24", "--model", MODEL]));
        tokens(&out)
    });
    all[..n].to_vec()
}
