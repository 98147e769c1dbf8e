//! The function's one thread: orders of the agent, descriptors, and what follows from them.

use std::{io, os::fd::OwnedFd, time::Instant};

use lifl_api::node::{FromAgent, RoleConfig, ToAgent};
use lifl_daemon::{ChannelError, Received, SyncChannel, arm_failpoint, failpoint};
use lifl_ebpf::wire::{DescriptorSocket, SendCause};
use lifl_ebpf_common::{
    Descriptor, Kind, LAYOUT_VERSION,
    descriptor::{ObjectKey, flags},
    role,
};
use lifl_shm::{Element, Object, ObjectKind, ObjectMeta, Run, Sealed, SlotWriter};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    decide::{Held, Round, Step, decide},
    divide::{DivideError, divide},
    memory::{Memory, ReadError},
    sum::{Accumulator, SumError, fold},
};

/// Pause before an answer that was "not now" (no memory, a full receiver) is asked for again.
const RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Why the function ended.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// Agent and supervisor are gone.
    #[error("nobody is left to work for")]
    Orphan,
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The data socket failed.
    #[error("data socket: {0}")]
    Socket(SendCause),
    /// Inputs cannot be added.
    #[error("round {round}: {source}")]
    Sum {
        /// Round.
        round: u32,
        /// Why.
        source: SumError,
    },
    /// No model can be made.
    #[error("round {round}: {source}")]
    Divide {
        /// Round.
        round: u32,
        /// Why.
        source: DivideError,
    },
    /// An object cannot be sealed.
    #[error("round {round}: {source}")]
    Seal {
        /// Round.
        round: u32,
        /// Why.
        source: lifl_shm::SealError,
    },
}

/// What the function works with once it has a role.
#[derive(Debug)]
struct Work {
    chain: u32,
    config: RoleConfig,
    memory: Memory,
    round: Round,
    /// Own sealed sums, for recycling when their round is over.
    sums: Vec<(u32, ObjectKey)>,
    spent: Spent,
}

#[derive(Clone, Copy, Debug, Default)]
struct Spent {
    inputs: u64,
    bytes: u64,
    ns: u64,
}

struct Function {
    agent: SyncChannel,
    socket: Option<DescriptorSocket>,
    work: Option<Work>,
    drain: bool,
    /// Something waits for memory or for a receiver.
    retry: bool,
}

/// Runs an aggregator until its agent says drain, or nobody is left.
///
/// `control` is the private channel to the agent.
///
/// # Errors
/// [`FunctionError`]; the agent reads the exit and starts a successor.
pub fn run(control: OwnedFd) -> Result<(), FunctionError> {
    let agent = SyncChannel::new(control);
    agent.send(&ToAgent::Ready { layout: LAYOUT_VERSION }, &[])?;
    let mut function = Function { agent, socket: None, work: None, drain: false, retry: false };
    let result = function.serve();
    if let Err(error) = &result {
        let _nobody_may_listen = function.agent.send(&ToAgent::Failed { reason: error.to_string() }, &[]);
    }
    result
}

// === impl Function ===

impl Function {
    fn serve(&mut self) -> Result<(), FunctionError> {
        let mut incoming = Vec::new();
        while !self.drain {
            self.wait()?;
            self.orders()?;
            incoming.clear();
            if let Some(socket) = &self.socket {
                match socket.recv_into(&mut incoming) {
                    Ok(0) => self.socket = None,
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e.into()),
                }
            }
            // A descriptor may name a segment that the agent told of just now.
            if !incoming.is_empty() {
                self.orders()?;
            }
            incoming.iter().for_each(|descriptor| self.take(descriptor));
            self.retry = false;
            while self.advance()? {}
        }
        Ok(())
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> io::Result<()> {
        let mut fds = vec![PollFd::new(&self.agent, PollFlags::IN)];
        fds.extend(self.socket.as_ref().map(|socket| PollFd::new(socket, PollFlags::IN)));
        match poll(&mut fds, self.retry.then_some(&RETRY)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn orders(&mut self) -> Result<(), FunctionError> {
        loop {
            match self.agent.try_recv::<FromAgent>()? {
                Received::Empty => return Ok(()),
                Received::Gone => return Err(FunctionError::Orphan),
                Received::Message(order, fds) => self.obey(order, fds)?,
            }
        }
    }

    fn obey(&mut self, order: FromAgent, fds: Vec<OwnedFd>) -> Result<(), FunctionError> {
        let fd = fds.into_iter().next();
        match (order, &mut self.work) {
            (FromAgent::DataSocket, _) => {
                if let Some(fd) = fd {
                    rustix::io::ioctl_fionbio(&fd, true).map_err(io::Error::from)?;
                    self.socket = Some(DescriptorSocket::new(fd));
                }
            }
            (FromAgent::Role { chain, config, failpoint }, work) => {
                if let Some(text) = failpoint {
                    arm_failpoint(&text);
                }
                let role = config.role;
                match work {
                    Some(work) => work.become_role(config),
                    None => *work = Some(Work::new(chain, config)),
                }
                self.agent.send(&ToAgent::RoleTaken { role }, &[])?;
            }
            (FromAgent::Segment { chain, segment, .. }, Some(work)) => {
                if let Some(fd) = fd
                    && let Err(error) = work.memory.map(chain, segment, fd)
                {
                    tracing::error!(%error, segment, "segment of a member");
                }
            }
            (FromAgent::SegmentGone { segment, .. }, Some(work)) => work.memory.unmap(segment),
            (FromAgent::Granted { request, segment, .. }, Some(work)) => {
                work.memory.granted(request, segment, &self.agent)?
            }
            (FromAgent::Kept { segment, .. }, Some(work)) => work.memory.kept(segment),
            (FromAgent::Refused { request, reason, .. }, Some(work)) => {
                tracing::debug!(reason, "no segment for now");
                work.memory.was_refused(request);
            }
            (FromAgent::Adopted, Some(work)) => work.memory.tell_again(&self.agent)?,
            (FromAgent::Drain, _) => self.drain = true,
            (other, _) => tracing::warn!(?other, "order ignored"),
        }
        Ok(())
    }

    /// Files a descriptor.
    fn take(&mut self, descriptor: &Descriptor) {
        let Some(work) = &mut self.work else { return };
        tracing::debug!(role = work.config.role, ?descriptor, "received");
        if descriptor.chain != work.chain || descriptor.version != LAYOUT_VERSION {
            tracing::warn!(?descriptor, "descriptor of another chain or layout");
            return;
        }
        match Kind::from_u8(descriptor.kind) {
            Some(Kind::Release) => work.release(descriptor.key()),
            Some(Kind::Update | Kind::Partial) => {
                work.advance_round(descriptor.round);
                if work.round.push(*descriptor) {
                    failpoint("function.received");
                }
            }
            Some(Kind::Model) => work.round.base = Some(*descriptor),
            Some(Kind::Close) => {
                work.advance_round(descriptor.round);
                if descriptor.round == work.round.number {
                    work.round.expected = Some(descriptor.count);
                }
            }
            Some(Kind::Sealed) | None => tracing::warn!(?descriptor, "not for an aggregator"),
        }
    }

    /// Does one step; false when there is nothing to do now.
    fn advance(&mut self) -> Result<bool, FunctionError> {
        let (Some(work), Some(socket)) = (&mut self.work, &self.socket) else { return Ok(false) };
        work.memory.drop_retired(work.round.number, &self.agent)?;
        let batch = usize::try_from(work.config.batch).unwrap_or(usize::MAX);
        let is_top = work.config.parent.is_none();
        let step = decide(&work.round, work.config.eager, batch);
        tracing::debug!(
            role = work.config.role,
            ?step,
            round = work.round.number,
            expected = work.round.expected,
            "step"
        );
        let done = match step {
            Step::Wait => return Ok(false),
            Step::Fold { last: true, .. } | Step::Finish if is_top && work.round.base.is_none() => return Ok(false),
            Step::Fold { inputs, .. } => match work.fold(inputs, &self.agent)? {
                // An input whose segment is not known yet was left in the queue: only the count tells whether all is in.
                Some((inputs, sum)) if work.round.expected.is_some_and(|all| sum.count >= all) => match is_top {
                    true => work.model(socket, &self.agent, &inputs, Some(sum))?,
                    false => work.announce(socket, &inputs, &sum, true).map(|()| true)?,
                },
                Some((inputs, sum)) => work.announce(socket, &inputs, &sum, false).map(|()| true)?,
                None => false,
            },
            Step::Finish if is_top => work.model(socket, &self.agent, &[], None)?,
            Step::Finish => work.hand_on(socket).map(|()| true)?,
        };
        if work.round.complete {
            let Spent { inputs, bytes, ns } = std::mem::take(&mut work.spent);
            self.agent.send(&ToAgent::Folded { round: work.round.number, inputs, bytes, ns }, &[])?;
        }
        self.retry = !done;
        Ok(done)
    }
}

// === impl Work ===

impl Work {
    fn new(chain: u32, config: RoleConfig) -> Self {
        let memory = Memory::new(chain, &config);
        Self { chain, config, memory, round: Round::default(), sums: Vec::new(), spent: Spent::default() }
    }

    /// Takes another role. What was held in the old one is left to its successor there: the gateway sends it again.
    fn become_role(&mut self, config: RoleConfig) {
        if self.config != config {
            let round = self.round.number;
            self.round = Round::default();
            self.memory.resize(self.chain, &config, round);
            self.config = config;
            tracing::debug!(role = self.config.role, round, "role taken");
        }
    }

    /// A new round: the sums of earlier ones are committed, whatever was said of them.
    fn advance_round(&mut self, number: u32) {
        if self.round.advance(number) {
            let (memory, sums) = (&self.memory, std::mem::take(&mut self.sums));
            let (old, kept) = sums.into_iter().partition(|(round, _)| *round < number);
            self.sums = kept;
            let old: Vec<(u32, ObjectKey)> = old;
            for (_, key) in old {
                memory.release(key);
            }
        }
    }

    /// Recycles an own slot; one that was recycled already, or is another's, stays as it is.
    fn release(&mut self, key: ObjectKey) {
        self.sums.retain(|(_, sum)| *sum != key);
        self.memory.release(key);
    }

    /// Folds the first inputs of the queue into a new sum, sealed but told to nobody. `None`: not now.
    fn fold(&mut self, inputs: usize, agent: &SyncChannel) -> Result<Option<(Vec<Descriptor>, Sealed)>, FunctionError> {
        let Some(mut slot) = self.memory.reserve(agent)? else { return Ok(None) };
        let round = self.round.number;
        let taken = self.round.take(inputs);
        let (mut objects, mut good) = (Vec::with_capacity(taken.len()), Vec::with_capacity(taken.len()));
        let mut waiting = Vec::new();
        for descriptor in taken {
            match self.memory.described(&descriptor) {
                Ok(object) => {
                    objects.push(object);
                    good.push(descriptor);
                }
                Err(ReadError::Segment(_)) => waiting.push(descriptor),
                Err(error) => tracing::error!(%error, ?descriptor, "input refused"),
            }
        }
        self.round.put_back(waiting);
        let current = self.round.current;
        let base = current.and_then(|held| self.memory.object(held.key).ok());
        if good.is_empty() || base.is_some() != current.is_some() {
            self.round.put_back(good);
            return Ok(None);
        }
        let began = Instant::now();
        let length = add(&mut slot, &self.config, base.as_ref(), &objects)
            .map_err(|source| FunctionError::Sum { round, source })?;
        self.spent.ns += u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.spent.inputs += good.len() as u64;
        self.spent.bytes += objects.iter().map(|o| o.meta().length).sum::<u64>();
        let meta = self.meta(length, current, &good);
        let sealed = slot.seal(&meta).map_err(|source| FunctionError::Seal { round, source })?;
        self.sums.push((round, sealed.key));
        self.round.know(sealed.key);
        failpoint("function.folded");
        Ok(Some((good, sealed)))
    }

    fn meta(&self, length: u64, current: Option<Held>, inputs: &[Descriptor]) -> ObjectMeta {
        let (count, weight) = current.map_or((0, 0.0), |c| (c.count, c.weight));
        let dtype = if self.config.fixed_scale.is_some() { Element::I64 } else { Element::F32 };
        ObjectMeta {
            kind: ObjectKind::Partial,
            round: self.round.number,
            count: inputs.iter().fold(count, |n, d| n.saturating_add(d.count)),
            weight: inputs.iter().fold(weight, |w, d| w + d.weight()),
            length,
            runs: vec![Run::whole(self.config.elements, dtype)],
        }
    }

    /// Tells the gateway what the new sum stands for; the last one of a round also goes to the parent.
    fn announce(
        &mut self,
        socket: &DescriptorSocket,
        inputs: &[Descriptor],
        sum: &Sealed,
        last: bool,
    ) -> Result<(), FunctionError> {
        let mut group = self.releases(inputs, sum.key);
        let mut sealed = sum.descriptor(Kind::Sealed, role::GATEWAY);
        if last {
            sealed.flags |= flags::FINAL;
        }
        group.push(sealed);
        send(socket, &group)?;
        // The gateway learns in this order that the new sum stands for the old one, whoever dies now: its slot is free.
        let old = self.round.current.replace(Held { key: sum.key, count: sum.count, weight: sum.weight });
        if let Some(old) = old {
            self.release(old.key);
        }
        failpoint("function.sealed");
        if last { self.send_to_parent(socket, sealed) } else { Ok(()) }
    }

    /// The sum is complete as it was announced: says so, and hands it to the parent.
    fn hand_on(&mut self, socket: &DescriptorSocket) -> Result<(), FunctionError> {
        let Some(held) = self.round.current else { return Ok(()) };
        let Ok(object) = self.memory.object(held.key) else { return Ok(()) };
        let mut sealed = describe(&object, self.chain, Kind::Sealed, role::GATEWAY);
        sealed.flags |= flags::FINAL;
        send(socket, &[sealed])?;
        failpoint("function.sealed");
        self.send_to_parent(socket, sealed)
    }

    fn send_to_parent(&mut self, socket: &DescriptorSocket, sealed: Descriptor) -> Result<(), FunctionError> {
        let parent = self.config.parent.unwrap_or(role::GATEWAY);
        let partial = Descriptor { kind: Kind::Partial as u8, dst: parent, flags: 0, ..sealed };
        self.round.complete = true;
        match send(socket, &[partial]) {
            // The parent is being replaced: the gateway knows that it has this object, and sends it to the successor.
            Err(FunctionError::Socket(SendCause::Refused)) => Ok(()),
            other => {
                failpoint("function.sent");
                other
            }
        }
    }

    /// Divides once and sends the model.
    fn model(
        &mut self,
        socket: &DescriptorSocket,
        agent: &SyncChannel,
        inputs: &[Descriptor],
        last: Option<Sealed>,
    ) -> Result<bool, FunctionError> {
        let round = self.round.number;
        let sum_key = last.map(|sum| sum.key).or(self.round.current.map(|held| held.key));
        let base = self.round.base.as_ref().and_then(|base| self.memory.object(base.key()).ok());
        let sum = sum_key.and_then(|key| self.memory.object(key).ok());
        let slot = match self.memory.free_slot() {
            // Announced, the last sum frees the one before it: the model takes that slot and needs none of its own.
            None if last.is_some() && self.round.current.is_some() => {
                return self.keep_for_later(socket, inputs, last).map(|()| true);
            }
            None => self.memory.reserve(agent)?,
            free => free,
        };
        let (Some(base), Some(sum), Some(mut slot)) = (base, sum, slot) else {
            return self.keep_for_later(socket, inputs, last).map(|()| false);
        };
        let meta = sum.meta().clone();
        let length = divide(slot.payload_mut(), &base, &sum, self.config.fixed_scale, self.config.diff)
            .map_err(|source| FunctionError::Divide { round, source })?;
        let model = ObjectMeta { kind: ObjectKind::Model, length, runs: Vec::new(), ..meta };
        let sealed = slot.seal(&model).map_err(|source| FunctionError::Seal { round, source })?;
        let mut group = self.releases(inputs, sealed.key);
        group.push(sealed.descriptor(Kind::Model, role::GATEWAY));
        failpoint("function.divided");
        send(socket, &group)?;
        self.round.complete = true;
        let sums = [last.map(|sum| sum.key), self.round.current.take().map(|held| held.key)];
        sums.into_iter().flatten().for_each(|key| self.release(key));
        failpoint("function.sent");
        Ok(true)
    }

    /// There is no slot for the model yet: the last sum is announced as any other, and divided when there is one.
    fn keep_for_later(
        &mut self,
        socket: &DescriptorSocket,
        inputs: &[Descriptor],
        last: Option<Sealed>,
    ) -> Result<(), FunctionError> {
        match last {
            Some(sum) => self.announce(socket, inputs, &sum, false),
            None => Ok(()),
        }
    }

    /// `inputs` and the current sum are contained in `container`.
    fn releases(&self, inputs: &[Descriptor], container: ObjectKey) -> Vec<Descriptor> {
        let keys = inputs.iter().map(Descriptor::key).chain(self.round.current.map(|held| held.key));
        keys.map(|key| {
            let release = Descriptor::new(Kind::Release, self.chain, role::GATEWAY);
            Descriptor { round: self.round.number, ..release.with_key(key).with_contained_in(container) }
        })
        .collect()
    }
}

/// Writes the sum into the slot; returns the bytes of it.
fn add(slot: &mut SlotWriter, config: &RoleConfig, base: Option<&Object>, inputs: &[Object]) -> Result<u64, SumError> {
    let elements = usize::try_from(config.elements).unwrap_or(usize::MAX);
    match config.fixed_scale {
        Some(scale) => {
            fold(Accumulator::Fixed(&mut slot.payload_i64_mut()[..elements], scale), base, inputs)?;
            Ok(config.elements * 8)
        }
        None => {
            fold(Accumulator::Float(&mut slot.payload_f32_mut()[..elements]), base, inputs)?;
            Ok(config.elements * 4)
        }
    }
}

fn describe(object: &Object, chain: u32, kind: Kind, dst: u32) -> Descriptor {
    let meta = object.meta();
    Descriptor {
        round: meta.round,
        count: meta.count,
        offset: object.offset(),
        length: meta.length,
        weight_bits: meta.weight.to_bits(),
        ..Descriptor::new(kind, chain, dst).with_key(object.key())
    }
}

/// Sends all, waiting where the socket or the receiver is full: credits bound how long that can be.
fn send(socket: &DescriptorSocket, descriptors: &[Descriptor]) -> Result<(), FunctionError> {
    let mut rest = descriptors;
    while let Err(error) = socket.send_all(rest) {
        rest = &rest[error.delivered..];
        let flags = match error.cause {
            SendCause::WouldBlock => PollFlags::OUT,
            SendCause::Full => PollFlags::empty(),
            cause => return Err(FunctionError::Socket(cause)),
        };
        match poll(&mut [PollFd::new(socket, flags)], Some(&RETRY)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
    }
    Ok(())
}
