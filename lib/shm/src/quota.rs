//! How much shared memory a chain and a node may hold. Kept by the agent, which grants segments; asked before the
//! memory exists, so that the answer is a refusal and not the kernel's.

use std::collections::BTreeMap;

/// The account of a node and of each chain on it, in bytes.
#[derive(Clone, Debug)]
pub struct Quota {
    node: Account,
    chains: BTreeMap<u32, Account>,
}

#[derive(Clone, Copy, Debug)]
struct Account {
    limit: u64,
    used: u64,
}

/// Whose limit it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// The limit of this chain.
    Chain(u32),
    /// The limit of the whole node.
    Node,
}

/// A refusal: which limit, and the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("shared memory of {limit} is used up: {used} of {allowed} bytes used, {asked} more asked")]
pub struct QuotaError {
    /// Whose limit.
    pub limit: Limit,
    /// Bytes held.
    pub used: u64,
    /// Bytes that may be held.
    pub allowed: u64,
    /// Bytes asked for.
    pub asked: u64,
}

// === impl Limit ===

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Chain(chain) => write!(f, "chain {chain}"),
            Self::Node => write!(f, "the node"),
        }
    }
}

// === impl Account ===

impl Account {
    fn check(self, limit: Limit, asked: u64) -> Result<(), QuotaError> {
        let fits = self.used.checked_add(asked).is_some_and(|sum| sum <= self.limit);
        fits.then_some(()).ok_or(QuotaError { limit, used: self.used, allowed: self.limit, asked })
    }
}

// === impl Quota ===

impl Quota {
    /// An empty node that may hold `node_limit` bytes.
    #[must_use]
    pub const fn new(node_limit: u64) -> Self {
        Self { node: Account { limit: node_limit, used: 0 }, chains: BTreeMap::new() }
    }

    /// Sets what `chain` may hold. What it already holds stays.
    pub fn set_chain(&mut self, chain: u32, limit: u64) {
        self.chains.entry(chain).or_insert(Account { limit, used: 0 }).limit = limit;
    }

    /// Grants `bytes` to `chain`, or says which limit is in the way. A chain without a limit of its own has the node's.
    ///
    /// # Errors
    /// The limit that would be exceeded; nothing was granted.
    pub fn reserve(&mut self, chain: u32, bytes: u64) -> Result<(), QuotaError> {
        let account = self.chains.entry(chain).or_insert(Account { limit: self.node.limit, used: 0 });
        account.check(Limit::Chain(chain), bytes)?;
        self.node.check(Limit::Node, bytes)?;
        account.used += bytes;
        self.node.used += bytes;
        Ok(())
    }

    /// Counts `bytes` that exist already, limits or not: what a new agent finds in its store.
    pub fn adopt(&mut self, chain: u32, bytes: u64) {
        let account = self.chains.entry(chain).or_insert(Account { limit: self.node.limit, used: 0 });
        account.used = account.used.saturating_add(bytes);
        self.node.used = self.node.used.saturating_add(bytes);
    }

    /// Takes `bytes` of `chain` back. Never more than it holds, so that one mistake cannot make room for ever.
    pub fn give_back(&mut self, chain: u32, bytes: u64) {
        if let Some(account) = self.chains.get_mut(&chain) {
            let bytes = bytes.min(account.used);
            account.used -= bytes;
            self.node.used = self.node.used.saturating_sub(bytes);
        }
    }

    /// Forgets a chain and takes back all it holds.
    pub fn remove_chain(&mut self, chain: u32) {
        if let Some(account) = self.chains.remove(&chain) {
            self.node.used = self.node.used.saturating_sub(account.used);
        }
    }

    /// Bytes held by `chain`.
    #[must_use]
    pub fn used_by(&self, chain: u32) -> u64 {
        self.chains.get(&chain).map_or(0, |account| account.used)
    }

    /// Bytes held by all chains.
    #[must_use]
    pub const fn used(&self) -> u64 {
        self.node.used
    }

    /// Bytes that the node may hold.
    #[must_use]
    pub const fn limit(&self) -> u64 {
        self.node.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refusal_names_the_limit_and_grants_nothing() {
        let mut quota = Quota::new(100);
        quota.set_chain(1, 60);
        quota.reserve(1, 50).unwrap();
        let refused = quota.reserve(1, 11).unwrap_err();
        assert_eq!(refused, QuotaError { limit: Limit::Chain(1), used: 50, allowed: 60, asked: 11 });
        let refused = quota.reserve(2, 51).unwrap_err();
        assert_eq!(refused, QuotaError { limit: Limit::Node, used: 50, allowed: 100, asked: 51 });
        assert_eq!(refused.to_string(), "shared memory of the node is used up: 50 of 100 bytes used, 51 more asked");
        assert_eq!((quota.used(), quota.used_by(1), quota.used_by(2)), (50, 50, 0));
        assert_eq!(quota.reserve(1, u64::MAX).unwrap_err().limit, Limit::Chain(1));
        quota.reserve(2, 50).unwrap();
    }

    #[test]
    fn giving_back_too_much_makes_no_room() {
        let mut quota = Quota::new(100);
        quota.reserve(1, 40).unwrap();
        quota.reserve(2, 40).unwrap();
        quota.give_back(1, 1000);
        quota.give_back(3, 1000);
        assert_eq!((quota.used(), quota.used_by(2)), (40, 40));
        quota.adopt(3, 500);
        assert_eq!(quota.reserve(4, 1).unwrap_err().limit, Limit::Node);
        quota.remove_chain(3);
        quota.reserve(4, 60).unwrap();
    }
}
