//! What the ledger refuses.

use std::io;

use lifl_ebpf_common::descriptor::ObjectKey;

use super::record::RecordIndex;

/// Why the ledger refuses. Whatever is refused has changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The kernel refused.
    #[error("cannot map the ledger")]
    Io(#[from] io::Error),
    /// A capacity of zero or beyond reason.
    #[error("a ledger of {0} records")]
    Capacity(u32),
    /// The file is no ledger of this chain.
    #[error("not this chain's ledger: {0}")]
    Foreign(&'static str),
    /// A record that no gateway can have written.
    #[error("record {index} of the ledger is corrupt: {what}")]
    Corrupt {
        /// Which record.
        index: u32,
        /// What is wrong.
        what: &'static str,
    },
    /// All records are in use.
    #[error("ledger is full: {used} of {capacity} records used, {asked} more asked")]
    Full {
        /// Records in use.
        used: u32,
        /// Records that there are.
        capacity: u32,
        /// Records asked for.
        asked: u32,
    },
    /// The round takes no more updates.
    #[error("round {0} is closed")]
    RoundClosed(u32),
    /// The round still takes updates.
    #[error("round {0} is open")]
    RoundOpen(u32),
    /// The round before must be committed first.
    #[error("round {0} is not committed")]
    Uncommitted(u32),
    /// Not the round it is.
    #[error("round {asked} where it is round {current}")]
    WrongRound {
        /// The one asked for.
        asked: u32,
        /// The one it is.
        current: u32,
    },
    /// A field that no honest caller passes.
    #[error("{field} is not acceptable: {what}")]
    Field {
        /// Which field.
        field: &'static str,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The client has sent an event of this id already.
    #[error("event was admitted before")]
    Duplicate(RecordIndex),
    /// The object is recorded already, otherwise than said now.
    #[error("object {0:?} is recorded already, with other facts or as another's input")]
    Conflict(ObjectKey),
    /// No such object in this round.
    #[error("input {0:?} is unknown in this round")]
    Unknown(ObjectKey),
    /// An input stands for one sum only.
    #[error("input {input:?} is contained in {container:?} already")]
    Contained {
        /// The input.
        input: ObjectKey,
        /// What contains it.
        container: ObjectKey,
    },
    /// Only who holds an object can say what contains it.
    #[error("input {input:?} is held by role {holder}, not by role {sender}")]
    NotHolder {
        /// The input.
        input: ObjectKey,
        /// Who holds it.
        holder: u32,
        /// Who spoke.
        sender: u32,
    },
    /// The sum says another number of updates than its inputs have.
    #[error("sum says {said} updates, its inputs have {inputs}")]
    Count {
        /// The sum's.
        said: u32,
        /// The inputs'.
        inputs: u64,
    },
    /// The sum says another weight than its inputs have.
    #[error("sum says weight {said}, its inputs have {inputs}")]
    Weight {
        /// The sum's.
        said: f64,
        /// The inputs'.
        inputs: f64,
    },
}
