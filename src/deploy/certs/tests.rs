use proptest::prelude::*;
use rcgen::{CertificateParams, CustomExtension, IsCa, KeyPair, SanType};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::*;
use crate::party::Role;

const NOW: i64 = 1_800_000_000;

fn hosts(hosts: &[&str]) -> Vec<Host> {
    hosts.iter().map(|h| h.parse().unwrap()).collect()
}

fn authority() -> Authority {
    Authority::new("Test CA", Validity::days(AUTHORITY_DAYS, NOW)).unwrap()
}

fn one(pem: &str) -> Details {
    let mut all = Details::parse_pem(pem.as_bytes()).unwrap();
    assert_eq!(all.len(), 1);
    all.remove(0)
}

#[test]
fn a_signed_request_becomes_what_was_asked_for() {
    let (authority, key) = (authority(), Key::generate().unwrap());
    for (role, names) in [
        (Role::Owner, &["owner.example", "192.0.2.1", "2001:db8::1"][..]),
        (Role::Helper, &["Helper.Example"]),
        (Role::Client, &[]),
    ] {
        let request = Request::new(role, "Ärzte & Söhne", hosts(names)).unwrap();
        let signed = authority.sign(&request.csr(&key).unwrap(), role, Validity::days(90, NOW)).unwrap();
        assert_eq!(signed.request, request);
        let details = one(&signed.pem);
        assert_eq!((details.name.as_str(), details.role), ("Ärzte & Söhne", Some(role)));
        let found: Vec<String> =
            details.dns.iter().cloned().chain(details.ips.iter().map(ToString::to_string)).collect();
        assert_eq!(found, names.iter().map(|n| n.to_lowercase()).collect::<Vec<_>>());
        assert_eq!((details.not_before, details.not_after), (NOW - 300, NOW + 90 * 86_400));
        assert_eq!((details.issuer.as_str(), details.is_ca, details.self_issued), ("Test CA", false, false));
        assert!(details.belongs_to(&key) && !details.belongs_to(&Key::generate().unwrap()));
        assert_eq!((details.days_left(NOW), details.days_left(NOW + 91 * 86_400)), (90, -1));
    }
}

/// The TLS library takes them for what they are made for, and for nothing else.
#[test]
fn tls_accepts_what_was_issued() {
    use std::sync::Arc;

    use rustls::RootCertStore;
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::UnixTime;
    use rustls::server::WebPkiClientVerifier;

    let (authority, key) = (authority(), Key::generate().unwrap());
    let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(der(authority.certificate_pem())).unwrap();
    let (roots, provider) = (Arc::new(roots), Arc::new(rustls::crypto::ring::default_provider()));
    let of_client = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build().unwrap();
    let of_server = WebPkiServerVerifier::builder_with_provider(roots, provider).build().unwrap();
    let at = |seconds: i64| UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds as u64));

    for role in Role::ALL {
        let request = Request::new(role, "x", hosts(&["h.example", "192.0.2.1", "::1"])).unwrap();
        let end = der(&authority.issue(&request, &key, Validity::days(1, NOW)).unwrap());
        assert!(of_client.verify_client_cert(&end, &[], at(NOW)).is_ok());
        assert!(of_client.verify_client_cert(&end, &[], at(NOW + 2 * 86_400)).is_err());
        for (name, listed) in [("h.example", true), ("192.0.2.1", true), ("::1", true), ("other.example", false)] {
            let name = name.parse::<Host>().unwrap().server_name().unwrap();
            let taken = of_server.verify_server_cert(&end, &[], &name, &[], at(NOW)).is_ok();
            assert_eq!(taken, listed && role != Role::Client, "{role} {name:?}");
        }
    }
}

/// Extensions, as another implementation reads them.
#[test]
fn certificates_carry_these_extensions_and_no_others() {
    let (authority, key) = (authority(), Key::generate().unwrap());
    let mut serials = Vec::new();
    for role in Role::ALL {
        let request = Request::new(role, "x", hosts(&["h.example"])).unwrap();
        let issued = authority.issue(&request, &key, Validity::days(1, NOW)).unwrap();
        let own = request.self_signed(&key, Validity::days(1, NOW)).unwrap();
        for pem in [&issued, &own] {
            let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
            let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
            let usage = certificate.extended_key_usage().unwrap().unwrap().value;
            assert_eq!((usage.server_auth, usage.client_auth, usage.any), (role != Role::Client, true, false));
            let usage = certificate.key_usage().unwrap().unwrap().value;
            assert!(usage.digital_signature() && usage.flags == 1, "{usage:?}");
            assert!(!certificate.basic_constraints().unwrap().unwrap().value.ca);
            serials.push(certificate.raw_serial().to_vec());
        }
        let der = CertificateDer::from_pem_slice(issued.as_bytes()).unwrap();
        let ca = CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes()).unwrap();
        let (_, ca) = x509_parser::parse_x509_certificate(&ca).unwrap();
        let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert!(certificate.verify_signature(Some(ca.public_key())).is_ok());
        assert_eq!(ca.basic_constraints().unwrap().unwrap().value.path_len_constraint, Some(0));
        assert!(ca.key_usage().unwrap().unwrap().value.key_cert_sign());
    }
    serials.sort();
    serials.dedup();
    assert_eq!(serials.len(), 6);
}

#[test]
fn requests_that_are_not_signed() {
    let (authority, key) = (authority(), Key::generate().unwrap());
    let sign = |csr: &str, role| authority.sign(csr, role, Validity::days(1, NOW)).unwrap_err().to_string();
    let request = Request::new(Role::Client, "alice", Vec::new()).unwrap().csr(&key).unwrap();

    let other = sign(&request, Role::Owner);
    assert!(other.contains("client") && other.contains("owner") && other.contains("alice"), "{other}");
    assert!(sign("nothing", Role::Client).contains("no PEM certificate request"));
    assert!(sign(authority.certificate_pem(), Role::Client).contains("no PEM certificate request"));

    // One bit of the key or of the signature.
    let mut refused = 0;
    let lines: Vec<&str> = request.lines().collect();
    for line in 1..lines.len() - 1 {
        let mut changed: Vec<String> = lines.iter().map(|l| (*l).to_owned()).collect();
        let swapped = if changed[line].as_bytes()[10] == b'A' { "B" } else { "A" };
        changed[line].replace_range(10..11, swapped);
        refused += usize::from(authority.sign(&changed.join("\n"), Role::Client, Validity::days(1, NOW)).is_err());
    }
    assert_eq!(refused, lines.len() - 2);

    let custom = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = CertificateParams::default();
        params.distinguished_name = request::common_name("mallory");
        params.subject_alt_names = vec![SanType::URI("trefoil:client".try_into().unwrap())];
        change(&mut params);
        params.serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
    };
    assert!(authority.sign(&custom(&|_| {}), Role::Client, Validity::days(1, NOW)).is_ok());
    type Change<'a> = &'a dyn Fn(&mut CertificateParams);
    let cases: [(Change<'_>, &str); 8] = [
        (&|p| p.subject_alt_names.clear(), "no Trefoil role"),
        (&|p| p.subject_alt_names.push(SanType::URI("trefoil:owner".try_into().unwrap())), "two roles"),
        (&|p| p.subject_alt_names[0] = SanType::URI("trefoil:root".try_into().unwrap()), "no role"),
        (&|p| p.subject_alt_names.push(SanType::Rfc822Name("a@b.example".try_into().unwrap())), "no hosts"),
        (&|p| p.subject_alt_names.push(SanType::DnsName("*.example".try_into().unwrap())), "wildcard"),
        (&|p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained), "authority"),
        (&|p| p.distinguished_name = request::common_name("a\nb"), "name"),
        (&|p| p.custom_extensions.push(CustomExtension::from_oid_content(&[1, 2, 3], vec![5, 0])), "extensions"),
    ];
    for (change, part) in cases {
        let found = sign(&custom(change), Role::Client);
        assert!(found.contains(part), "{part}: {found}");
    }
    // An owner's request needs a host, however it was made.
    let hostless = custom(&|p| p.subject_alt_names[0] = SanType::URI("trefoil:owner".try_into().unwrap()));
    assert!(sign(&hostless, Role::Owner).contains("host"));
}

#[test]
fn dates_of_an_authority_bound_what_it_signs() {
    let authority = authority();
    let check = |days, now| authority.check_dates(Validity::days(days, now), now).map_err(|e| e.to_string());
    assert_eq!(check(90, NOW), Ok(()));
    assert!(check(90, NOW + 731 * 86_400).unwrap_err().contains("expired on"));
    assert!(check(90, NOW - 86_400).unwrap_err().contains("clock"));
    assert!(check(90, NOW + 700 * 86_400).unwrap_err().contains("--days 30 at most"));
    assert!(Authority::new("x", Validity { not_before: NOW, not_after: NOW }).is_err());
    assert!(Authority::new("x", Validity { not_before: 0, not_after: i64::MAX }).is_err());
    // For tests of peers: any dates can be had.
    let request = Request::new(Role::Client, "late", Vec::new()).unwrap();
    let past = Validity { not_before: NOW - 100, not_after: NOW - 50 };
    assert_eq!(one(&authority.issue(&request, &Key::generate().unwrap(), past).unwrap()).not_after, NOW - 50);
}

#[test]
fn an_authority_is_certificate_and_key_of_one() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (authority(), authority());
    let file = |name: &str| dir.path().join(name);
    write_private(&file("a.key"), &a.key_pem()).unwrap();
    write_private(&file("b.key"), &b.key_pem()).unwrap();
    write_new(&file("a.pem"), a.certificate_pem()).unwrap();
    assert_eq!(Authority::load(&file("a.pem"), &file("a.key")).unwrap().details(), a.details());
    let other = Authority::load(&file("a.pem"), &file("b.key")).unwrap_err().to_string();
    assert!(other.contains("do not belong together") && other.contains("b.key"), "{other}");

    let key = Key::generate().unwrap();
    let party = Request::new(Role::Client, "x", Vec::new()).unwrap().self_signed(&key, Validity::days(1, NOW)).unwrap();
    write_private(&file("c.key"), &key.pem()).unwrap();
    write_new(&file("c.pem"), &party).unwrap();
    assert!(Authority::load(&file("c.pem"), &file("c.key")).unwrap_err().to_string().contains("not an authority's"));
    assert!(one(&party).self_issued);
}

#[cfg(unix)]
#[test]
fn keys_are_for_their_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.key");
    let key = Key::generate().unwrap();
    write_private(&file, &key.pem()).unwrap();
    let mode = |file: &std::path::Path| std::fs::metadata(file).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&file), 0o600);
    assert!(Key::load(&file).is_ok());
    assert!(write_private(&file, "other").unwrap_err().to_string().contains("already exists"));
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    let open = Key::load(&file).unwrap_err().to_string();
    assert!(open.contains("0640") && open.contains("chmod 600"), "{open}");
    assert_eq!(format!("{key:?}"), "Key(..)");
    let bad = Key::from_pem("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----").unwrap_err();
    assert!(!format!("{bad:?}").contains("c2VjcmV0"));
}

#[test]
fn names_and_hosts() {
    for bad in ["", " x", "a\u{7}b", "x\n", &"n".repeat(65)] {
        assert!(Request::new(Role::Client, bad, Vec::new()).is_err(), "{bad:?}");
    }
    assert!(Request::new(Role::Owner, "x", Vec::new()).unwrap_err().to_string().contains("--host"));
    for bad in ["", "a b", "*.example", "https://a", "a:1", "10.0.0", "1.2.3.4.5", "-a-", "a/b"] {
        assert!(bad.parse::<Host>().is_err(), "{bad}");
    }
    for (good, shown) in
        [("A.example", "a.example"), ("::1", "::1"), ("10.0.0.1", "10.0.0.1"), ("localhost", "localhost")]
    {
        let host: Host = good.parse().unwrap();
        assert_eq!(host.to_string(), shown);
        assert!(host.server_name().is_ok());
    }
}

#[test]
fn fingerprints_are_written_and_read() {
    let print = Fingerprint::of(b"abc");
    let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(print.to_string(), text);
    assert_eq!(text.parse::<Fingerprint>().unwrap(), print);
    for bad in ["", "sha256:", &text[7..], &text[..70], &text.replace('b', "g"), &text.replace("ba", "é")] {
        assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
    }
}

#[test]
fn texts_without_a_certificate() {
    let key = Key::generate().unwrap();
    assert!(Details::parse_pem(key.pem().as_bytes()).unwrap_err().to_string().contains("private key"));
    assert!(Details::parse_pem(b"").unwrap_err().to_string().contains("no CERTIFICATE"));
    let two = authority().certificate_pem().repeat(2);
    assert_eq!(Details::parse_pem(two.as_bytes()).unwrap().len(), 2);
    assert_eq!(date(NOW), "2027-01-15 08:00 UTC");
}

fn sample() -> Vec<u8> {
    let request = Request::new(Role::Owner, "owner", hosts(&["owner.example", "192.0.2.1", "::1"])).unwrap();
    let pem = request.self_signed(&Key::generate().unwrap(), Validity::days(1, NOW)).unwrap();
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

proptest! {
    #[test]
    fn random_bytes_are_no_certificate(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Details::parse_der(&bytes).is_err());
        prop_assert!(Details::parse_pem(&bytes).is_err());
    }

    /// Damage gives an error or another certificate, never a panic.
    #[test]
    fn damaged_certificates_do_not_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        length in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let whole = sample();
        let mut der = whole.clone();
        let original = Fingerprint::of(&der);
        for (at, byte) in changes {
            let at = at.index(der.len());
            der[at] = byte;
        }
        if let Some(length) = length {
            der.truncate(length.index(der.len()));
            prop_assert!(Details::parse_der(&der).is_err());
        }
        if let Ok(details) = Details::parse_der(&der) {
            prop_assert_eq!(details.fingerprint == original, der == whole);
        }
    }
}
