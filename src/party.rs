//! The three parties. A closed enum: no integer stands for a party anywhere else.

use std::fmt;

use serde::{Deserialize, Serialize};
use std::str::FromStr;

use crate::error::Error;

/// One of the three parties of a Trefoil session.
///
/// | role | who | knows | online work |
/// |---|---|---|---|
/// | `Owner` | the model provider | the private weights | most |
/// | `Client` | the user; runs the public layers in plaintext | prompt and tokens | inputs and outputs only |
/// | `Helper` | a third, non-colluding server near the Owner | nothing | answers the Owner |
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The model provider; holds the masked values `d` and the plaintext weights.
    Owner,
    /// The user; holds the masks `r`, gives the prompt, receives the tokens.
    Client,
    /// The third server; holds the masks `r` and one share of everything the Owner multiplies.
    Helper,
}

impl Role {
    /// All three, in the order of the replicated components that they lack.
    pub const ALL: [Role; 3] = [Role::Owner, Role::Client, Role::Helper];

    /// Owner -> Client -> Helper -> Owner.
    #[must_use]
    pub fn next(self) -> Role {
        match self {
            Role::Owner => Role::Client,
            Role::Client => Role::Helper,
            Role::Helper => Role::Owner,
        }
    }

    /// The party before this one.
    #[must_use]
    pub fn prev(self) -> Role {
        self.next().next()
    }

    /// Position in [`Role::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        match self {
            Role::Owner => 0,
            Role::Client => 1,
            Role::Helper => 2,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Owner => "owner",
            Role::Client => "client",
            Role::Helper => "helper",
        })
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(text: &str) -> Result<Role, Error> {
        Role::ALL
            .into_iter()
            .find(|role| role.to_string() == text)
            .ok_or_else(|| Error::Config(format!("{text:?} is no role: expected owner, client or helper")))
    }
}
