//! Every store is a place to die: after each one the file is copied, opened anew, and must show the state before the
//! operation or the one after it, never a third.

use std::sync::{Arc, Mutex};

use lifl_ebpf_common::descriptor::role::{GATEWAY, LEAF, MIDDLE, TOP};
use proptest::prelude::*;

use super::*;
use crate::mapping;

mod refusals;

const CHAIN: u32 = 7;
const CAPACITY: u32 = 40;

type Snapshots = Arc<Mutex<Vec<Vec<u8>>>>;

/// Called with the file's bytes after each store.
pub(super) struct Watch(pub(super) Box<Observer>);

type Observer = dyn FnMut(&[u8]) + Send;

#[derive(Clone, Debug)]
enum Op {
    Begin(u32, u32),
    Admit(UpdateRecord),
    Seal(LiveObject, Vec<ObjectKey>),
    Move(ObjectKey, u32),
    Close,
    Retire(u32),
}

/// All that a caller can see.
#[derive(Debug, PartialEq)]
struct Seen {
    round: RoundWord,
    committed: Option<u32>,
    admitted: u32,
    live: Vec<LiveObject>,
    model: Option<LiveObject>,
    /// With whether it is contained.
    updates: Vec<(UpdateRecord, bool)>,
    free: usize,
}

/// Plays gateway and aggregators, checking every store.
struct Play {
    ledger: Ledger,
    snapshots: Snapshots,
    next: u32,
    checked: usize,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

fn key(slot: u32) -> ObjectKey {
    ObjectKey { segment: slot % 3, slot, generation: u64::from(slot) * 2 + 2 }
}

fn update(n: u32, round: u32, sent_to: u32) -> UpdateRecord {
    UpdateRecord {
        client: format!("client-{n}"),
        id: format!("event-{n}"),
        digest: [u8::try_from(n % 251).unwrap(); 32],
        weight: 1.0 + f64::from(n % 5) * 0.25,
        key: key(n),
        offset: 4096,
        length: 64,
        sent_to,
        round,
    }
}

fn seen(ledger: &Ledger) -> Seen {
    let round = ledger.round();
    let mut live: Vec<_> = ledger.live().collect();
    live.sort_by_key(|object| object.key);
    let mut updates: Vec<_> = ledger.updates_of(round.round).collect();
    if let Some(last) = ledger.committed().filter(|last| *last != round.round) {
        updates.extend(ledger.updates_of(last));
    }
    updates.sort_by_key(|update| update.key);
    let updates = updates.into_iter().map(|update| (ledger.is_contained(update.key), update));
    let updates = updates.map(|(contained, update)| (update, contained)).collect();
    assert_eq!(ledger.by_key.len() + ledger.free.len(), ledger.table.capacity() as usize, "records leak");
    Seen {
        round,
        committed: ledger.committed(),
        admitted: ledger.admitted(),
        live,
        model: ledger.committed_model(),
        updates,
        free: ledger.free.len(),
    }
}

/// Every admitted update of the round is contained in exactly one live object, and the numbers of those are exact.
fn check_sums(ledger: &Ledger) {
    let round = ledger.round().round;
    if ledger.is_over(round) {
        return;
    }
    let mut inside: HashMap<ObjectKey, (u32, f64)> = HashMap::new();
    for index in ledger.updates_in(round) {
        let mut root = index;
        while let Some(container) = ledger.container(root) {
            root = container;
        }
        let sum = inside.entry(ledger.table.key(root)).or_default();
        sum.0 += 1;
        sum.1 += ledger.object(index).weight;
    }
    let live: Vec<_> = ledger.live().collect();
    assert_eq!(live.len(), inside.len());
    for object in live {
        let (count, weight) = inside[&object.key];
        assert_eq!(count, object.count);
        assert!((weight - object.weight).abs() < 1e-9);
    }
    assert_eq!(ledger.live().map(|object| object.count).sum::<u32>(), ledger.admitted());
}

/// A file with these bytes, as a dead gateway leaves it.
fn file(bytes: &[u8]) -> OwnedFd {
    let fd = mapping::memfd("lifl-test", bytes.len()).unwrap();
    assert_eq!(rustix::io::pwrite(&fd, bytes, 0).unwrap(), bytes.len());
    mapping::seal(&fd, mapping::FIXED_SIZE).unwrap();
    fd
}

fn watch(table: &mut Table) -> Snapshots {
    let snapshots = Snapshots::default();
    let sink = Arc::clone(&snapshots);
    table.after_store = Some(Watch(Box::new(move |bytes| sink.lock().unwrap().push(bytes.to_vec()))));
    snapshots
}

/// Opens, dying after each store of the recovery too; whatever it takes, the result is the same.
fn reopen(bytes: &[u8]) -> Ledger {
    let mut table = Table::open(file(bytes), CHAIN).unwrap();
    let snapshots = watch(&mut table);
    let mut ledger = Ledger::over(table).unwrap();
    ledger.finish_round().unwrap();
    let expected = seen(&ledger);
    for bytes in snapshots.lock().unwrap().iter() {
        assert_eq!(seen(&Ledger::open(file(bytes), CHAIN).unwrap()), expected, "second death, during recovery");
    }
    ledger
}

fn apply(ledger: &mut Ledger, op: &Op) -> Result<Vec<Released>, LedgerError> {
    match op {
        Op::Begin(round, goal) => ledger.begin(*round, *goal)?,
        Op::Admit(update) => drop(ledger.admit(update)?),
        Op::Seal(sum, inputs) => return ledger.seal(sum, inputs),
        Op::Move(key, dst) => ledger.set_sent_to(*key, *dst)?,
        Op::Close => drop(ledger.close()),
        Op::Retire(round) => return ledger.retire(*round),
    }
    Ok(Vec::new())
}

// === impl Play ===

impl Play {
    fn new(capacity: u32) -> Self {
        let (mut ledger, _) = Ledger::create(CHAIN, capacity).unwrap();
        let snapshots = watch(&mut ledger.table);
        Self { ledger, snapshots, next: 0, checked: 0 }
    }

    fn key(&mut self) -> ObjectKey {
        self.next += 1;
        key(self.next)
    }

    /// Applies `op`, then dies after each of its stores.
    fn step(&mut self, op: &Op) {
        let before = seen(&self.ledger);
        self.snapshots.lock().unwrap().clear();
        let result = apply(&mut self.ledger, op).unwrap();
        let after = seen(&self.ledger);
        check_sums(&self.ledger);
        let mut done = false;
        for bytes in std::mem::take(&mut *self.snapshots.lock().unwrap()) {
            let mut ledger = reopen(&bytes);
            check_sums(&ledger);
            let now = seen(&ledger);
            assert!(now == after || (now == before && !done), "{op:?} shows a third state: {now:#?}");
            done = now == after;
            // The peer, unanswered, repeats; or the gateway reads the same descriptor again.
            match apply(&mut ledger, op) {
                Ok(again) => assert_eq!(again, result),
                Err(LedgerError::Duplicate(_)) => assert!(matches!(op, Op::Admit(_)) && done),
                Err(LedgerError::RoundOpen(_) | LedgerError::RoundClosed(_)) => {
                    assert!(matches!(op, Op::Begin(..)) && done);
                }
                Err(error) => panic!("{op:?} again: {error}"),
            }
            assert_eq!(seen(&ledger), after);
            self.checked += 1;
        }
    }

    fn begin(&mut self, goal: u32) {
        let round = self.ledger.committed().map_or(3, |last| last + 1);
        self.step(&Op::Begin(round, goal));
    }

    fn admit(&mut self, leaf: u32) {
        self.next += 1;
        let update = update(self.next, self.ledger.round().round, LEAF + leaf);
        if self.ledger.round().open {
            self.step(&Op::Admit(update));
        } else {
            assert!(matches!(self.ledger.admit(&update), Err(LedgerError::RoundClosed(_))));
        }
    }

    /// `writer` folds up to `most` of what it holds, or, with nothing new, only says that it is final.
    fn fold(&mut self, writer: u32, kind: ObjectKind, parent: Option<u32>, most: usize) {
        let mut held: Vec<_> = self.ledger.live().filter(|object| object.sent_to == writer).collect();
        held.sort_by_key(|object| (object.writer != writer, object.key));
        held.truncate(most);
        let Some(first) = held.first() else { return };
        let alone = held.len() == 1 && first.writer == writer;
        if alone && parent.is_none() {
            return;
        }
        let key = if alone { first.key } else { self.key() };
        let sum = LiveObject {
            key,
            kind,
            writer,
            round: self.ledger.round().round,
            count: held.iter().map(|object| object.count).sum(),
            weight: held.iter().map(|object| object.weight).sum(),
            offset: if alone { first.offset } else { 8192 },
            length: if alone { first.length } else { 128 },
            is_final: parent.is_some(),
            sent_to: parent.unwrap_or(writer),
        };
        let inputs = if alone { Vec::new() } else { held.iter().map(|object| object.key).collect() };
        self.step(&Op::Seal(sum, inputs));
    }

    fn finish(&mut self) {
        self.step(&Op::Close);
        let round = self.ledger.round().round;
        let admitted = self.ledger.admitted();
        for leaf in LEAF..LEAF + 2 {
            self.fold(leaf, ObjectKind::Partial, Some(MIDDLE), usize::MAX);
        }
        self.fold(MIDDLE, ObjectKind::Partial, Some(TOP), usize::MAX);
        self.fold(TOP, ObjectKind::Model, Some(GATEWAY), usize::MAX);
        let live: Vec<_> = self.ledger.live().collect();
        assert_eq!(live.iter().map(|object| object.count).sum::<u32>(), admitted);
        assert_eq!(live.len(), usize::from(admitted > 0), "the model alone remains");
        self.step(&Op::Retire(round));
        assert_eq!(self.ledger.committed_model(), live.first().copied());
        assert_eq!(self.ledger.updates_of(round).count(), admitted as usize);
    }
}

#[test]
fn three_rounds_die_after_every_store() {
    let mut play = Play::new(CAPACITY);
    for _ in 0..3 {
        play.begin(6);
        for n in 0..3 {
            play.admit(n % 2);
            play.admit(n % 2);
            play.fold(LEAF + n % 2, ObjectKind::Partial, None, 3);
        }
        assert!(!play.ledger.round().open, "the sixth admission closes");
        play.finish();
    }
    assert!(play.checked > 500, "only {} deaths", play.checked);
}

#[test]
fn a_ledger_of_the_advised_capacity_is_never_full() {
    let mut play = Play::new(Ledger::capacity_for(4, 4));
    for _ in 0..4 {
        play.begin(4);
        for n in 0..4 {
            play.admit(n % 2);
            play.fold(LEAF + n % 2, ObjectKind::Partial, None, 2);
        }
        play.finish();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_course_of_rounds_is_atomic_in_every_step(
        course in prop::collection::vec((0_u8..8, 0_u32..2, 1_usize..4), 1..28),
        goal in 1_u32..9,
    ) {
        let mut play = Play::new(CAPACITY);
        play.begin(goal);
        for (what, leaf, most) in course {
            match what {
                0..=3 => play.admit(leaf),
                4 | 5 => play.fold(LEAF + leaf, ObjectKind::Partial, None, most),
                6 => {
                    let mut free: Vec<_> = play.ledger.live().filter(|o| o.kind == ObjectKind::Update).collect();
                    free.sort_by_key(|object| object.key);
                    if let Some(object) = free.first() {
                        play.step(&Op::Move(object.key, LEAF + leaf));
                    }
                }
                _ if most == 1 => {
                    play.finish();
                    play.begin(goal);
                }
                _ => {}
            }
        }
        play.finish();
    }

    #[test]
    fn any_bytes_are_opened_or_refused(
        flips in prop::collection::vec((0_usize..(4096 + 512 * 8) / 8, any::<u64>(), any::<bool>()), 1..6),
    ) {
        let mut play = Play::new(8);
        play.begin(2);
        play.admit(0);
        play.admit(1);
        play.fold(LEAF, ObjectKind::Partial, None, 2);
        let table = &play.ledger.table;
        let mut bytes: Vec<u8> = table.all().to_vec();
        for (word, value, small) in flips {
            let value = if small { value % 8 } else { value };
            bytes[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Ok(ledger) = Ledger::open(file(&bytes), CHAIN) {
            let _ = (ledger.live().count(), ledger.committed_model(), ledger.admitted_to(LEAF));
            let _ = ledger.updates_of(ledger.round().round).map(|update| update.client.len()).sum::<usize>();
        }
    }
}
