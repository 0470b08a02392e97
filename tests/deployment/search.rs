//! Looks for secrets in what is not secret: every secret in all the forms in which a program may print it.

use std::collections::HashMap;

/// Shorter ones would be found by chance.
const SHORTEST: usize = 8;

/// Forms of the secrets, by their first eight bytes.
#[derive(Default)]
pub struct Search {
    forms: HashMap<[u8; SHORTEST], Vec<(Vec<u8>, String)>>,
    count: usize,
}

fn hex(bytes: &[u8], between: &str, upper: bool) -> Vec<u8> {
    let digits: Vec<String> =
        bytes.iter().map(|b| if upper { format!("{b:02X}") } else { format!("{b:02x}") }).collect();
    digits.join(between).into_bytes()
}

fn base64(bytes: &[u8], alphabet: &[u8; 64]) -> Vec<u8> {
    let bits = |at: usize| (0..6).fold(0, |v, i| v << 1 | (bytes[(at + i) / 8] >> (7 - (at + i) % 8) & 1) as usize);
    (0..bytes.len() * 8 / 6).map(|i| alphabet[bits(6 * i)]).collect()
}

const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Numbers as programs write lists of them.
pub fn decimal<T: std::fmt::Display>(numbers: &[T]) -> Vec<Vec<u8>> {
    let numbers: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    [", ", ",", " ", "\n", ",\n    "].iter().map(|between| numbers.join(between).into_bytes()).collect()
}

impl Search {
    fn form(&mut self, name: &str, form: Vec<u8>) {
        let Some(start) = form.first_chunk::<SHORTEST>() else { return };
        self.count += 1;
        self.forms.entry(*start).or_default().push((form, name.to_string()));
    }

    /// Text or bytes: as they are, in hexadecimal, as a list of bytes, in base64 wherever it may begin.
    pub fn bytes(&mut self, name: &str, secret: &[u8]) {
        assert!(secret.len() >= SHORTEST, "{name} is too short to look for");
        self.form(&format!("{name}, raw"), secret.to_vec());
        for upper in [false, true] {
            for between in ["", ":", " "] {
                self.form(&format!("{name}, hexadecimal"), hex(secret, between, upper));
            }
        }
        for form in decimal(secret) {
            self.form(&format!("{name}, decimal bytes"), form);
        }
        for alphabet in [STANDARD, URL] {
            for skip in 0..3 {
                // The bytes before it and after it decide on the characters at its edges.
                self.form(&format!("{name}, base64"), base64(&secret[skip..], alphabet));
            }
        }
    }

    /// Numbers in decimal.
    pub fn numbers<T: std::fmt::Display>(&mut self, name: &str, numbers: &[T]) {
        for form in decimal(numbers) {
            self.form(&format!("{name}, decimal"), form);
        }
    }

    pub fn forms(&self) -> usize {
        self.count
    }

    /// The names of those that are in `place`.
    pub fn find(&self, place: &[u8]) -> Vec<&str> {
        let mut found: Vec<&str> = Vec::new();
        for (at, start) in place.windows(SHORTEST).enumerate() {
            for (form, name) in self.forms.get(start).into_iter().flatten() {
                if place[at..].starts_with(form) && !found.contains(&name.as_str()) {
                    found.push(name);
                }
            }
        }
        found
    }
}

#[test]
fn a_planted_leak_is_found() {
    let secret = b"\x01\xfe\x83 quinquefoil \x90\x00\x7f";
    let mut search = Search::default();
    search.bytes("secret", secret);
    search.numbers("list", &[-1234, 5678, 91]);
    let around = |leak: &[u8]| [&b"some text before "[..], leak, b" and after"].concat();
    assert!(search.find(&around(b"nothing")).is_empty());
    assert_eq!(search.find(&around(secret)), ["secret, raw"]);
    let upper = String::from_utf8(hex(secret, "", true)).unwrap();
    assert_eq!(search.find(&around(upper.as_bytes())), ["secret, hexadecimal"]);
    assert_eq!(search.find(&around(format!("{secret:?}").as_bytes())), ["secret, decimal bytes"]);
    assert_eq!(search.find(&around(b"[-1234, 5678, 91]")), ["list, decimal"]);
    // Within a longer value, at each of the three places.
    for before in 0..3 {
        let value = [&vec![7; before][..], secret, &[9; 3]].concat();
        assert_eq!(search.find(&around(&base64(&value, STANDARD))), ["secret, base64"], "{before} bytes before it");
    }
    assert_eq!(base64(b"quinquefoil!", STANDARD), b"cXVpbnF1ZWZvaWwh");
}
