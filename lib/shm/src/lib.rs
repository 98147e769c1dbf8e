//! The object store of a chain: sealed memfd segments, slots with generations, and the ledger.
