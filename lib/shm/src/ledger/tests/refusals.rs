//! What the ledger refuses, and that a refusal changes nothing.

use super::*;

const ROUND: u32 = 3;

/// A round with two updates for leaf 0 and one for leaf 1, open.
fn ledger() -> Ledger {
    let (mut ledger, _) = Ledger::create(CHAIN, 16).unwrap();
    ledger.begin(ROUND, 10).unwrap();
    for (n, leaf) in [(1, 0), (2, 0), (3, 1)] {
        ledger.admit(&update(n, ROUND, LEAF + leaf)).unwrap();
    }
    ledger
}

fn sum(slot: u32, inputs: &[u32]) -> LiveObject {
    LiveObject {
        key: key(slot),
        kind: ObjectKind::Partial,
        writer: LEAF,
        round: ROUND,
        count: u32::try_from(inputs.len()).unwrap(),
        weight: inputs.iter().map(|n| update(*n, ROUND, LEAF).weight).sum(),
        offset: 0,
        length: 64,
        is_final: false,
        sent_to: LEAF,
    }
}

fn keys(slots: &[u32]) -> Vec<ObjectKey> {
    slots.iter().map(|slot| key(*slot)).collect()
}

#[track_caller]
fn refused(ledger: &mut Ledger, op: &Op) -> LedgerError {
    let before = seen(ledger);
    let error = apply(ledger, op).unwrap_err();
    assert_eq!(seen(ledger), before, "a refusal changed something");
    error
}

#[test]
fn updates() {
    let mut ledger = ledger();
    let admit = |ledger: &mut Ledger, update: UpdateRecord| refused(ledger, &Op::Admit(update));
    let fine = update(9, ROUND, LEAF);

    let index = ledger.find("client-1", "event-1").unwrap();
    assert_eq!(ledger.update(index), Some(update(1, ROUND, LEAF)));
    let twice = UpdateRecord { client: "client-1".into(), id: "event-1".into(), ..fine.clone() };
    assert!(matches!(admit(&mut ledger, twice), LedgerError::Duplicate(found) if found == index));
    let same_object = UpdateRecord { key: key(1), ..fine.clone() };
    assert!(matches!(admit(&mut ledger, same_object), LedgerError::Conflict(_)));
    let late = UpdateRecord { round: ROUND - 1, ..fine.clone() };
    assert!(matches!(admit(&mut ledger, late), LedgerError::WrongRound { asked: 2, current: 3 }));
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let bad = UpdateRecord { weight, ..fine.clone() };
        assert!(matches!(admit(&mut ledger, bad), LedgerError::Field { field: "weight", .. }));
    }
    let long = UpdateRecord { client: "x".repeat(129), ..fine.clone() };
    assert!(matches!(admit(&mut ledger, long), LedgerError::Field { field: "client", .. }));
    let long = UpdateRecord { id: "x".repeat(201), ..fine.clone() };
    assert!(matches!(admit(&mut ledger, long), LedgerError::Field { field: "id", .. }));
    let full_width = UpdateRecord { client: "ü".repeat(64), id: "y".repeat(200), ..fine.clone() };
    let index = ledger.admit(&full_width).unwrap();
    assert_eq!(ledger.update(index), Some(full_width));
    assert_eq!((ledger.admitted_to(LEAF), ledger.admitted_to(LEAF + 1)), (3, 1));

    assert_eq!(ledger.close(), 4);
    let late = UpdateRecord { key: key(10), ..fine };
    assert!(matches!(admit(&mut ledger, late), LedgerError::RoundClosed(ROUND)));
}

#[test]
fn inputs_come_from_a_current_holder_only() {
    let mut ledger = ledger();
    let mut seal = |sum: LiveObject, inputs: &[u32]| refused(&mut ledger, &Op::Seal(sum, keys(inputs)));
    assert!(matches!(seal(sum(20, &[1]), &[99]), LedgerError::Unknown(_)));
    let other = seal(sum(20, &[3]), &[3]);
    assert!(matches!(other, LedgerError::NotHolder { holder, sender: LEAF, .. } if holder == LEAF + 1));
    assert!(matches!(seal(sum(20, &[1, 1]), &[1, 1]), LedgerError::Field { field: "inputs", .. }));
    assert!(matches!(seal(sum(20, &[1]), &[1, 2]), LedgerError::Count { said: 1, inputs: 2 }));
    assert!(matches!(seal(sum(1, &[2]), &[2]), LedgerError::Conflict(_)), "an update's key");
    let heavy = LiveObject { weight: 1e6, ..sum(20, &[1]) };
    assert!(matches!(seal(heavy, &[1]), LedgerError::Weight { .. }));
    assert!(matches!(seal(sum(20, &[]), &[]), LedgerError::Field { .. }), "a sum of nothing");
    let early = LiveObject { is_final: true, sent_to: MIDDLE, ..sum(20, &[1]) };
    assert!(matches!(seal(early, &[1]), LedgerError::RoundOpen(ROUND)));
    let away = LiveObject { sent_to: MIDDLE, ..sum(20, &[1]) };
    assert!(matches!(seal(away, &[1]), LedgerError::Field { field: "sent_to", .. }));
    let old = LiveObject { round: ROUND - 1, ..sum(20, &[1]) };
    assert!(matches!(seal(old, &[1]), LedgerError::WrongRound { .. }));

    let released = ledger.seal(&sum(20, &[1]), &keys(&[1])).unwrap();
    assert_eq!(released, [Released { key: key(1), kind: ObjectKind::Update, writer: GATEWAY }]);
    let again = refused(&mut ledger, &Op::Seal(sum(21, &[1]), keys(&[1])));
    assert!(matches!(again, LedgerError::Contained { container, .. } if container == key(20)));
    let moved = refused(&mut ledger, &Op::Move(key(1), MIDDLE));
    assert!(matches!(moved, LedgerError::Contained { .. }));
    assert!(ledger.is_contained(key(1)) && !ledger.is_contained(key(2)));
}

#[test]
fn a_repeated_sum_changes_nothing_and_a_changed_one_is_refused() {
    let mut ledger = ledger();
    let first = ledger.seal(&sum(20, &[1, 2]), &keys(&[1, 2])).unwrap();
    let before = seen(&ledger);
    assert_eq!(ledger.seal(&sum(20, &[1, 2]), &keys(&[1, 2])).unwrap(), first);
    assert_eq!(seen(&ledger), before);
    let lighter = LiveObject { weight: 1.0, ..sum(20, &[1, 2]) };
    assert!(matches!(refused(&mut ledger, &Op::Seal(lighter, keys(&[1, 2]))), LedgerError::Conflict(_)));
    let more = refused(&mut ledger, &Op::Seal(sum(20, &[1, 2]), keys(&[1, 2, 3])));
    assert!(matches!(more, LedgerError::Conflict(other) if other == key(3)));

    // Everything was folded before the round closed: the last word brings no inputs.
    ledger.close();
    let last = LiveObject { is_final: true, sent_to: MIDDLE, ..sum(20, &[1, 2]) };
    assert_eq!(ledger.seal(&last, &[]).unwrap(), []);
    assert_eq!(ledger.get(key(20)).map(|object| (object.is_final, object.sent_to)), Some((true, MIDDLE)));
    // An old descriptor, read again, does not take that back.
    ledger.seal(&sum(20, &[1, 2]), &keys(&[1, 2])).unwrap();
    assert_eq!(ledger.get(key(20)).map(|object| (object.is_final, object.sent_to)), Some((true, MIDDLE)));
}

#[test]
fn rounds() {
    let (mut ledger, _) = Ledger::create(CHAIN, 16).unwrap();
    let mut no = |op: Op| refused(&mut ledger, &op);
    assert!(matches!(no(Op::Retire(0)), LedgerError::WrongRound { .. }), "no round has begun");
    assert!(matches!(no(Op::Admit(update(1, 0, LEAF))), LedgerError::RoundClosed(0)));
    assert!(matches!(no(Op::Begin(3, 0)), LedgerError::Field { field: "goal", .. }));
    assert!(matches!(no(Op::Begin(3, 17)), LedgerError::Full { used: 0, capacity: 16, asked: 17 }));

    ledger.begin(ROUND, 2).unwrap();
    ledger.begin(ROUND, 2).unwrap();
    let mut no = |op: Op| refused(&mut ledger, &op);
    assert!(matches!(no(Op::Begin(4, 2)), LedgerError::RoundOpen(ROUND)));
    assert!(matches!(no(Op::Retire(ROUND)), LedgerError::RoundOpen(ROUND)));
    ledger.admit(&update(1, ROUND, TOP)).unwrap();
    ledger.close();
    let mut no = |op: Op| refused(&mut ledger, &op);
    assert!(matches!(no(Op::Begin(4, 2)), LedgerError::Uncommitted(ROUND)));
    assert!(matches!(no(Op::Begin(ROUND, 2)), LedgerError::RoundClosed(ROUND)), "closed is closed");
    assert!(matches!(no(Op::Retire(4)), LedgerError::WrongRound { .. }));

    let left = ledger.retire(ROUND).unwrap();
    assert_eq!(left.len(), 1, "an update that was never folded is told");
    assert_eq!(ledger.live().count(), 0);
    let mut no = |op: Op| refused(&mut ledger, &op);
    assert!(matches!(no(Op::Begin(ROUND, 2)), LedgerError::WrongRound { .. }), "committed is over");
    assert!(matches!(no(Op::Begin(2, 2)), LedgerError::WrongRound { .. }));
    assert!(matches!(no(Op::Seal(sum(20, &[1]), keys(&[1]))), LedgerError::WrongRound { .. }));
    assert!(matches!(no(Op::Move(key(1), LEAF)), LedgerError::Unknown(_)));

    // A repetition in the next round still finds its receipt; one round later it is forgotten.
    ledger.begin(4, 2).unwrap();
    let again = UpdateRecord { key: key(5), ..update(1, 4, TOP) };
    assert!(matches!(refused(&mut ledger, &Op::Admit(again)), LedgerError::Duplicate(_)));
    let foreign = refused(&mut ledger, &Op::Seal(LiveObject { round: 4, ..sum(20, &[1]) }, keys(&[1])));
    assert!(matches!(foreign, LedgerError::Unknown(_)), "an input of another round");
    ledger.close();
    ledger.retire(4).unwrap();
    assert_eq!(ledger.find("client-1", "event-1"), None);
    assert_eq!(ledger.free.len(), 16);
}

#[test]
fn full() {
    let (mut ledger, _) = Ledger::create(CHAIN, 4).unwrap();
    ledger.begin(ROUND, 4).unwrap();
    for n in 1..4 {
        ledger.admit(&update(n, ROUND, LEAF)).unwrap();
    }
    ledger.seal(&sum(20, &[1]), &keys(&[1])).unwrap();
    let error = refused(&mut ledger, &Op::Admit(update(5, ROUND, LEAF)));
    assert_eq!(error.to_string(), "ledger is full: 4 of 4 records used, 1 more asked");
    let error = refused(&mut ledger, &Op::Seal(sum(21, &[2]), keys(&[2])));
    assert!(matches!(error, LedgerError::Full { .. }));
}

#[test]
fn files_that_are_no_ledger_of_this_chain() {
    assert!(matches!(Ledger::create(CHAIN, 0), Err(LedgerError::Capacity(0))));
    assert!(matches!(Ledger::create(CHAIN, u32::MAX), Err(LedgerError::Capacity(_))));
    let (ledger, fd) = Ledger::create(CHAIN, 8).unwrap();
    assert!(matches!(Ledger::open(&fd, CHAIN + 1), Err(LedgerError::Foreign(_))));
    let bytes = ledger.table.all().to_vec();
    let cut = Ledger::open(file(&bytes[..4096]), CHAIN).unwrap_err();
    assert!(matches!(cut, LedgerError::Foreign("its capacity is not that of its size")));
    assert!(matches!(Ledger::open(file(&bytes[..100]), CHAIN), Err(LedgerError::Foreign("it is too small"))));
    let unsealed = mapping::memfd("lifl-test", bytes.len()).unwrap();
    assert!(matches!(Ledger::open(unsealed, CHAIN), Err(LedgerError::Foreign("its size is not sealed"))));
    drop(ledger);
    assert!(rustix::fs::ftruncate(&fd, 0).is_err());
}
