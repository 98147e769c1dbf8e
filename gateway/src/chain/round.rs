//! The round: who may send, what is admitted, to whom it goes, when it is closed.

use lifl_api::{
    event::{attributes, client_source},
    http::{Receipt, schema},
    job::{FederatedJobSpec, UpdateKind},
};
use lifl_daemon::failpoint;
use lifl_ebpf::{Descriptor, Kind, ObjectKey, role};
use lifl_events::{EventError, Head};
use lifl_shm::{LedgerError, Sealed, UpdateRecord, ledger};

use super::Inner;
use crate::{
    intake::{digest_text, is_sha256, parse_sha256},
    problem::{Code, Refusal},
};

/// What the head of an update says of it, checked as far as the job's spec goes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Claim {
    pub(crate) client: String,
    pub(crate) id: String,
    pub(crate) round: u32,
    pub(crate) weight: f64,
    pub(crate) sha256: Option<[u8; 32]>,
    pub(crate) length: Option<u64>,
}

/// What becomes of an update whose head is good.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Its body may come. The client is noted as uploading: [`Inner::uploaded`] ends that.
    Fresh,
    /// It was promised before. With a digest: if this is the body's.
    Duplicate(Receipt, Option<[u8; 32]>),
}

/// An update that was promised, in the ledger or in a journal whose round is not open again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub(crate) round: u32,
    /// Bits.
    pub(crate) weight: u64,
    pub(crate) digest: [u8; 32],
}

/// An update that is in its round.
#[derive(Debug)]
pub(crate) struct Admission {
    pub(crate) receipt: Receipt,
    /// It was the last one: updates of the round that is closed now.
    pub(crate) closed: Option<u32>,
}

impl From<EventError> for Refusal {
    fn from(error: EventError) -> Self {
        let code = match error {
            EventError::Format(_) => Code::MediaType,
            EventError::TooLong { .. } => Code::TooLarge,
            _ => Code::BadAttribute,
        };
        code.with(error.to_string())
    }
}

// === impl Claim ===

impl Claim {
    /// Reads the head of an update to `job`, sent by the holder of a token for `client`.
    pub(crate) fn read(head: &Head<'_>, names: (&str, &str), spec: &FederatedJobSpec) -> Result<Self, Refusal> {
        let (namespace, job) = names;
        let text = |name: &'static str| head.required(name);
        let client = text(attributes::CLIENT)?.into_owned();
        let (id, source) = (head.id()?.into_owned(), head.source()?);
        check_name(&client)?;
        if id.len() > ledger::MAX_ID {
            return Err(Code::BadAttribute.with(format!("attribute 'id' is longer than {} bytes", ledger::MAX_ID)));
        }
        if source != client_source(namespace, job, &client) {
            let wanted = client_source(namespace, job, &client);
            return Err(
                Code::ForeignSource.with(format!("source '{source}' is not that of client '{client}': '{wanted}'"))
            );
        }
        let named = text(attributes::JOB)?;
        if named != job {
            return Err(Code::BadAttribute.with(format!("fljob is '{named}', the event was sent to job '{job}'")));
        }
        if let Some(encoding) = head.text(attributes::ENCODING)?.filter(|encoding| encoding != "none") {
            return Err(Code::Encoding.with(format!("flencoding '{encoding}' is not understood, only 'none'")));
        }
        let round = head.parse::<u32>(attributes::ROUND, "the number of a round")?;
        let round = round.ok_or_else(|| EventError::Missing(attributes::ROUND.to_owned()))?;
        check_kind(&text(attributes::KIND)?, spec.update.kind)?;
        let digest = head.text("fldigest")?;
        let sha256 = digest.as_deref().map(|text| parse_sha256(text).ok_or(text)).transpose().map_err(|text| {
            Code::BadAttribute.with(format!("fldigest is '{text}', which is not sha256- and 64 hex digits"))
        })?;
        Ok(Self { client, id, round, weight: weight(head, spec.max_weight)?, sha256, length: None })
    }
}

/// Names of clients are part of a URI and of the ledger.
pub(crate) fn check_name(client: &str) -> Result<(), Refusal> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:@".contains(&byte);
    let sound = !client.is_empty() && client.len() <= ledger::MAX_CLIENT && client.bytes().all(plain);
    let shown: String = client.chars().take(ledger::MAX_CLIENT).collect();
    sound.then_some(()).ok_or_else(|| {
        Code::BadAttribute.with(format!(
            "'{shown}' is not the name of a client: 1 to {} characters of A-Z, a-z, 0-9 and -._~:@",
            ledger::MAX_CLIENT
        ))
    })
}

fn check_kind(said: &str, wanted: UpdateKind) -> Result<(), Refusal> {
    let kind = match said {
        "full" => UpdateKind::Full,
        "diff" => UpdateKind::Diff,
        _ => return Err(Code::WrongKind.with(format!("flkind is '{said}', which is neither 'full' nor 'diff'"))),
    };
    if kind == wanted {
        return Ok(());
    }
    Err(Code::WrongKind.with(format!("flkind is '{said}', the job averages {wanted:?} updates")))
}

/// `flweight`, else `flsamples`. Absurd ones are no syntax error: the update is hopeless, not unreadable.
fn weight(head: &Head<'_>, max: u64) -> Result<f64, Refusal> {
    let (name, said) = match head.text(attributes::WEIGHT)? {
        Some(text) => (attributes::WEIGHT, text),
        None => (attributes::SAMPLES, head.required(attributes::SAMPLES)?),
    };
    let bad = |what: &str| Code::BadWeight.with(format!("{name} is '{said}', {what}"));
    let weight: f64 = said.parse().map_err(|_not_a_number| bad("which is not a number"))?;
    if !weight.is_finite() || weight <= 0.0 {
        return Err(bad("which is not above zero and finite"));
    }
    // A bound of the job's spec: exact up to 2^53, and nobody weighs more.
    #[expect(clippy::cast_precision_loss, reason = "a bound, not a sum")]
    if weight > max as f64 {
        return Err(bad(&format!("more than the job's maxWeight of {max}")));
    }
    Ok(weight)
}

// === impl Inner: the round ===

impl Inner {
    /// Judges an update by its head.
    pub(crate) fn judge(&mut self, claim: &Claim) -> Result<Verdict, Refusal> {
        if let Some(known) = self.known(claim)? {
            // Digests of one kind were compared.
            let compared = claim.sha256.is_some_and(|sha256| is_sha256(&known.digest, &sha256).is_some());
            let receipt = self.receipt(claim, known.round, &known.digest, true);
            return Ok(Verdict::Duplicate(receipt, (!compared).then_some(known.digest)));
        }
        if self.uploading.get(&claim.client) == Some(&claim.id) {
            return Err(Code::InProgress.with(format!("event '{}' is still being received", claim.id)));
        }
        self.is_open(claim.round)?;
        if self.readmitting {
            // Or strangers to the journal would fill the round before those to whom it is promised.
            return Err(Code::Starting.with(format!("the journal of round {} is being read", claim.round)));
        }
        let open = self.meta.open.as_ref();
        if !open.is_some_and(|open| open.selected.contains(&claim.client)) {
            return Err(
                Code::NotSelected.with(format!("client '{}' is not selected for round {}", claim.client, claim.round))
            );
        }
        if self.reported.contains(&claim.client) {
            return Err(
                Code::OnePerRound.with(format!("client '{}' has an update in round {}", claim.client, claim.round))
            );
        }
        if let Some(other) = self.uploading.get(&claim.client) {
            return Err(Code::ClientBusy.with(format!("client '{}' is sending '{other}' already", claim.client)));
        }
        if let Some(length) = claim.length.filter(|_| self.measure.is_some()) {
            self.fits(length)?;
        }
        self.uploading.insert(claim.client.clone(), claim.id.clone());
        Ok(Verdict::Fresh)
    }

    fn is_open(&self, asked: u32) -> Result<(), Refusal> {
        let round = self.ledger.round();
        if self.meta.finish.is_some() {
            return Err(Code::RoundClosed.with("the job is over"));
        }
        // The ledger is as old as this machine's memory: the rounds may have begun long ago.
        let committed = self.meta.model.as_ref().map_or(0, |model| model.round);
        if round.goal == 0 && asked > committed {
            return Err(Code::Starting.with("the job's round is not known here yet"));
        }
        if asked > round.round && round.goal != 0 {
            return Err(Code::RoundNotBegun.with(format!("round {asked} has not begun; it is round {}", round.round)));
        }
        if asked < round.round || !round.open {
            return Err(Code::RoundClosed.with(format!("round {asked} is closed")));
        }
        Ok(())
    }

    /// Largest body that an update of this job may have.
    pub(crate) fn max_size(&self) -> u64 {
        let said = || self.meta.job.spec.update.max_size.map_or(self.meta.slot_bytes, |size| size.0);
        self.measure.as_ref().map_or_else(said, |measure| measure.max_size)
    }

    /// Refuses bodies that are larger.
    pub(crate) fn fits(&self, length: u64) -> Result<(), Refusal> {
        let max = self.max_size();
        if length > max {
            return Err(Code::TooLarge.with(format!("{length} bytes, the job accepts {max}")));
        }
        Ok(())
    }

    /// What was promised of an event; an error if its head is another one now.
    fn known(&self, claim: &Claim) -> Result<Option<Known>, Refusal> {
        let update = self.ledger.find(&claim.client, &claim.id).and_then(|index| self.ledger.update(index));
        let known = |update: UpdateRecord| Known {
            round: update.round,
            weight: update.weight.to_bits(),
            digest: update.digest,
        };
        let journalled = || self.journalled.get(&(claim.client.clone(), claim.id.clone())).copied();
        let Some(update) = update.map(known).or_else(journalled) else { return Ok(None) };
        let other =
            |what: &str| Code::OtherContent.with(format!("event '{}' was accepted with another {what}", claim.id));
        if update.round != claim.round {
            return Err(other("round"));
        }
        if update.weight != claim.weight.to_bits() {
            return Err(other("weight"));
        }
        if claim.sha256.is_some_and(|sha256| is_sha256(&update.digest, &sha256) == Some(false)) {
            return Err(other("digest"));
        }
        Ok(Some(update))
    }

    fn receipt(&self, claim: &Claim, round: u32, digest: &[u8; 32], duplicate: bool) -> Receipt {
        Receipt {
            schema: schema("receipt"),
            source: self.source(&claim.client),
            id: claim.id.clone(),
            round,
            digest: digest_text(digest),
            duplicate,
        }
    }

    pub(crate) fn source(&self, client: &str) -> String {
        client_source(self.meta.job.namespace(), self.meta.job.name(), client)
    }

    /// The upload of a client is over, however it ended.
    pub(crate) fn uploaded(&mut self, client: &str) {
        self.uploading.remove(client);
    }

    /// Promises a sealed update and hands it to a leaf. The slot comes back if it is not to be.
    pub(crate) fn admit(
        &mut self,
        claim: &Claim,
        sealed: &Sealed,
        digest: [u8; 32],
        out: &mut Vec<Descriptor>,
    ) -> Result<Admission, Refusal> {
        let leaf = self.choose();
        let record = UpdateRecord {
            client: claim.client.clone(),
            id: claim.id.clone(),
            digest,
            weight: claim.weight,
            key: sealed.key,
            offset: sealed.offset,
            length: sealed.length,
            sent_to: leaf.unwrap_or(role::GATEWAY),
            round: claim.round,
        };
        let admitted = self.is_open(claim.round).and_then(|()| self.ledger.admit(&record).map_err(refused));
        if let Err(refusal) = admitted {
            self.recycle(sealed.key);
            return match self.known(claim)? {
                Some(known) if known.digest == digest => {
                    let receipt = self.receipt(claim, known.round, &digest, true);
                    Ok(Admission { receipt, closed: None })
                }
                // Compared when it is sent again: digests may be of two kinds.
                Some(_) => Err(Code::InProgress.with("the event was accepted meanwhile")),
                None => Err(refusal),
            };
        }
        failpoint("gateway.admitted");
        self.reported.insert(claim.client.clone());
        self.totals.accepted += 1;
        match leaf {
            Some(leaf) => self.hand(sealed.descriptor(Kind::Update, leaf), out),
            None => self.waiting.push_back(sealed.key),
        }
        let closed = (!self.ledger.round().open).then(|| self.ledger.admitted());
        self.announce_close(out);
        Ok(Admission { receipt: self.receipt(claim, claim.round, &digest, false), closed })
    }

    fn hand(&mut self, descriptor: Descriptor, out: &mut Vec<Descriptor>) {
        *self.outstanding.entry(descriptor.dst).or_default() += 1;
        out.push(descriptor);
    }

    /// The leaf with the least outstanding, in turn where it is the same; none when all have what they may.
    fn choose(&mut self) -> Option<u32> {
        let leaves = self.leaves();
        let load = |leaf: u32| self.outstanding.get(&leaf).copied().unwrap_or(0);
        let begin = self.last_leaf + 1;
        let index = (begin..begin + leaves.len()).map(|i| i % leaves.len()).min_by_key(|i| load(leaves[*i]))?;
        if load(leaves[index]) >= self.credit() {
            return None;
        }
        self.last_leaf = index;
        Some(leaves[index])
    }

    /// Hands on what waited, as far as leaves have room again.
    pub(crate) fn pump(&mut self, out: &mut Vec<Descriptor>) {
        while let Some(key) = self.waiting.front().copied() {
            let Some(leaf) = self.choose() else { return };
            self.waiting.pop_front();
            match (self.ledger.set_sent_to(key, leaf), self.ledger.get(key)) {
                (Ok(()), Some(object)) => self.hand(object.descriptor(self.chain, leaf), out),
                (result, _) => tracing::error!(chain = self.chain, ?key, ?result, "waiting update is unknown"),
            }
        }
        self.announce_close(out);
    }

    /// Closes the round with what it has.
    pub(crate) fn close(&mut self, out: &mut Vec<Descriptor>) -> u32 {
        let admitted = self.ledger.close();
        self.announce_close(out);
        admitted
    }

    /// Tells the aggregators what to expect, once all of it is on its way.
    fn announce_close(&mut self, out: &mut Vec<Descriptor>) {
        let round = self.ledger.round();
        if self.close_sent || round.open || self.is_between_rounds() || !self.waiting.is_empty() {
            return;
        }
        failpoint("gateway.closed");
        self.close_sent = true;
        for role in self.aggregators() {
            out.extend(self.close_for(role));
        }
    }

    /// What `role` is to expect; nothing for a round without updates: there will be no model.
    pub(crate) fn close_for(&self, role: u32) -> Option<Descriptor> {
        let total = self.ledger.admitted();
        let count = if self.leaves().contains(&role) { self.ledger.admitted_to(role) } else { total };
        let descriptor = Descriptor::new(Kind::Close, self.chain, role);
        (total > 0).then_some(Descriptor { round: self.ledger.round().round, count, ..descriptor })
    }

    /// Gives a slot of our own back.
    pub(crate) fn recycle(&mut self, key: ObjectKey) {
        if self.arena.as_ref().is_some_and(|arena| arena.release(key)) {
            self.freed += 1;
        }
    }
}

fn refused(error: LedgerError) -> Refusal {
    match error {
        LedgerError::RoundClosed(round) => Code::RoundClosed.with(format!("round {round} is closed")),
        LedgerError::WrongRound { asked, .. } => Code::RoundClosed.with(format!("round {asked} is closed")),
        LedgerError::Full { .. } => Code::OutOfMemory.with(error.to_string()),
        LedgerError::Duplicate(_) => Code::InProgress.with("the event was accepted meanwhile"),
        other => {
            tracing::error!(error = %other, "ledger refuses an update");
            Code::Starting.with("the update cannot be recorded now")
        }
    }
}
