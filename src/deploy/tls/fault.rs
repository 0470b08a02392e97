//! What a failed handshake means.

use rustls::AlertDescription;

use super::{ALPN, trust};
use crate::error::{CertificateFault, PeerFault};

pub(super) fn fault(e: &std::io::Error) -> PeerFault {
    use rustls::Error as E;
    let found = trust::found();
    let Some(e) = e.get_ref().and_then(|e| e.downcast_ref::<E>()) else {
        return match e.kind() {
            std::io::ErrorKind::UnexpectedEof
            | std::io::ErrorKind::ConnectionReset
            | std::io::ErrorKind::BrokenPipe
            | std::io::ErrorKind::ConnectionAborted => PeerFault::Closed,
            _ => PeerFault::Handshake(e.to_string()),
        };
    };
    match (e, found) {
        (E::InvalidCertificate(_), Some(found)) => PeerFault::Certificate(found),
        (E::InvalidCertificate(e), None) => PeerFault::Certificate(CertificateFault::Invalid(format!("{e}"))),
        (E::NoCertificatesPresented, _) => PeerFault::Certificate(CertificateFault::Missing),
        (E::InvalidMessage(_) | E::InappropriateMessage { .. }, _) => PeerFault::NotTls,
        (E::NoApplicationProtocol | E::AlertReceived(AlertDescription::NoApplicationProtocol), _) => {
            PeerFault::Version { ours: ALPN.into(), theirs: "(it did not say)".into() }
        }
        (E::AlertReceived(AlertDescription::ProtocolVersion), _) => PeerFault::OldTls,
        (E::AlertReceived(alert), _) if about_certificates(*alert) => PeerFault::RefusesUs(spoken(*alert).into()),
        (E::PeerIncompatible(what), _) => {
            use rustls::PeerIncompatible as P;
            match what {
                P::SupportedVersionsExtensionRequired
                | P::Tls12NotOffered
                | P::Tls12NotOfferedOrEnabled
                | P::ServerDoesNotSupportTls12Or13
                | P::ServerTlsVersionIsDisabledByOurConfig => PeerFault::OldTls,
                other => PeerFault::Handshake(format!("{other:?}")),
            }
        }
        (other, _) => PeerFault::Handshake(other.to_string()),
    }
}

fn about_certificates(a: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        a,
        A::UnknownCA
            | A::CertificateExpired
            | A::CertificateRevoked
            | A::BadCertificate
            | A::CertificateUnknown
            | A::CertificateRequired
            | A::UnsupportedCertificate
            | A::AccessDenied
            | A::DecryptError
    )
}

fn spoken(a: AlertDescription) -> &'static str {
    use AlertDescription as A;
    match a {
        A::UnknownCA => "it does not know who signed it",
        A::CertificateExpired => "by its clock the certificate is not valid now",
        A::CertificateRevoked => "it is on the peer's list of revoked certificates",
        A::CertificateRequired => "it got none",
        _ => "bad certificate",
    }
}
