//! The child: the top of the tree, which receives.

use std::{os::fd::OwnedFd, sync::Arc};

use anyhow::{Context as _, bail, ensure};
use lifl_daemon::{SyncChannel, take_stdin};
use lifl_ebpf::{Descriptor, Kind, role, wire::DescriptorSocket};
use lifl_fold::{Dtype, Input, as_f32, fold_f32};
use lifl_shm::{Segment, SegmentReader, SegmentSpec, SlotWriter};
use tokio::sync::Mutex;

use super::{
    LARGEST, SIZES, clock, grpc,
    order::{Answer, CHAIN, Order, check_stamps, pin, stamp, stamped, value},
};

/// What updates are received into and folded into. Touched before anything is measured, the same for both contestants.
pub(super) struct Memory {
    /// Where gRPC's updates are put together.
    pub(super) received: Vec<u8>,
    /// Bytes of the update that came last.
    pub(super) length: usize,
    /// The sum, and where the next one goes; slots, as an aggregator's are.
    sums: [SlotWriter; 2],
}

/// The top's own.
struct Top {
    control: SyncChannel,
    socket: DescriptorSocket,
    segments: Vec<SegmentReader>,
    memory: Arc<Mutex<Memory>>,
    /// Objects handed over so far, over whichever way.
    last: Option<(usize, u32)>,
}

/// Serves the leaf until it hangs up.
pub(crate) fn serve() -> anyhow::Result<()> {
    let control = SyncChannel::new(take_stdin().context("the top is started by the bench")?);
    let ((), mut fds) = control.recv()?.context("no leaf")?;
    let socket = DescriptorSocket::new(fds.pop().context("no socket")?);
    let memory = Arc::new(Mutex::new(Memory::new()?));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let address = runtime.block_on(grpc::serve(Arc::clone(&memory)))?;
    control.send(&Answer::Serving(address.port()), &[])?;
    let mut top = Top { control, socket, segments: Vec::new(), memory, last: None };
    while let Some((order, fds)) = top.control.recv()? {
        let answer = top.obey(order, fds)?;
        top.control.send(&answer, &[])?;
    }
    Ok(())
}

// === impl Top ===

impl Top {
    fn obey(&mut self, order: Order, mut fds: Vec<OwnedFd>) -> anyhow::Result<Answer> {
        Ok(match order {
            Order::Map { size } => {
                let fd = fds.pop().context("a segment without its fd")?;
                self.segments.push(SegmentReader::map(fd, CHAIN, u32::try_from(size)?)?);
                Answer::Done
            }
            Order::Receive { handoffs, fold, core } => {
                pin(core)?;
                self.control.send(&Answer::Done, &[])?;
                let received = self.receive(handoffs, fold)?;
                pin(None)?;
                Answer::Received(received)
            }
            Order::Compare { size } => {
                self.compare(size)?;
                Answer::Done
            }
            Order::Cpu => Answer::Cpu(clock::cpu()),
        })
    }

    fn receive(&mut self, handoffs: u32, fold: bool) -> anyhow::Result<Vec<u64>> {
        let memory = Arc::clone(&self.memory);
        let mut memory = memory.blocking_lock();
        let mut received = Vec::with_capacity(usize::try_from(handoffs)?);
        let mut descriptors: Vec<Descriptor> = Vec::new();
        for _ in 0..handoffs {
            descriptors.clear();
            self.socket.recv_into(&mut descriptors)?;
            let [descriptor] = descriptors[..] else { bail!("{} descriptors at once", descriptors.len()) };
            ensure!(descriptor.src == role::LEAF, "a descriptor from {}", descriptor.src);
            let size = usize::try_from(descriptor.segment)?;
            let reader = self.segments.get(size).context("a segment that nobody handed over")?;
            let object = reader.described(&descriptor, SIZES[size].1 as u64)?;
            let run = object.runs().first().context("an object without a run")?;
            let floats = object.run_f32(run).context("a run of something else")?;
            if fold {
                memory.fold(floats.len(), object.run_bytes(run))?;
            }
            received.push(clock::now());
            check_stamps(floats, size, descriptor.round)?;
            if fold {
                memory.check_fold(floats)?;
            }
            ensure!(object.still_valid(), "an object was recycled under its reader");
            self.last = Some((size, descriptor.round));
            self.socket.send_all(&[Descriptor::new(Kind::Release, CHAIN, role::LEAF).with_key(descriptor.key())])?;
        }
        Ok(received)
    }

    /// Everything, bit by bit: what gRPC brought, what is mapped, and what the leaf was to write.
    fn compare(&self, size: usize) -> anyhow::Result<()> {
        let memory = self.memory.blocking_lock();
        let elements = SIZES[size].1;
        let received = as_f32(&memory.received[..memory.length]).context("not whole floats")?;
        ensure!(received.len() == elements, "gRPC brought {} elements instead of {elements}", received.len());
        let (last, serial) = self.last.context("nothing was handed over")?;
        ensure!(last == size, "the object handed over last has another size");
        // The leaf sealed one more for the transfer to compare.
        let stamp = stamp(serial + 1);
        for (i, x) in received.iter().enumerate() {
            let want = if stamped(elements).contains(&i) { stamp } else { value(i, size) };
            ensure!(x.to_bits() == want.to_bits(), "gRPC: element {i} is {x} instead of {want}");
        }
        Ok(())
    }
}

// === impl Memory ===

impl Memory {
    fn new() -> anyhow::Result<Self> {
        let bytes = SIZES[LARGEST].1 * size_of::<f32>();
        let spec = SegmentSpec { chain: CHAIN, writer: role::TOP, slots: 2, payload_bytes: bytes as u64, max_runs: 1 };
        let (segment, _fd) = Segment::create(spec)?;
        let mut sums = [segment.reserve(), segment.reserve()].into_iter().flatten();
        let (Some(a), Some(b)) = (sums.next(), sums.next()) else { bail!("a new segment is full") };
        Ok(Self { received: vec![1; bytes], length: 0, sums: [a, b] })
    }

    /// Adds an update to the sum, in the other slot; it is then the sum.
    fn fold(&mut self, elements: usize, update: &[u8]) -> anyhow::Result<()> {
        let [from, to] = &mut self.sums;
        let base = as_f32(from.payload()).context("a slot is aligned")?;
        let inputs = [Input { bytes: update, dtype: Dtype::F32, factor: 1.0 }];
        fold_f32(&mut to.payload_f32_mut()[..elements], Some(&base[..elements]), &inputs);
        self.swap();
        Ok(())
    }

    /// [`Self::fold`] of what gRPC brought.
    pub(super) fn fold_received(&mut self) -> anyhow::Result<()> {
        let received = std::mem::take(&mut self.received);
        let folded = self.fold(self.length / size_of::<f32>(), &received[..self.length]);
        self.received = received;
        folded
    }

    /// Adds a part of an update, from byte `at` on; the sum counts after [`Self::swap`]. The part's length, if it fits.
    pub(super) fn fold_part(&mut self, at: usize, part: &[u8]) -> Option<usize> {
        let range = at / size_of::<f32>()..(at + part.len()) / size_of::<f32>();
        let [from, to] = &mut self.sums;
        let inputs = [Input { bytes: part, dtype: Dtype::F32, factor: 1.0 }];
        let base = as_f32(from.payload())?.get(range.clone())?;
        fold_f32(to.payload_f32_mut().get_mut(range)?, Some(base), &inputs);
        Some(part.len())
    }

    pub(super) fn swap(&mut self) {
        self.sums.swap(0, 1);
    }

    fn check_fold(&self, update: &[f32]) -> anyhow::Result<()> {
        let [sum, base] = &self.sums;
        let (sum, base) = (as_f32(sum.payload()), as_f32(base.payload()));
        let (sum, base) = sum.zip(base).context("a slot is aligned")?;
        for at in (0..update.len()).step_by(update.len().div_ceil(1000)) {
            let want = base[at] + update[at];
            ensure!(sum[at].to_bits() == want.to_bits(), "element {at} of the sum is {} instead of {want}", sum[at]);
        }
        Ok(())
    }
}
