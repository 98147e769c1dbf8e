//! This process: the leaf, and whoever keeps the path.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use lifl_daemon::{Channel, SyncChannel};
use lifl_ebpf::{Descriptor, Kind, Member, Path, RouteKey, pair, role, wire::DescriptorSocket};
use lifl_shm::{Element, ObjectKind, ObjectMeta, Run, Sealed, Segment, SegmentSpec};
use tokio::runtime::Runtime;

use super::{
    SIZES, clock,
    grpc::{self, How},
    order::{Answer, CHAIN, Order, pin, stamp, stamped, value},
};

/// The leaf of this bench, with its top.
pub(super) struct Leaf {
    runtime: Runtime,
    channel: tonic::transport::Channel,
    segments: Vec<Segment>,
    socket: DescriptorSocket,
    control: SyncChannel,
    path: Path,
    _near: [OwnedFd; 2],
    top: Child,
    serial: u32,
    handed_over: u64,
}

/// What some handoffs took, in microseconds.
pub(super) struct Done {
    /// Of each size, of each handoff.
    pub(super) latencies: Vec<Vec<f64>>,
    /// Processor time of both processes per handoff.
    pub(super) cpu_each: f64,
}

/// Where both processes run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Pinned {
    /// Wherever the kernel likes.
    No,
    /// Both on the first.
    OneCore,
    /// One on each.
    TwoCores,
}

// === impl Leaf ===

impl Leaf {
    pub(super) fn start() -> anyhow::Result<Self> {
        let path = Path::load().context(
            "the sk_msg program cannot be loaded here, and what it is measured for cannot be measured without it \
             (needs CAP_BPF and CAP_NET_ADMIN)",
        )?;
        let ((socket, leaf_near), (theirs, top_near)) = (pair()?, pair()?);
        for (index, role, socket, near) in [(0, role::LEAF, &socket, &leaf_near), (1, role::TOP, &theirs, &top_near)] {
            let member = Member { chain: CHAIN, role, counter: index, reserved: 0 };
            path.register(Some(socket.as_fd()), near.as_fd(), member)?;
            path.set_route(RouteKey { chain: CHAIN, dst: role }, index)?;
        }
        let (ours, theirs_control) = Channel::pair()?;
        let top = Command::new("/proc/self/exe")
            .args(["handoff", "--part", "handoff-top"])
            .stdin(Stdio::from(theirs_control))
            .spawn()
            .context("cannot start the top")?;
        let control = SyncChannel::new(ours);
        control.send(&(), &[theirs.as_fd()])?;
        let Some((Answer::Serving(port), _)) = control.recv()? else { bail!("the top did not start") };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let channel = runtime.block_on(grpc::connect(port))?;
        let mut leaf = Self {
            runtime,
            channel,
            segments: Vec::new(),
            socket: DescriptorSocket::new(socket),
            control,
            path,
            _near: [leaf_near, top_near],
            top,
            serial: 0,
            handed_over: 0,
        };
        for size in 0..SIZES.len() {
            leaf.add_segment(size)?;
        }
        Ok(leaf)
    }

    fn add_segment(&mut self, size: usize) -> anyhow::Result<()> {
        let elements = SIZES[size].1;
        let spec = SegmentSpec {
            chain: CHAIN,
            writer: role::LEAF,
            slots: 1,
            payload_bytes: (elements * size_of::<f32>()) as u64,
            max_runs: 1,
        };
        let (segment, fd) = Segment::create(spec)?;
        ensure!(segment.set_id(u32::try_from(size)?), "a new segment has a number");
        let mut slot = segment.reserve().context("a new segment is full")?;
        for (i, x) in slot.payload_f32_mut()[..elements].iter_mut().enumerate() {
            *x = value(i, size);
        }
        drop(slot);
        self.segments.push(segment);
        self.order(&Order::Map { size }, Some(&fd))?;
        Ok(())
    }

    /// Hands `times` objects of each size over, in turns, one at a time.
    pub(super) fn hand_over(
        &mut self,
        sizes: &[usize],
        times: u32,
        fold: bool,
        pinned: Pinned,
    ) -> anyhow::Result<Done> {
        let (leaf, top) = match pinned {
            Pinned::No => (None, None),
            Pinned::OneCore => (Some(0), Some(0)),
            Pinned::TwoCores => (Some(0), Some(1)),
        };
        pin(leaf)?;
        let handoffs = times * u32::try_from(sizes.len())?;
        let before = self.cpu()?;
        self.order(&Order::Receive { handoffs, fold, core: top }, None)?;
        let mut sent = Vec::new();
        let mut answers: Vec<Descriptor> = Vec::new();
        for _ in 0..times {
            for size in sizes {
                let sealed = self.seal(*size)?;
                let descriptor = sealed.descriptor(Kind::Partial, role::TOP);
                sent.push(clock::now());
                self.socket.send_all(std::slice::from_ref(&descriptor))?;
                answers.clear();
                self.socket.recv_into(&mut answers)?;
                let [release] = answers[..] else { bail!("{} answers to one descriptor", answers.len()) };
                ensure!(release.kind == Kind::Release as u8 && release.src == role::TOP, "an answer of another kind");
                ensure!(
                    self.segments[*size].release(sealed.key.slot, release.generation),
                    "released what is not there"
                );
            }
        }
        let Answer::Received(received) = self.answer()? else { bail!("an answer to another order") };
        let cpu = self.cpu()? - before;
        pin(None)?;
        self.handed_over += u64::from(handoffs);
        ensure!(received.len() == sent.len(), "{} of {} handoffs were received", received.len(), sent.len());
        let mut latencies = vec![Vec::new(); sizes.len()];
        for (i, (sent, received)) in sent.iter().zip(received).enumerate() {
            latencies[i % sizes.len()].push(received.saturating_sub(*sent) as f64 / 1e3);
        }
        Ok(Done { latencies, cpu_each: cpu as f64 / 1e3 / f64::from(handoffs) })
    }

    /// Sends `times` updates over gRPC, one at a time.
    pub(super) fn call(&mut self, how: How, size: usize, chunk: usize, times: u32) -> anyhow::Result<Done> {
        let mut latencies = Vec::new();
        let mut cpu = 0;
        for _ in 0..times {
            let sealed = self.seal(size)?;
            let reader = self.segments[size].reader().context("no number")?;
            let update: Bytes = reader.object(sealed.key, SIZES[size].1 as u64)?.into_bytes();
            let before = self.cpu()?;
            let (sent, had) = self.runtime.block_on(grpc::call(&self.channel, how, update, chunk))?;
            cpu += self.cpu()? - before;
            latencies.push(had.saturating_sub(sent) as f64 / 1e3);
            ensure!(self.segments[size].release(sealed.key.slot, sealed.key.generation), "released what is not there");
        }
        Ok(Done { latencies: vec![latencies], cpu_each: cpu as f64 / 1e3 / f64::from(times) })
    }

    /// Has the top compare what it has, outside of every measurement.
    pub(super) fn compare(&mut self, size: usize) -> anyhow::Result<()> {
        self.call(How::Raw, size, 1 << 20, 1)?;
        self.order(&Order::Compare { size }, None)?;
        Ok(())
    }

    /// Ends the top; tells what moved the descriptors.
    pub(super) fn finish(mut self) -> anyhow::Result<String> {
        let counters = self.path.counters(0)?;
        ensure!(counters.drops.iter().all(|drops| *drops == 0), "the path refused descriptors: {counters:?}");
        ensure!(counters.messages == self.handed_over, "{} descriptors passed the program", counters.messages);
        drop(self.control);
        drop(self.channel);
        self.top.wait()?;
        Ok(format!("{:?}, {} descriptors from the leaf", self.path.kind(), counters.messages))
    }
    /// Seals the next object of this size: stamps, header, generation.
    fn seal(&mut self, size: usize) -> anyhow::Result<Sealed> {
        let elements = SIZES[size].1;
        self.serial += 1;
        let mut slot = self.segments[size].reserve().context("the object before is still there")?;
        let floats = slot.payload_f32_mut();
        stamped(elements).into_iter().for_each(|at| floats[at] = stamp(self.serial));
        let meta = ObjectMeta {
            kind: ObjectKind::Partial,
            round: self.serial,
            count: 1,
            weight: 1.0,
            length: (elements * size_of::<f32>()) as u64,
            runs: vec![Run::whole(elements as u64, Element::F32)],
        };
        Ok(slot.seal(&meta)?)
    }

    fn order(&self, order: &Order, fd: Option<&OwnedFd>) -> anyhow::Result<()> {
        let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
        self.control.send(order, &fds)?;
        match self.answer()? {
            Answer::Done => Ok(()),
            other => bail!("{other:?} to {order:?}"),
        }
    }

    fn answer(&self) -> anyhow::Result<Answer> {
        Ok(self.control.recv()?.context("the top ended; it says why above")?.0)
    }

    /// Of both processes, ns.
    fn cpu(&self) -> anyhow::Result<u64> {
        self.control.send(&Order::Cpu, &[])?;
        match self.answer()? {
            Answer::Cpu(top) => Ok(top + clock::cpu()),
            other => bail!("{other:?} to a question for processor time"),
        }
    }
}
