//! Statistics of what one receiver got over many runs in which everything that it knows is the same.
//!
//! Every bit position of every message is counted over the runs, and so is every bit of the difference (XOR, and
//! subtraction) of any two messages of one kind; bytes are pooled per kind. A position that is not uniform is rejected
//! at odds that no suite will meet: by Hoeffding's inequality the chance of `|2 ones - runs|^2 > LIMIT runs` is at most
//! `2 exp(-LIMIT / 2)`, about 1e-16 for one fair position and 1e-8 for a hundred million of them (all tests together look at some 40 million). Sums of chi-squares are
//! compared with their law at 7 standard deviations (1e-12). Seeds are fixed, so a verdict is always the same.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use trefoil::prf::Address;
use trefoil::ring::{mask, pack};

/// Largest chi-square (one degree of freedom) of a position.
const LIMIT: f64 = 75.0;
/// Largest deviation of a sum, in standard deviations.
const SIGMAS: f64 = 7.0;
/// Elements of two messages that are subtracted from each other: a stream that is used twice is the same from its start.
const COMPARED: usize = 6;

/// A message, or two that their receiver puts together.
#[derive(Clone)]
pub struct Message {
    /// Its name.
    pub step: Address,
    /// What came.
    pub bytes: Vec<u8>,
    /// Bits of each element, where all have the same and the test knows it.
    pub k: Option<u32>,
}

impl Message {
    /// Path and label: messages of other passes, tokens and layers are of the same kind.
    pub fn kind(&self) -> String {
        format!("{} {}", self.step.path, self.step.label)
    }

    /// Elements, or 64-bit pieces where the packing is not known: neighbours that share a piece only carry into each other.
    fn elements(&self) -> (Vec<u64>, u32) {
        let k = self.k.unwrap_or(64);
        let n = (8 * self.bytes.len()).div_ceil(k as usize);
        let mut padded = self.bytes.clone();
        // A last element that reaches beyond the message is filled up with zeros, which the verdict leaves out.
        padded.resize(pack::packed_len(n, k), 0);
        (pack::unpack(&padded, n, k).unwrap(), k)
    }

    /// Both halves together, as their receiver combines them.
    pub fn with(&self, other: &Message, label: &'static str, join: Join) -> Message {
        let ((a, k), (b, _)) = (self.elements(), other.elements());
        let joined = |(a, b): (&u64, &u64)| match join {
            Join::Xor => a ^ b,
            Join::Sum => a.wrapping_add(*b) & mask(k),
            Join::Difference => a.wrapping_sub(*b) & mask(k),
        };
        let sum: Vec<u64> = a.iter().zip(&b).map(joined).collect();
        let mut bytes = pack::pack(&sum, k);
        // Without known elements the carry out of the last one may have reached the padding.
        let cut = usize::from(join != Join::Xor && self.k.is_none());
        bytes.truncate(self.bytes.len() - cut);
        Message { step: Address { label, ..self.step.clone() }, bytes, k: self.k }
    }
}

/// How a receiver puts two messages together.
#[derive(Clone, Copy, PartialEq)]
pub enum Join {
    Xor,
    Sum,
    Difference,
}

/// Counts of ones, eight positions to a `u128`.
type Counts = Vec<u128>;

/// The bits of a byte, 16 bits apart.
const fn spread() -> [u128; 256] {
    let mut out = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut b = 0;
        while b < 8 {
            out[i] |= ((i >> b & 1) as u128) << (16 * b);
            b += 1;
        }
        i += 1;
    }
    out
}

static SPREAD: [u128; 256] = spread();

fn ones(counts: &Counts, position: usize) -> u32 {
    (counts[position / 8] >> (16 * (position % 8))) as u32 & 0xffff
}

fn add(counts: &mut [u128], bytes: &[u8]) {
    counts.iter_mut().zip(bytes).for_each(|(c, b)| *c += SPREAD[*b as usize]);
}

/// The standardised deviation of a chi-square (Wilson and Hilferty).
pub fn deviation(chi: f64, dof: f64) -> f64 {
    let v = 2.0 / (9.0 * dof);
    ((chi / dof).cbrt() - (1.0 - v)) / v.sqrt()
}

/// Difference of two messages, or of two elements of one.
struct Pair {
    a: (usize, usize),
    b: (usize, usize),
    /// Elements compared.
    n: usize,
    xor: Counts,
    sub: Counts,
}

#[derive(Default)]
struct Score {
    chi: f64,
    positions: usize,
    worst: f64,
}

impl Score {
    fn add(&mut self, ones: u32, runs: u32) -> f64 {
        let chi = (2.0 * f64::from(ones) - f64::from(runs)).powi(2) / f64::from(runs);
        self.chi += chi;
        self.positions += 1;
        self.worst = self.worst.max(chi);
        chi
    }
}

/// All that was counted.
#[derive(Default)]
pub struct Tally {
    runs: u32,
    messages: Vec<Message>,
    bits: Vec<Counts>,
    /// Bits that were ever set in the last byte.
    last: Vec<u8>,
    /// Element-wise differences need no more than these.
    pairs: Vec<Pair>,
    bytes: BTreeMap<String, Vec<u32>>,
}

impl Tally {
    fn start(&mut self, run: &[Message]) {
        self.messages = run.to_vec();
        self.bits = run.iter().map(|m| vec![0; m.bytes.len()]).collect();
        self.last = vec![0; run.len()];
        for (i, a) in run.iter().enumerate() {
            let n = a.elements().0.len();
            let pair = |a, b, n: usize| Pair { a, b, n, xor: vec![0; 8 * n], sub: vec![0; 8 * n] };
            for (j, b) in run.iter().enumerate().skip(i + 1) {
                if a.step.label == b.step.label && a.k == b.k {
                    let n = n.min(b.elements().0.len()).min(COMPARED);
                    self.pairs.push(pair((i, 0), (j, 0), n));
                }
            }
            // Within a message only where its elements are known.
            for j in (1..n.min(COMPARED)).filter(|_| a.k.is_some()) {
                (0..j).for_each(|from| self.pairs.push(pair((i, from), (i, j), 1)));
            }
        }
    }

    /// One more run. Names, lengths and order must be those of the first.
    pub fn add(&mut self, run: &[Message]) {
        if self.runs == 0 {
            self.start(run);
        }
        assert_eq!(run.len(), self.messages.len(), "as many messages in every run");
        self.runs += 1;
        for (i, (m, first)) in run.iter().zip(&self.messages).enumerate() {
            assert_eq!(
                (&m.step, m.bytes.len()),
                (&first.step, first.bytes.len()),
                "names, lengths and order in every run"
            );
            add(&mut self.bits[i], &m.bytes);
            self.last[i] |= m.bytes.last().copied().unwrap_or(0);
            let counts = self.bytes.entry(m.kind()).or_insert_with(|| vec![0; 256]);
            m.bytes[..m.bytes.len().saturating_sub(1)].iter().for_each(|b| counts[*b as usize] += 1);
        }
        let elements: Vec<(Vec<u64>, u32)> = run.iter().map(Message::elements).collect();
        for p in &mut self.pairs {
            let (a, k) = &elements[p.a.0];
            for j in 0..p.n {
                let (x, y) = (a[p.a.1 + j], elements[p.b.0].0[p.b.1 + j]);
                add(&mut p.xor[8 * j..], &(x ^ y).to_le_bytes());
                add(&mut p.sub[8 * j..], &(x.wrapping_sub(y) & mask(*k)).to_le_bytes());
            }
        }
    }

    /// Bits of a message without the padding of its last byte, which is zero in every run.
    fn valid(&self, i: usize) -> usize {
        8 * self.messages[i].bytes.len() - self.last[i].leading_zeros() as usize
    }

    /// What is not uniform, the worst first; empty if all is. Prints what was looked at.
    pub fn verdict(&self, what: &str) -> Vec<String> {
        let mut faults: Vec<(f64, String)> = Vec::new();
        let mut scores: BTreeMap<String, Score> = BTreeMap::new();
        for (i, m) in self.messages.iter().enumerate() {
            for position in 0..self.valid(i) {
                let count = ones(&self.bits[i], position);
                let chi = scores.entry(m.kind()).or_default().add(count, self.runs);
                if chi > LIMIT {
                    faults.push((chi, format!("{}: bit {position} is set in {count} of {} runs", m.step, self.runs)));
                }
            }
        }
        for p in &self.pairs {
            let (a, b) = (&self.messages[p.a.0], &self.messages[p.b.0]);
            let k = a.k.unwrap_or(64) as usize;
            let score = scores.entry(format!("differences of {}", a.step.label)).or_default();
            for j in 0..p.n {
                let valid = |m: usize, e: usize| (self.valid(m)).saturating_sub((e + j) * k).min(k);
                for position in 0..valid(p.a.0, p.a.1).min(valid(p.b.0, p.b.1)) {
                    for (name, counts) in [("xor", &p.xor), ("minus", &p.sub)] {
                        let count = ones(counts, 64 * j + position);
                        let chi = score.add(count, self.runs);
                        if chi > LIMIT {
                            let text = format!(
                                "{} [{}] {name} {} [{}]: bit {position} is set in {count} of {} runs",
                                a.step,
                                p.a.1 + j,
                                b.step,
                                p.b.1 + j,
                                self.runs
                            );
                            faults.push((chi, text));
                        }
                    }
                }
            }
        }
        let mut histograms = 0;
        for (kind, counts) in &self.bytes {
            let total: u32 = counts.iter().sum();
            if total < 256 * 8 {
                continue;
            }
            histograms += 1;
            let expected = f64::from(total) / 256.0;
            let chi: f64 = counts.iter().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
            let z = deviation(chi, 255.0);
            if z > SIGMAS {
                faults.push((z * z, format!("{kind}: bytes are not uniform ({z:.1} standard deviations)")));
            }
        }
        let mut worst = (0.0f64, 0.0f64, 0);
        for (kind, s) in &scores {
            let z = deviation(s.chi, s.positions as f64);
            worst = (worst.0.max(s.worst), worst.1.max(z), worst.2 + s.positions);
            if z > SIGMAS {
                faults.push((
                    z * z,
                    format!("{kind}: {} positions together deviate by {z:.1} standard deviations", s.positions),
                ));
            }
        }
        let mut line = String::new();
        let _ = write!(
            line,
            "{what}: {} runs, {} messages of {} kinds, {} pairs",
            self.runs,
            self.messages.len(),
            self.bytes.len(),
            self.pairs.len()
        );
        let _ = write!(
            line,
            ", {} positions, {histograms} histograms of bytes; largest chi-square {:.1}, largest deviation of a sum {:.1}",
            worst.2, worst.0, worst.1
        );
        eprintln!("{line}");
        faults.sort_by(|a, b| b.0.total_cmp(&a.0));
        faults.into_iter().map(|f| f.1).collect()
    }

    /// [`Tally::verdict`] must find nothing.
    pub fn assert_uniform(&self, what: &str) {
        let faults = self.verdict(what);
        assert!(
            faults.is_empty(),
            "{what}: {} faults, among them\n{}",
            faults.len(),
            faults[..faults.len().min(8)].join("\n")
        );
    }
}

/// Counts of the residues that element `i % widths.len()` of a message takes.
pub struct Residues {
    moduli: Vec<u64>,
    counts: Vec<Vec<u32>>,
    runs: u32,
}

impl Residues {
    /// For elements that repeat these moduli.
    pub fn new(moduli: Vec<u64>) -> Residues {
        Residues { counts: Vec::new(), runs: 0, moduli }
    }

    /// One more run of one message's elements, and of the differences of all neighbours of one modulus.
    pub fn add(&mut self, elements: &[u64]) {
        let period = self.moduli.len();
        let modulus = |i: usize| self.moduli[i % period];
        let whole = elements.len() / period * period;
        let differences = (period..whole).map(|i| (elements[i] + modulus(i) - elements[i - period]) % modulus(i));
        let all: Vec<u64> = elements[..whole].iter().copied().chain(differences).collect();
        self.counts.resize_with(all.len(), || vec![0; 4]);
        self.runs += 1;
        for (i, &v) in all.iter().enumerate() {
            assert!(v < modulus(i), "a code of {v} modulo {}", modulus(i));
            self.counts[i][v as usize] += 1;
        }
    }

    /// Each is uniform over its residues.
    pub fn assert_uniform(&self, what: &str) {
        for (i, counts) in self.counts.iter().enumerate() {
            let n = self.moduli[i % self.moduli.len()] as usize;
            let expected = f64::from(self.runs) / n as f64;
            let chi: f64 = counts[..n].iter().map(|&c| (f64::from(c) - expected).powi(2) / expected).sum();
            // A tail of exp(-chi / 2) up to a factor of chi at 3 degrees of freedom.
            assert!(chi < LIMIT, "{what}: residue {i} modulo {n} came up {counts:?}");
        }
        eprintln!("{what}: {} runs, {} residues uniform", self.runs, self.counts.len());
    }
}
