//! This party's own certificate, as its peers will see it, and the authority.

use super::super::certs::{Details, Key, date, now};
use super::super::config::{Config, Tls};
use super::super::tls;
use super::{Finding, remedy};
use crate::party::Role;

/// From here on a certificate's end is announced.
const EXPIRY_DAYS: i64 = 30;

pub(super) fn check(config: &Config) -> Vec<Finding> {
    let (files, role) = (config.tls(), config.role());
    let mut out = Vec::new();
    let own = match Details::load(&files.certificate) {
        Ok(chain) => chain.into_iter().next(),
        Err(error) => {
            out.push(Finding::fail("certificate", error.to_string(), remedy(&error)));
            None
        }
    };
    let key = Key::load(&files.key);
    if let Err(error) = &key {
        out.push(Finding::fail("key", error.to_string(), remedy(error)));
    }
    if let Some(own) = &own {
        out.extend(role_of(own, files, role));
        out.push(dates(own, "certificate dates", &files.certificate.display().to_string(), RENEW));
        if let Ok(key) = &key {
            out.push(match own.belongs_to(key) {
                true => Finding::ok("key", format!("{} belongs to the certificate", files.key.display())),
                false => Finding::fail(
                    "key",
                    format!("{} is not the key of {}", files.key.display(), files.certificate.display()),
                    "give the two files that were made together ([tls] certificate and key)",
                ),
            });
        }
        if files.revoked.contains(&own.fingerprint) {
            let found = format!("our own certificate ({}) is on our own list of revoked ones", own.fingerprint);
            out.push(Finding::fail("revoked", found, "renew the certificate, or take it off [tls] revoked"));
        }
        out.extend(issuer(own, files, role));
    }
    out.extend(authority(files));
    out.extend(pinned(files));
    out
}

const RENEW: &str =
    "renew it: trefoil certs request here, certs sign at the authority; daemons read the new one without a restart";

fn role_of(own: &Details, files: &Tls, role: Role) -> Option<Finding> {
    let path = files.certificate.display();
    let found = format!("{path}: \"{}\", {}", own.name, own.fingerprint);
    Some(match own.role {
        Some(r) if r == role => Finding::ok("certificate", found),
        Some(other) => Finding::fail(
            "certificate",
            format!("{path} is the {other}'s certificate, and the configuration's role is {role}"),
            format!("give the {role}'s certificate and key in [tls], or correct the role: somebody has swapped files"),
        ),
        None => Finding::fail(
            "certificate",
            format!("{path} carries no Trefoil role"),
            "have one made with `trefoil certs request` and `certs sign`",
        ),
    })
}

fn dates(d: &Details, check: &str, what: &str, renew: &str) -> Finding {
    let (now, left) = (now(), d.days_left(now()));
    if now > d.not_after {
        Finding::fail(check, format!("{what} expired on {}", date(d.not_after)), renew)
    } else if now < d.not_before {
        let found = format!("{what} is valid from {} only, and by this clock it is {}", date(d.not_before), date(now));
        Finding::fail(check, found, "set this machine's clock right (NTP), or the signer's, who then signs again")
    } else if left < EXPIRY_DAYS {
        Finding::warn(check, format!("{what} expires in {left} days, on {}", date(d.not_after)), renew)
    } else {
        Finding::ok(check, format!("{what} is valid for {left} days more"))
    }
}

/// Whether peers that trust the same authority will take our certificate.
fn issuer(own: &Details, files: &Tls, role: Role) -> Option<Finding> {
    let check = "certificate issuer";
    let by_hand = "each peer has to have it among its pinned ones";
    let Some(ca) = &files.ca else {
        return Some(Finding::ok(check, format!("no authority is configured: {by_hand}")));
    };
    // At a time at which it is valid: that it is not now is another finding.
    let at = now().clamp(own.not_before, own.not_after);
    Some(match tls::issued(&files.certificate, ca, role, at) {
        Ok(true) => Finding::ok(check, format!("signed by our authority, \"{}\"", own.issuer)),
        Ok(false) if own.self_issued => {
            let found = format!("{} is self-signed, not signed by {}", files.certificate.display(), ca.display());
            Finding::warn(check, found, format!("{by_hand}; or have it signed by the authority (trefoil certs sign)"))
        }
        Ok(false) => Finding::fail(
            check,
            format!(
                "{} is signed by \"{}\", which is not the authority in {}: peers that trust that one will refuse us",
                files.certificate.display(),
                own.issuer,
                ca.display()
            ),
            "have it signed by the authority that all parties trust (trefoil certs request, certs sign), or correct [tls] ca",
        ),
        Err(error) => Finding::fail(check, error.to_string(), remedy(&error)),
    })
}

fn authority(files: &Tls) -> Vec<Finding> {
    let Some(path) = &files.ca else { return Vec::new() };
    let what = |d: &Details| format!("the authority \"{}\" in {}", d.name, path.display());
    let renew = "make a new authority (trefoil certs authority), put both into every party's ca file, and have all certificates signed anew";
    match Details::load(path) {
        Err(error) => vec![Finding::fail("authority", error.to_string(), remedy(&error))],
        Ok(all) => all
            .iter()
            .map(|d| match d.is_ca {
                true => dates(d, "authority", &what(d), renew),
                false => Finding::fail(
                    "authority",
                    format!("{} is no authority", what(d)),
                    "give the authority's certificate as [tls] ca (ca.pem); a peer's own goes into pinned",
                ),
            })
            .collect(),
    }
}

fn pinned(files: &Tls) -> Vec<Finding> {
    let mut out = Vec::new();
    for path in &files.pinned {
        match Details::load(path) {
            Err(error) => out.push(Finding::fail("pinned", error.to_string(), remedy(&error))),
            Ok(all) => {
                let renew = "get the peer's renewed certificate and pin that one";
                let what = |d: &Details| format!("\"{}\" in {}", d.name, path.display());
                out.extend(all.iter().map(|d| dates(d, "pinned", &what(d), renew)));
            }
        }
    }
    out
}
