//! What a gateway finds when it opens a ledger, and how old rounds make room.

use std::collections::HashMap;

use super::{
    Ledger, LedgerError, MAX_CLIENT, MAX_ID, RoundWord,
    table::{State, Table, halves, word},
};
use crate::object::ObjectKind;

// === impl Ledger ===

impl Ledger {
    /// Builds the indexes; undoes what was prepared; frees what earlier rounds left.
    pub(super) fn over(table: Table) -> Result<Self, LedgerError> {
        let mut ledger = Self { table, free: Vec::new(), by_key: HashMap::new(), by_name: HashMap::new(), admitted: 0 };
        ledger.undo_prepared();
        for index in 0..ledger.table.capacity() {
            ledger.adopt(index)?;
        }
        for index in ledger.by_key.values() {
            ledger.check_container(*index)?;
        }
        // Low indexes first, as in a new ledger.
        ledger.free.reverse();
        ledger.collect();
        let round = ledger.round().round;
        ledger.admitted = u32::try_from(ledger.updates_in(round).count()).unwrap_or(u32::MAX);
        Ok(ledger)
    }

    /// Finishes the closing that a dead gateway's last admission began.
    pub(super) fn finish_round(&mut self) -> Result<(), LedgerError> {
        let RoundWord { round, open, goal } = self.round();
        if open && self.is_over(round) {
            return Err(LedgerError::Corrupt { index: 0, what: "a round is open and committed" });
        }
        if open && self.admitted >= goal {
            self.close();
        }
        Ok(())
    }

    /// A sum that was not sealed contains nothing: first its inputs forget it, then it is gone. Dying in between, and again,
    /// leaves it to the next.
    fn undo_prepared(&mut self) {
        let prepared = |table: &Table, index| table.get(index, word::STATE) == State::Prepared as u64;
        let all = 0..self.table.capacity();
        let undone: Vec<u32> = all.clone().filter(|index| prepared(&self.table, *index)).collect();
        if undone.is_empty() {
            return;
        }
        for index in all {
            // Updates kept of a committed round may name a record that has since become another one.
            let current = self.state(index) != State::Free && !self.is_over(self.round_of(index));
            if current && self.container(index).is_some_and(|container| undone.binary_search(&container).is_ok()) {
                self.table.set(index, word::CONTAINED, 0);
            }
        }
        for index in undone {
            self.table.set_state(index, State::Free);
        }
    }

    /// Enters a record into the indexes, if it is one.
    fn adopt(&mut self, index: u32) -> Result<(), LedgerError> {
        let corrupt = |what| LedgerError::Corrupt { index, what };
        let state = State::from_word(self.table.get(index, word::STATE)).ok_or_else(|| corrupt("unknown state"))?;
        if state == State::Free {
            self.free.push(index);
            return Ok(());
        }
        let (kind, _) = halves(self.table.get(index, word::KIND));
        let kind = ObjectKind::from_code(kind.into()).ok_or_else(|| corrupt("unknown kind"))?;
        if (kind == ObjectKind::Update) != (state == State::Admitted) {
            return Err(corrupt("kind and state contradict each other"));
        }
        let weight = self.object(index).weight;
        if !(weight.is_finite() && weight > 0.0) {
            return Err(corrupt("weight is not finite and positive"));
        }
        if self.by_key.insert(self.table.key(index), index).is_some() {
            return Err(corrupt("its object has another record"));
        }
        if state == State::Admitted {
            let name = self.name(index).ok_or_else(|| corrupt("client or id is not a text that fits"))?;
            if self.by_name.insert(name, index).is_some() {
                return Err(corrupt("its event has another record"));
            }
        }
        Ok(())
    }

    fn name(&self, index: u32) -> Option<(String, String)> {
        let (client, id) = halves(self.table.get(index, word::TEXT));
        let text = |word, len: u32, max: usize| {
            let len = usize::try_from(len).ok().filter(|len| *len <= max)?;
            String::from_utf8(self.table.bytes(index, word, len)).ok()
        };
        Some((text(word::CLIENT, client, MAX_CLIENT)?, text(word::ID, id, MAX_ID)?))
    }

    /// Containers of the round that is on must be sums of that round.
    fn check_container(&self, index: u32) -> Result<(), LedgerError> {
        let round = self.round_of(index);
        let named = self.table.get(index, word::CONTAINED);
        if named == 0 || self.is_over(round) {
            return Ok(());
        }
        let container = self.container(index).filter(|container| *container < self.table.capacity());
        let sum = container.filter(|sum| self.state(*sum) == State::Sealed && self.round_of(*sum) == round);
        match sum {
            Some(sum) if sum != index => Ok(()),
            _ => Err(LedgerError::Corrupt { index, what: "contained in what is no sum of its round" }),
        }
    }

    /// Frees what nobody asks for any more: everything of rounds before the last committed one, and of that one the sums
    /// that others contain. Each record goes by one store; what a death leaves, the next call frees.
    pub(super) fn collect(&mut self) {
        let Some(last) = self.committed() else { return };
        let obsolete = |ledger: &Self, index| {
            let round = ledger.round_of(index);
            let sum = ledger.state(index) == State::Sealed;
            round < last || (round == last && sum && ledger.container(index).is_some())
        };
        let gone: Vec<u32> = self.used().filter(|index| obsolete(self, *index)).collect();
        for index in gone {
            self.by_key.remove(&self.table.key(index));
            if let Some(name) = self.name(index).filter(|_| self.state(index) == State::Admitted) {
                self.by_name.remove(&name);
            }
            self.table.set_state(index, State::Free);
            self.free.push(index);
        }
    }
}
