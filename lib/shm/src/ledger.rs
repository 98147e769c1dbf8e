//! The ledger of a chain: what was promised, who holds it, what contains it, and which round it is.
//!
//! One memfd, written by the gateway alone under one lock, kept by the supervisor: it survives the gateway at any instant.
//!
//! ```text
//!            admit                    seal(P, [U, ...])                     retire(round)
//!  (free) ─────────> Update ADMITTED ─────────────────> contained in P ─────────────> kept for duplicate answers
//!                                                                                      until the next retire
//!  (free) ─────────> P PREPARED ── inputs marked ──> P SEALED ── contained in Q ... ──> (free)
//! ```
//!
//! **Atomic steps**, each one store: the state word of an update (it is promised), the state word of a sum (it stands for
//! its inputs, all at once), the round word (open, closed), the committed word (a round is over). What comes before such a
//! store is undone or finished by [`Ledger::open`]. So at any instant every promised update is contained in exactly one
//! uncontained object, itself included.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
};

use lifl_ebpf_common::descriptor::{ObjectKey, role};

use crate::object::ObjectKind;

mod error;
mod record;
mod recovery;
mod table;
#[cfg(test)]
mod tests;

pub use error::LedgerError;
pub use record::{LiveObject, RecordIndex, Released, RoundWord, UpdateRecord};
use table::{State, Table, halves, join, word};

/// Longest name of a client, bytes.
pub const MAX_CLIENT: usize = 128;
/// Longest id of an event, bytes.
pub const MAX_ID: usize = 200;
/// Weights of inputs add up to the weight of their sum within this, relative: sums of `f64` in another order.
const WEIGHT_TOLERANCE: f64 = 1e-6;

/// The ledger of one chain; the process that has it is the chain's gateway.
#[derive(Debug)]
pub struct Ledger {
    table: Table,
    free: Vec<u32>,
    by_key: HashMap<ObjectKey, u32>,
    by_name: HashMap<(String, String), u32>,
    /// Updates of the round in the round word.
    admitted: u32,
}

// === impl Ledger: the round ===

impl Ledger {
    /// A new ledger of `capacity` records of 512 bytes, see [`Self::capacity_for`]. The descriptor goes to the store.
    ///
    /// # Errors
    /// A senseless capacity, or the kernel.
    pub fn create(chain: u32, capacity: u32) -> Result<(Self, OwnedFd), LedgerError> {
        let (table, fd) = Table::create(chain, capacity)?;
        Ok((Self::over(table)?, fd))
    }

    /// The ledger that a dead gateway left: what it had begun is undone or finished.
    ///
    /// # Errors
    /// Not this chain's ledger, or one that no gateway can have written.
    pub fn open(fd: impl AsFd, chain: u32) -> Result<Self, LedgerError> {
        let mut ledger = Self::over(Table::open(fd, chain)?)?;
        ledger.finish_round()?;
        Ok(ledger)
    }

    /// Records that rounds of `goal` updates need: each is recorded once, contained in at most one sum of its leaf's, and
    /// kept one round longer; `aggregators` add their final sums, and as many again after deaths.
    #[must_use]
    pub const fn capacity_for(goal: u32, aggregators: u32) -> u32 {
        goal.saturating_mul(3).saturating_add(aggregators.saturating_mul(8)).saturating_add(64)
    }

    /// Chain.
    #[must_use]
    pub const fn chain(&self) -> u32 {
        self.table.chain()
    }

    /// Which round it is.
    #[must_use]
    pub fn round(&self) -> RoundWord {
        self.table.round()
    }

    /// The last committed round.
    #[must_use]
    pub fn committed(&self) -> Option<u32> {
        u32::try_from(self.table.uncommitted().checked_sub(1)?).ok()
    }

    /// Opens `round` until `goal` updates are admitted. Again with the same numbers while open: changes nothing.
    ///
    /// # Errors
    /// The round before is not committed, this one is over, or the ledger has no room for the goal.
    pub fn begin(&mut self, round: u32, goal: u32) -> Result<(), LedgerError> {
        let now = self.round();
        let next = RoundWord { round, open: true, goal };
        if now == next {
            return Ok(());
        }
        if goal == 0 || goal > RoundWord::MAX_GOAL {
            return Err(LedgerError::Field { field: "goal", what: "must be 1 to 2^31-1" });
        }
        if now.open {
            return Err(LedgerError::RoundOpen(now.round));
        }
        if now.goal != 0 && now.round == round && !self.is_over(round) {
            return Err(LedgerError::RoundClosed(round));
        }
        // A goal of zero: no round has begun yet.
        if now.goal != 0 && self.table.uncommitted() <= u64::from(now.round) {
            return Err(LedgerError::Uncommitted(now.round));
        }
        if u64::from(round) < self.table.uncommitted() {
            return Err(LedgerError::WrongRound { asked: round, current: now.round });
        }
        self.room(goal)?;
        self.admitted = 0;
        self.table.set_round(next);
        Ok(())
    }

    /// Closes the round: one store, excluded from admissions by `&mut`. Returns what was admitted. Again: changes nothing.
    pub fn close(&mut self) -> u32 {
        let now = self.round();
        if now.open {
            self.table.set_round(RoundWord { open: false, ..now });
        }
        self.admitted
    }

    /// Updates admitted in the current round.
    #[must_use]
    pub const fn admitted(&self) -> u32 {
        self.admitted
    }

    /// Updates of the current round that were sent to `dst`, contained or not: what a leaf must expect.
    #[must_use]
    pub fn admitted_to(&self, dst: u32) -> u32 {
        let sent = self.updates_in(self.round().round).filter(|index| self.route(*index).0 == dst).count();
        u32::try_from(sent).unwrap_or(u32::MAX)
    }

    /// Ends a closed round for good, one store, and frees what is no longer asked for: all but its updates (they answer
    /// duplicates until the next retire) and what nothing contains, which is returned: the model and, had the round been
    /// committed without them, objects that were not folded. Again for the same round: returns the same.
    ///
    /// # Errors
    /// The round is open, or is not the current one.
    pub fn retire(&mut self, round: u32) -> Result<Vec<Released>, LedgerError> {
        let now = self.round();
        if now.round != round || now.goal == 0 {
            return Err(LedgerError::WrongRound { asked: round, current: now.round });
        }
        if now.open {
            return Err(LedgerError::RoundOpen(round));
        }
        if self.table.uncommitted() <= u64::from(round) {
            self.table.set_uncommitted(u64::from(round) + 1);
        }
        self.collect();
        let left = self.used().filter(|index| self.is_live_in(*index, round));
        Ok(left.map(|index| self.released(index)).collect())
    }

    /// The model of the last committed round: kept, and to be kept by its writer, until the next retire.
    #[must_use]
    pub fn committed_model(&self) -> Option<LiveObject> {
        let round = self.committed()?;
        let mut live = self.used().filter(|index| self.is_live_in(*index, round)).map(|index| self.object(index));
        live.find(|object| object.kind == ObjectKind::Model)
    }
}

// === impl Ledger: updates ===

impl Ledger {
    /// Promises an update: once this returns, it is part of its round. Closes the round when it reaches the goal.
    ///
    /// # Errors
    /// The round is closed or another one, the event was admitted before, the object is recorded already, or no room.
    pub fn admit(&mut self, update: &UpdateRecord) -> Result<RecordIndex, LedgerError> {
        if let Some(index) = self.find(&update.client, &update.id) {
            return Err(LedgerError::Duplicate(index));
        }
        let now = self.round();
        if update.round != now.round {
            return Err(LedgerError::WrongRound { asked: update.round, current: now.round });
        }
        if !now.open {
            return Err(LedgerError::RoundClosed(now.round));
        }
        check_weight(update.weight)?;
        if update.client.len() > MAX_CLIENT {
            return Err(LedgerError::Field { field: "client", what: "longer than 128 bytes" });
        }
        if update.id.len() > MAX_ID {
            return Err(LedgerError::Field { field: "id", what: "longer than 200 bytes" });
        }
        if self.by_key.contains_key(&update.key) {
            return Err(LedgerError::Conflict(update.key));
        }
        let index = self.take()?;
        let facts = LiveObject {
            key: update.key,
            kind: ObjectKind::Update,
            writer: role::GATEWAY,
            round: update.round,
            count: 1,
            weight: update.weight,
            offset: update.offset,
            length: update.length,
            is_final: false,
            sent_to: update.sent_to,
        };
        self.write(index, &facts);
        let text = |bytes: &str| u32::try_from(bytes.len()).unwrap_or(0);
        self.table.set(index, word::TEXT, join(text(&update.client), text(&update.id)));
        self.table.set_bytes(index, word::DIGEST, &update.digest);
        self.table.set_bytes(index, word::CLIENT, update.client.as_bytes());
        self.table.set_bytes(index, word::ID, update.id.as_bytes());
        self.table.set_state(index, State::Admitted);
        self.by_key.insert(update.key, index);
        self.by_name.insert((update.client.clone(), update.id.clone()), index);
        self.admitted += 1;
        if self.admitted >= now.goal {
            self.close();
        }
        Ok(RecordIndex(index))
    }

    /// The event of a client, in this round or the last committed one.
    #[must_use]
    pub fn find(&self, client: &str, id: &str) -> Option<RecordIndex> {
        self.by_name.get(&(client.to_owned(), id.to_owned())).copied().map(RecordIndex)
    }

    /// An update by its index; none once it is forgotten.
    #[must_use]
    pub fn update(&self, index: RecordIndex) -> Option<UpdateRecord> {
        let index = Some(index.0).filter(|index| *index < self.table.capacity())?;
        (self.state(index) == State::Admitted).then(|| self.read_update(index))
    }

    /// The updates of a round: the receipt. Known for the current round and the last committed one.
    pub fn updates_of(&self, round: u32) -> impl Iterator<Item = UpdateRecord> + '_ {
        self.updates_in(round).map(|index| self.read_update(index))
    }

    fn updates_in(&self, round: u32) -> impl Iterator<Item = u32> + '_ {
        self.used().filter(move |index| self.state(*index) == State::Admitted && self.round_of(*index) == round)
    }

    fn read_update(&self, index: u32) -> UpdateRecord {
        let object = self.object(index);
        let (client, id) = halves(self.table.get(index, word::TEXT));
        let text = |word, len: u32, max: usize| {
            let len = usize::try_from(len).unwrap_or(max).min(max);
            String::from_utf8_lossy(&self.table.bytes(index, word, len)).into_owned()
        };
        let mut digest = [0; 32];
        digest.copy_from_slice(&self.table.bytes(index, word::DIGEST, 32));
        UpdateRecord {
            client: text(word::CLIENT, client, MAX_CLIENT),
            id: text(word::ID, id, MAX_ID),
            digest,
            weight: object.weight,
            key: object.key,
            offset: object.offset,
            length: object.length,
            sent_to: object.sent_to,
            round: object.round,
        }
    }
}

// === impl Ledger: sums ===

impl Ledger {
    /// Records that `sum` stands for `inputs`: all of them in one store, or none. Returns what may be recycled.
    ///
    /// Again with the same sum: changes nothing and returns the same, but a sum said to be final now becomes so.
    ///
    /// # Errors
    /// Any input that the writer does not hold, or that is contained elsewhere; numbers that do not add up; no room.
    pub fn seal(&mut self, sum: &LiveObject, inputs: &[ObjectKey]) -> Result<Vec<Released>, LedgerError> {
        let now = self.round();
        if sum.round != now.round || self.is_over(sum.round) {
            return Err(LedgerError::WrongRound { asked: sum.round, current: now.round });
        }
        check_sum(sum)?;
        if sum.is_final && now.open {
            return Err(LedgerError::RoundOpen(now.round));
        }
        if let Some(index) = self.by_key.get(&sum.key).copied() {
            return self.seal_again(index, sum, inputs);
        }
        let found = self.inputs(sum, inputs)?;
        let index = self.take()?;
        self.write(index, sum);
        self.table.set_state(index, State::Prepared);
        for input in &found {
            self.table.set(*input, word::CONTAINED, u64::from(index) + 1);
        }
        self.table.set_state(index, State::Sealed);
        self.by_key.insert(sum.key, index);
        Ok(found.into_iter().map(|input| self.released(input)).collect())
    }

    /// A repetition, or the writer's word that what it sealed before was its last.
    fn seal_again(&mut self, index: u32, sum: &LiveObject, inputs: &[ObjectKey]) -> Result<Vec<Released>, LedgerError> {
        let is = self.object(index);
        let same = LiveObject { is_final: is.is_final, sent_to: is.sent_to, ..*sum } == is;
        if !same || self.state(index) != State::Sealed {
            return Err(LedgerError::Conflict(sum.key));
        }
        let mut found = Vec::with_capacity(inputs.len());
        for key in inputs {
            let input = self.by_key.get(key).copied().ok_or(LedgerError::Unknown(*key))?;
            if self.container(input) != Some(index) {
                return Err(LedgerError::Conflict(*key));
            }
            found.push(self.released(input));
        }
        if sum.is_final && !is.is_final {
            if self.container(index).is_some() {
                return Err(LedgerError::Conflict(sum.key));
            }
            self.table.set(index, word::ROUTE, route(sum.sent_to, true));
        }
        Ok(found)
    }

    /// The records of the inputs, if `sum` may contain them.
    fn inputs(&self, sum: &LiveObject, inputs: &[ObjectKey]) -> Result<Vec<u32>, LedgerError> {
        let mut found = Vec::with_capacity(inputs.len());
        let (mut count, mut weight) = (0_u64, 0.0);
        for key in inputs {
            let known = self.by_key.get(key).copied().filter(|index| self.round_of(*index) == sum.round);
            let index = known.ok_or(LedgerError::Unknown(*key))?;
            if let Some(container) = self.container(index) {
                return Err(LedgerError::Contained { input: *key, container: self.table.key(container) });
            }
            let object = self.object(index);
            if object.sent_to != sum.writer {
                return Err(LedgerError::NotHolder { input: *key, holder: object.sent_to, sender: sum.writer });
            }
            count += u64::from(object.count);
            weight += object.weight;
            found.push(index);
        }
        let mut once = found.clone();
        once.sort_unstable();
        once.dedup();
        if once.len() != found.len() {
            return Err(LedgerError::Field { field: "inputs", what: "one is listed twice" });
        }
        if u64::from(sum.count) != count {
            return Err(LedgerError::Count { said: sum.count, inputs: count });
        }
        if (sum.weight - weight).abs() > WEIGHT_TOLERANCE * weight {
            return Err(LedgerError::Weight { said: sum.weight, inputs: weight });
        }
        Ok(found)
    }

    /// Hands an object to another role, one store.
    ///
    /// # Errors
    /// Unknown in this round, or contained already.
    pub fn set_sent_to(&mut self, key: ObjectKey, dst: u32) -> Result<(), LedgerError> {
        let round = self.round().round;
        let known = self.by_key.get(&key).copied();
        let known = known.filter(|index| self.round_of(*index) == round && !self.is_over(round));
        let index = known.ok_or(LedgerError::Unknown(key))?;
        if let Some(container) = self.container(index) {
            return Err(LedgerError::Contained { input: key, container: self.table.key(container) });
        }
        let (_, is_final) = self.route(index);
        self.table.set(index, word::ROUTE, route(dst, is_final));
        Ok(())
    }

    /// The objects of the current round that no other contains; none once it is committed. Together they
    /// contain every admitted update exactly once.
    pub fn live(&self) -> impl Iterator<Item = LiveObject> + '_ {
        let round = self.round().round;
        let over = self.is_over(round);
        let live = self.used().filter(move |index| !over && self.is_live_in(*index, round));
        live.map(|index| self.object(index))
    }

    /// What is recorded of an object, contained or not.
    #[must_use]
    pub fn get(&self, key: ObjectKey) -> Option<LiveObject> {
        self.by_key.get(&key).map(|index| self.object(*index))
    }

    /// Whether another object contains it.
    #[must_use]
    pub fn is_contained(&self, key: ObjectKey) -> bool {
        self.by_key.get(&key).is_some_and(|index| self.container(*index).is_some())
    }
}

// === impl Ledger: records ===

impl Ledger {
    /// In the order of records, so that equal ledgers tell equal things.
    fn used(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.table.capacity()).filter(|index| self.state(*index) != State::Free)
    }

    fn state(&self, index: u32) -> State {
        State::from_word(self.table.get(index, word::STATE)).unwrap_or(State::Free)
    }

    fn round_of(&self, index: u32) -> u32 {
        halves(self.table.get(index, word::ROUND)).0
    }

    fn is_over(&self, round: u32) -> bool {
        u64::from(round) < self.table.uncommitted()
    }

    fn is_live_in(&self, index: u32, round: u32) -> bool {
        self.round_of(index) == round && self.container(index).is_none()
    }

    fn container(&self, index: u32) -> Option<u32> {
        u32::try_from(self.table.get(index, word::CONTAINED).checked_sub(1)?).ok()
    }

    fn route(&self, index: u32) -> (u32, bool) {
        let (sent_to, is_final) = halves(self.table.get(index, word::ROUTE));
        (sent_to, is_final != 0)
    }

    fn object(&self, index: u32) -> LiveObject {
        let (round, count) = halves(self.table.get(index, word::ROUND));
        let (kind, writer) = halves(self.table.get(index, word::KIND));
        let (sent_to, is_final) = self.route(index);
        LiveObject {
            key: self.table.key(index),
            // Records are checked when a ledger is opened.
            kind: ObjectKind::from_code(kind.into()).unwrap_or(ObjectKind::Update),
            writer,
            round,
            count,
            weight: f64::from_bits(self.table.get(index, word::WEIGHT)),
            offset: self.table.get(index, word::OFFSET),
            length: self.table.get(index, word::LENGTH),
            is_final,
            sent_to,
        }
    }

    fn released(&self, index: u32) -> Released {
        let object = self.object(index);
        Released { key: object.key, kind: object.kind, writer: object.writer }
    }

    fn room(&self, asked: u32) -> Result<(), LedgerError> {
        let (free, capacity) = (u32::try_from(self.free.len()).unwrap_or(0), self.table.capacity());
        let fits = free >= asked;
        fits.then_some(()).ok_or(LedgerError::Full { used: capacity - free, capacity, asked })
    }

    fn take(&mut self) -> Result<u32, LedgerError> {
        self.room(1)?;
        self.free.pop().ok_or(LedgerError::Capacity(0))
    }

    /// Writes all but the state of a free record, whose words nobody reads until the state says so.
    fn write(&mut self, index: u32, object: &LiveObject) {
        let words = [
            (word::CONTAINED, 0),
            (word::ROUTE, route(object.sent_to, object.is_final)),
            (word::ROUND, join(object.round, object.count)),
            (word::KIND, join(object.kind as u32, object.writer)),
            (word::KEY, join(object.key.segment, object.key.slot)),
            (word::GENERATION, object.key.generation),
            (word::OFFSET, object.offset),
            (word::LENGTH, object.length),
            (word::WEIGHT, object.weight.to_bits()),
        ];
        for (word, value) in words {
            self.table.set(index, word, value);
        }
    }
}

const fn route(sent_to: u32, is_final: bool) -> u64 {
    join(sent_to, is_final as u32)
}

fn check_weight(weight: f64) -> Result<(), LedgerError> {
    let sound = weight.is_finite() && weight > 0.0;
    sound.then_some(()).ok_or(LedgerError::Field { field: "weight", what: "not finite and positive" })
}

fn check_sum(sum: &LiveObject) -> Result<(), LedgerError> {
    check_weight(sum.weight)?;
    if sum.kind == ObjectKind::Update || sum.count == 0 {
        return Err(LedgerError::Field { field: "kind", what: "not a sum or a model" });
    }
    if !sum.is_final && (sum.sent_to != sum.writer || sum.kind == ObjectKind::Model) {
        return Err(LedgerError::Field { field: "sent_to", what: "what is not final is held by its writer" });
    }
    Ok(())
}
