//! The cost of an operation, declared in code beside it and compared with the meter by tests.

use crate::net::MESSAGE_HEADER;
use crate::party::Role;
use crate::ring::pack::packed_len;

/// Bytes and messages of one directed link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes, message headers included.
    pub bytes: u64,
    /// Messages.
    pub messages: u64,
}

/// What an operation sends, by directed link and lane, and how many of its online messages follow each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    online: [[Traffic; 3]; 3],
    ahead: [[Traffic; 3]; 3],
    /// Online messages in sequence.
    pub depth: u32,
}

impl Cost {
    /// Online traffic of a link.
    #[must_use]
    pub fn online(&self, from: Role, to: Role) -> Traffic {
        self.online[from.index()][to.index()]
    }

    /// Run-ahead traffic of a link.
    #[must_use]
    pub fn ahead(&self, from: Role, to: Role) -> Traffic {
        self.ahead[from.index()][to.index()]
    }

    /// Online bytes of all links.
    #[must_use]
    pub fn online_bytes(&self) -> u64 {
        self.online.iter().flatten().map(|t| t.bytes).sum()
    }

    /// Run-ahead bytes of all links.
    #[must_use]
    pub fn ahead_bytes(&self) -> u64 {
        self.ahead.iter().flatten().map(|t| t.bytes).sum()
    }

    /// Adds an online message of `n` words of `k` bits.
    #[must_use]
    pub fn send(mut self, from: Role, to: Role, n: usize, k: u32) -> Cost {
        let t = &mut self.online[from.index()][to.index()];
        t.bytes += (packed_len(n, k) + MESSAGE_HEADER) as u64;
        t.messages += 1;
        self
    }

    /// Adds a run-ahead message of `n` words of `k` bits to the Owner.
    #[must_use]
    pub fn run_ahead(mut self, from: Role, n: usize, k: u32) -> Cost {
        let t = &mut self.ahead[from.index()][Role::Owner.index()];
        t.bytes += (packed_len(n, k) + MESSAGE_HEADER) as u64;
        t.messages += 1;
        self
    }

    /// An exchange: `up_bits` Owner -> Helper, `n` words of `k` bits back, as many from the Client ahead; depth 2.
    #[must_use]
    pub fn exchange(up_bits: usize, n: usize, k: u32) -> Cost {
        let mut c = Cost::default().send(Role::Owner, Role::Helper, up_bits, 1).send(Role::Helper, Role::Owner, n, k);
        c = c.run_ahead(Role::Client, n, k);
        c.depth = 2;
        c
    }

    /// Takes back what was counted before; depth stays.
    pub fn subtract(&mut self, o: &Cost) {
        for i in 0..3 {
            for j in 0..3 {
                for (a, b) in [(&mut self.online, &o.online), (&mut self.ahead, &o.ahead)] {
                    a[i][j].bytes -= b[i][j].bytes;
                    a[i][j].messages -= b[i][j].messages;
                }
            }
        }
    }

    /// Both, the second after the first.
    #[must_use]
    pub fn then(self, o: Cost) -> Cost {
        let depth = self.depth + o.depth;
        Cost { depth, ..self.beside(o) }
    }

    /// Both, at the same time.
    #[must_use]
    pub fn beside(mut self, o: Cost) -> Cost {
        for i in 0..3 {
            for j in 0..3 {
                for (a, b) in [(&mut self.online, &o.online), (&mut self.ahead, &o.ahead)] {
                    a[i][j].bytes += b[i][j].bytes;
                    a[i][j].messages += b[i][j].messages;
                }
            }
        }
        self.depth = self.depth.max(o.depth);
        self
    }
}
