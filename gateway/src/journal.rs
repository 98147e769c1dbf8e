//! Journals of jobs with `ackLevel: Disk`: an update is on disk before its client is told.
//!
//! One file per chain, appended to: `magic, length of meta, length of payload, crc32c of both | meta (JSON) | payload`. A
//! torn tail (the machine died within a write) ends the file at the record before. A round's records are dropped when it
//! is committed; if the ledger is lost with the machine, opening the round admits them again.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use lifl_api::job::AckLevel;
use lifl_daemon::failpoint;
use lifl_shm::{Element, ObjectKind, ObjectMeta, Run};
use serde::{Deserialize, Serialize};

use crate::{
    chain::{Chain, Claim, Known, Slot, reserve},
    problem::{Code, Refusal},
    state::Gateway,
};

/// "LJR1", little-endian.
const MAGIC: u32 = u32::from_le_bytes(*b"LJR1");
const HEAD: usize = 20;
/// Longer meta data is no record of ours.
const MAX_META: u32 = 16 << 20;
const CHUNK: usize = 1 << 20;

/// The journals of this node.
#[derive(Debug)]
pub(crate) struct Journals {
    dir: Option<PathBuf>,
    /// Held while a file is opened: opening may cut a torn tail, and nobody must append meanwhile.
    open: tokio::sync::Mutex<HashMap<u32, Arc<Mutex<Journal>>>>,
}

/// One chain's file.
#[derive(Debug)]
struct Journal {
    file: File,
    end: u64,
    /// What was found when it was opened.
    found: Vec<Entry>,
    /// Neither written nor shortened: nothing it holds can be relied on.
    broken: bool,
}

/// A record and where its payload begins.
#[derive(Clone, Debug)]
struct Entry {
    record: Record,
    payload: u64,
}

/// What is written of an update besides its payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    client: String,
    id: String,
    round: u32,
    /// Bits: JSON does not keep every float.
    weight: u64,
    digest: [u8; 32],
    length: u64,
    runs: Vec<(u64, u64, u64, u32)>,
}

// === impl Journals ===

impl Journals {
    pub(crate) fn new(dir: Option<PathBuf>) -> Self {
        Self { dir, open: tokio::sync::Mutex::default() }
    }

    /// Refuses updates that cannot be made as safe as their job promises.
    pub(crate) fn check(&self, level: AckLevel) -> Result<(), Refusal> {
        if level == AckLevel::Disk && self.dir.is_none() {
            return Err(Code::JournalFailed.with("journal unavailable: the gateway was given no journal_dir"));
        }
        Ok(())
    }

    /// Makes an update as safe as its job promises, before anyone is told.
    pub(crate) async fn record(
        &self,
        chain: &Chain,
        claim: &Claim,
        meta: &ObjectMeta,
        digest: [u8; 32],
        mut slot: Slot,
    ) -> Result<Slot, Refusal> {
        let Some(journal) = self.of(chain).await? else { return Ok(slot) };
        let record = Record::new(claim, meta, digest);
        let written = tokio::task::spawn_blocking(move || {
            let length = usize::try_from(record.length).unwrap_or(usize::MAX);
            let payload = slot.payload().get(..length).ok_or(io::ErrorKind::InvalidInput)?;
            lock(&journal).append(&record, payload)?;
            Ok::<_, io::Error>(slot)
        });
        match written.await {
            Ok(Ok(slot)) => Ok(slot),
            Ok(Err(error)) => {
                tracing::error!(chain = chain.id, %error, "journal");
                Err(Code::JournalFailed.with(format!("the journal cannot be written: {error}")))
            }
            Err(error) => Err(Code::JournalFailed.with(error.to_string())),
        }
    }

    /// Where the journal of a chain is whose job asks for one.
    fn path(&self, chain: &Chain) -> Option<PathBuf> {
        let disk = chain.lock().meta.job.spec.ack_level == AckLevel::Disk;
        let dir = self.dir.as_ref().filter(|_| disk)?;
        Some(dir.join(format!("{}.{}.journal", chain.namespace, chain.job)))
    }

    /// The chain is another one from now on, and opens the same file.
    pub(crate) async fn close(&self, chain: u32) {
        self.open.lock().await.remove(&chain);
    }

    /// The journal of a chain whose job asks for one.
    async fn of(&self, chain: &Chain) -> Result<Option<Arc<Mutex<Journal>>>, Refusal> {
        let Some(path) = self.path(chain) else { return Ok(None) };
        let mut open = self.open.lock().await;
        if let Some(journal) = open.get(&chain.id) {
            return Ok(Some(Arc::clone(journal)));
        }
        let opened = tokio::task::spawn_blocking(move || Journal::open(&path)).await.map_err(io::Error::other);
        let journal = opened.and_then(|opened| opened).map_err(|error| {
            tracing::error!(chain = chain.id, %error, "journal");
            Code::JournalFailed.with(format!("the journal cannot be opened: {error}"))
        })?;
        let journal = Arc::new(Mutex::new(journal));
        open.insert(chain.id, Arc::clone(&journal));
        Ok(Some(journal))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes what the journal promises, for a ledger that has seen no round: another one lost it with the machine.
pub(crate) async fn recall(gateway: &Arc<Gateway>, chain: &Arc<Chain>) {
    if chain.lock().ledger.round().goal != 0 {
        return;
    }
    let Ok(Some(journal)) = gateway.journals.of(chain).await else { return };
    let known = |Entry { record, .. }: &Entry| {
        let known = Known { round: record.round, weight: record.weight, digest: record.digest };
        ((record.client.clone(), record.id.clone()), known)
    };
    let journalled: HashMap<_, _> = lock(&journal).found.iter().map(known).collect();
    if !journalled.is_empty() {
        tracing::info!(chain = chain.id, job = chain.job, updates = journalled.len(), "journal of an earlier life");
        chain.lock().journalled = journalled;
    }
}

/// Admits again what the journal has of a round and the ledger has not: its client was told, or may be any moment.
pub(crate) async fn readmit(gateway: &Arc<Gateway>, chain: &Arc<Chain>, round: u32) {
    if let Ok(Some(journal)) = gateway.journals.of(chain).await {
        readmit_from(gateway, chain, round, &journal).await;
    }
    chain.lock().readmitting = false;
}

async fn readmit_from(gateway: &Arc<Gateway>, chain: &Arc<Chain>, round: u32, journal: &Arc<Mutex<Journal>>) {
    if !chain.lock().ledger.round().open {
        return;
    }
    let found = std::mem::take(&mut lock(journal).found);
    for entry in found.into_iter().filter(|entry| entry.record.round == round) {
        let (client, id) = (entry.record.client.clone(), entry.record.id.clone());
        if chain.lock().ledger.find(&client, &id).is_some() {
            continue;
        }
        if let Err(refusal) = again(gateway, chain, journal, entry).await {
            {
                let mut inner = chain.lock();
                inner.journalled.remove(&(client.clone(), id.clone()));
                inner.reported.remove(&client);
            }
            tracing::error!(chain = chain.id, client, id, detail = refusal.detail, "journalled update is not admitted");
        }
    }
}

async fn again(
    gateway: &Arc<Gateway>,
    chain: &Arc<Chain>,
    journal: &Arc<Mutex<Journal>>,
    entry: Entry,
) -> Result<(), Refusal> {
    let mut slot = loop {
        match reserve(gateway, chain).await {
            Ok(slot) => break slot,
            Err(refusal) if chain.is_removed() => return Err(refusal),
            // The aggregators make room: what was promised waits as long as it takes.
            Err(refusal) => tracing::info!(chain = chain.id, reason = refusal.detail, "journal waits for a slot"),
        }
    };
    let (record, journal) = (entry.record, Arc::clone(journal));
    let length = usize::try_from(record.length).unwrap_or(usize::MAX);
    let read = tokio::task::spawn_blocking(move || {
        let payload = slot.payload().get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
        lock(&journal).file.read_exact_at(payload, entry.payload)?;
        Ok::<_, io::Error>(slot)
    });
    let failed = |error: &dyn std::fmt::Display| Code::JournalFailed.with(error.to_string());
    let slot = read.await.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
    let (claim, meta) = record.restore().ok_or_else(|| failed(&"a record of another layout"))?;
    let sealed = slot.seal(&meta).map_err(|e| failed(&e))?;
    let admission = gateway.with(chain, |inner, out| inner.admit(&claim, &sealed, record.digest, out))?;
    gateway.tell_progress(chain);
    if let Some(admitted) = admission.closed {
        crate::watch::worker::closed(gateway, chain, claim.round, admitted);
    }
    Ok(())
}

/// Forgets the records of a committed round: no later one has any yet.
pub(crate) async fn retire(gateway: &Arc<Gateway>, chain: &Arc<Chain>, round: u32) {
    let Ok(Some(journal)) = gateway.journals.of(chain).await else { return };
    chain.lock().journalled.clear();
    let shortened = tokio::task::spawn_blocking(move || {
        let mut journal = lock(&journal);
        journal.file.set_len(0)?;
        (journal.end, journal.broken) = (0, false);
        journal.found.clear();
        Ok::<_, io::Error>(())
    });
    if let Ok(Err(error)) = shortened.await {
        tracing::warn!(chain = chain.id, round, %error, "journal is not shortened");
    }
}

/// Forgets all that the journal of a job holds: the job is no more, and one of its name begins anew.
pub(crate) async fn remove(gateway: &Arc<Gateway>, chain: &Arc<Chain>) {
    let Some(path) = gateway.journals.path(chain) else { return };
    // Held until the file is gone: who comes next opens another one. Who was faster has this one.
    let mut open = gateway.journals.open.lock().await;
    open.remove(&chain.id);
    if gateway.chain_of(&chain.namespace, &chain.job).is_some() {
        return;
    }
    match tokio::task::spawn_blocking(move || fs::remove_file(&path)).await {
        Ok(Err(error)) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(chain = chain.id, %error, "journal is not removed");
        }
        _ => {}
    }
}

// === impl Journal ===

impl Journal {
    fn open(path: &Path) -> io::Result<Self> {
        let dir = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        // The name must survive, too.
        File::open(dir)?.sync_all()?;
        let size = file.metadata()?.len();
        let (mut end, mut found) = (0, Vec::new());
        while let Some((record, payload, next)) = read(&file, end, size)? {
            found.push(Entry { record, payload });
            end = next;
        }
        if end < size {
            tracing::warn!(path = %path.display(), kept = end, torn = size - end, "journal has a torn tail");
            file.set_len(end)?;
        }
        Ok(Self { file, end, found, broken: false })
    }

    fn append(&mut self, record: &Record, payload: &[u8]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("an earlier failure could not be undone"));
        }
        let begin = self.end;
        let written = self.write(record, payload);
        failpoint("gateway.journalled");
        match written {
            Ok(end) => {
                self.end = end;
                Ok(())
            }
            Err(error) => {
                // What was half written must not be taken for a record by what is written behind it.
                self.broken = self.file.set_len(begin).is_err();
                Err(error)
            }
        }
    }

    fn write(&self, record: &Record, payload: &[u8]) -> io::Result<u64> {
        let meta = serde_json::to_vec(record)?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&meta), payload);
        let mut head = MAGIC.to_le_bytes().to_vec();
        head.extend(u32::try_from(meta.len()).map_err(io::Error::other)?.to_le_bytes());
        head.extend((payload.len() as u64).to_le_bytes());
        head.extend(crc.to_le_bytes());
        head.extend(&meta);
        self.file.write_all_at(&head, self.end)?;
        let at = self.end + head.len() as u64;
        self.file.write_all_at(payload, at)?;
        self.file.sync_data()?;
        Ok(at + payload.len() as u64)
    }
}

/// The record at `at`, where its payload and the next record begin; none if it is not whole.
fn read(file: &File, at: u64, size: u64) -> io::Result<Option<(Record, u64, u64)>> {
    let mut head = [0; HEAD];
    let begin = at.saturating_add(HEAD as u64);
    if size < begin {
        return Ok(None);
    }
    file.read_exact_at(&mut head, at)?;
    let word = |from: usize| u32::from_le_bytes([head[from], head[from + 1], head[from + 2], head[from + 3]]);
    let length = u64::from(word(8)) | u64::from(word(12)) << 32;
    let payload = begin + u64::from(word(4));
    let end = payload.checked_add(length).filter(|end| *end <= size);
    let (Some(end), MAGIC, 0..=MAX_META) = (end, word(0), word(4)) else { return Ok(None) };
    let mut meta = vec![0; usize::try_from(word(4)).map_err(io::Error::other)?];
    file.read_exact_at(&mut meta, begin)?;
    let mut crc = crc32c::crc32c(&meta);
    let mut chunk = vec![0; CHUNK];
    let mut from = payload;
    while from < end {
        let part = usize::try_from(end - from).unwrap_or(CHUNK).min(CHUNK);
        file.read_exact_at(&mut chunk[..part], from)?;
        crc = crc32c::crc32c_append(crc, &chunk[..part]);
        from += part as u64;
    }
    let record = serde_json::from_slice::<Record>(&meta).ok();
    Ok(record.filter(|record| crc == word(16) && record.length == length).map(|record| (record, payload, end)))
}

// === impl Record ===

impl Record {
    fn new(claim: &Claim, meta: &ObjectMeta, digest: [u8; 32]) -> Self {
        Self {
            client: claim.client.clone(),
            id: claim.id.clone(),
            round: claim.round,
            weight: claim.weight.to_bits(),
            digest,
            length: meta.length,
            runs: meta.runs.iter().map(|run| (run.first, run.elements, run.offset, run.dtype as u32)).collect(),
        }
    }

    fn restore(&self) -> Option<(Claim, ObjectMeta)> {
        let run = |(first, elements, offset, dtype): &(u64, u64, u64, u32)| {
            let dtype = [Element::F32, Element::F16, Element::Bf16].into_iter().find(|one| *one as u32 == *dtype)?;
            Some(Run { first: *first, elements: *elements, offset: *offset, dtype })
        };
        let weight = f64::from_bits(self.weight);
        let runs = self.runs.iter().map(run).collect::<Option<_>>()?;
        let claim = Claim {
            client: self.client.clone(),
            id: self.id.clone(),
            round: self.round,
            weight,
            sha256: None,
            length: None,
        };
        let (round, length) = (self.round, self.length);
        Some((claim, ObjectMeta { kind: ObjectKind::Update, round, count: 1, weight, length, runs }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str, length: usize) -> Record {
        Record {
            client: "a".into(),
            id: id.into(),
            round: 3,
            weight: 0.1_f64.to_bits(),
            digest: [7; 32],
            length: length as u64,
            runs: vec![(0, 2, 0, Element::F32 as u32)],
        }
    }

    #[test]
    fn a_tail_torn_at_any_byte_costs_the_last_record_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/j.journal");
        let (one, two) = (record("1", 8), record("2", 5));
        let mut journal = Journal::open(&path).unwrap();
        journal.append(&one, b"12345678").unwrap();
        let first = journal.end;
        journal.append(&two, b"abcde").unwrap();
        let whole = fs::read(&path).unwrap();
        assert_eq!(whole.len() as u64, journal.end);
        for cut in usize::try_from(first).unwrap()..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let mut torn = Journal::open(&path).unwrap();
            assert_eq!((torn.found.len(), torn.end), (1, first), "cut at {cut}");
            assert_eq!(torn.found[0].record, one);
            torn.append(&two, b"abcde").unwrap();
            let found = Journal::open(&path).unwrap().found;
            assert_eq!((found.len(), &found[1].record), (2, &two));
        }
        for flip in 0..usize::try_from(first).unwrap() {
            let mut bad = whole.clone();
            bad[flip] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert_eq!(Journal::open(&path).unwrap().found.len(), 0, "bit at {flip}");
        }
    }

    #[test]
    fn a_full_disk_is_an_error_and_leaves_what_was_there() {
        let Ok(full) = OpenOptions::new().write(true).open("/dev/full") else { return };
        let mut journal = Journal { file: full, end: 0, found: Vec::new(), broken: false };
        let error = journal.append(&record("1", 1), b"x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        // A device cannot be shortened: nothing is written behind what may be half a record.
        assert!(journal.broken && journal.append(&record("1", 1), b"x").is_err());
    }
}
