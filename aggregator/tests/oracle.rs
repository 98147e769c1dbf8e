//! Eager == lazy == flat weighted mean, for random trees, orders and element types; the reproducible mode to the bit.
//!
//! Real aggregators over real sockets, segments and the userspace router. The test plays agent and gateway.

#![expect(clippy::unwrap_used, reason = "a harness of a test: a failure anywhere is the test's")]

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
};

use half::{bf16, f16};
use lifl_aggregator::FunctionError;
use lifl_api::node::{FromAgent, RoleConfig, ToAgent};
use lifl_daemon::{Channel, SyncChannel};
use lifl_ebpf::{Path, pair, wire::DescriptorSocket};
use lifl_ebpf_common::{
    Descriptor, Kind,
    descriptor::{ObjectKey, flags},
    maps::{ANY_CHAIN, Member, RouteKey},
    role,
};
use lifl_shm::{Element, ObjectKind, ObjectMeta, Run, Segment, SegmentReader, SegmentSpec};
use proptest::{prelude::*, strategy::ValueTree as _};
use safetensors::{Dtype, tensor::TensorView};

const CHAIN: u32 = 7;

/// One client's update.
#[derive(Clone, Debug)]
struct Update {
    values: Vec<f32>,
    weight: f64,
    /// Element type of the first half and of the second.
    dtypes: (Element, Element),
}

/// Segments by id with the role of their writer, and who waits for one.
type Known = (Mutex<HashMap<u32, (u32, OwnedFd)>>, Condvar);
type Segments = Arc<Known>;

/// A chain of aggregators whose agent and gateway the test is.
struct Chain {
    path: Arc<Path>,
    gateway: DescriptorSocket,
    segments: Segments,
    controls: Arc<Mutex<Vec<Arc<SyncChannel>>>>,
    functions: Vec<JoinHandle<Result<(), FunctionError>>>,
    next_segment: Arc<AtomicU32>,
    updates: Segment,
    kept: Vec<OwnedFd>,
    elements: u64,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    leaves: u32,
    eager: bool,
    batch: u32,
    fixed_scale: Option<f64>,
    diff: bool,
}

fn model_file(values: &[f32], counter: i64) -> Vec<u8> {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let steps = counter.to_le_bytes();
    let tensors = [
        ("weight", TensorView::new(Dtype::F32, vec![values.len()], &bytes).unwrap()),
        ("steps", TensorView::new(Dtype::I64, vec![], &steps).unwrap()),
    ];
    safetensors::serialize(tensors, None).unwrap()
}

impl Chain {
    fn start(shape: Shape, elements: u64, updates: u32) -> Self {
        let path = Arc::new(Path::userspace().unwrap());
        let (a, b) = pair().unwrap();
        path.register(Some(a.as_fd()), b.as_fd(), Member { chain: ANY_CHAIN, ..Member::default() }).unwrap();
        path.set_route(RouteKey { chain: CHAIN, dst: role::GATEWAY }, 0).unwrap();
        let spec = SegmentSpec {
            chain: CHAIN,
            writer: 0,
            slots: updates + 2,
            payload_bytes: elements * 4 + 4096,
            max_runs: 4,
        };
        let (segment, fd) = Segment::create(spec).unwrap();
        assert!(segment.set_id(1));
        let mut chain = Self {
            path,
            gateway: DescriptorSocket::new(a),
            segments: Arc::new((Mutex::new(HashMap::from([(1, (0, fd))])), Condvar::new())),
            controls: Arc::default(),
            functions: Vec::new(),
            next_segment: Arc::new(AtomicU32::new(2)),
            updates: segment,
            kept: vec![b],
            elements,
        };
        let leaf_parent = if shape.leaves > 1 { role::MIDDLE } else { role::TOP };
        let mut roles: Vec<(u32, Option<u32>)> = vec![(role::TOP, None)];
        if shape.leaves > 1 {
            roles.push((role::MIDDLE, Some(role::TOP)));
            roles.extend((0..shape.leaves).map(|i| (role::LEAF + i, Some(leaf_parent))));
        }
        for (seat, (role, parent)) in (1..).zip(roles) {
            chain.join(
                seat,
                RoleConfig {
                    role,
                    parent,
                    elements,
                    model_bytes: elements * 4 + 4096,
                    max_runs: 4,
                    fixed_scale: shape.fixed_scale,
                    eager: shape.eager,
                    batch: shape.batch,
                    diff: shape.diff,
                },
            );
        }
        chain
    }

    fn join(&mut self, seat: u32, config: RoleConfig) {
        let (ours, theirs) = Channel::pair().unwrap();
        let (a, b) = pair().unwrap();
        let role = config.role;
        self.path
            .register(Some(a.as_fd()), b.as_fd(), Member { chain: CHAIN, role, counter: seat, reserved: 0 })
            .unwrap();
        self.path.set_route(RouteKey { chain: CHAIN, dst: role }, seat).unwrap();
        self.kept.push(b);
        let control = Arc::new(SyncChannel::new(ours));
        self.functions.push(thread::spawn(move || lifl_aggregator::run(theirs)));
        control.send(&FromAgent::Role { chain: CHAIN, config, failpoint: None }, &[]).unwrap();
        for (id, (writer, fd)) in self.segments.0.lock().unwrap().iter() {
            control.send(&FromAgent::Segment { chain: CHAIN, segment: *id, writer: *writer }, &[fd.as_fd()]).unwrap();
        }
        control.send(&FromAgent::DataSocket, &[a.as_fd()]).unwrap();
        self.controls.lock().unwrap().push(control.clone());
        let (segments, controls, next) = (self.segments.clone(), self.controls.clone(), self.next_segment.clone());
        thread::spawn(move || play_agent(&control, role, &segments, &controls, &next));
    }

    fn write(&self, update: &Update, round: u32) -> Descriptor {
        let mut slot = self.updates.reserve().expect("a free slot");
        let half = update.values.len() / 2;
        let mut runs = Vec::new();
        let mut at = 0;
        for (first, values, dtype) in
            [(0, &update.values[..half], update.dtypes.0), (half, &update.values[half..], update.dtypes.1)]
        {
            if values.is_empty() {
                continue;
            }
            let bytes = encode(values, dtype);
            slot.payload_mut()[at..at + bytes.len()].copy_from_slice(&bytes);
            runs.push(Run { first: first as u64, elements: values.len() as u64, offset: at as u64, dtype });
            at = (at + bytes.len()).next_multiple_of(64);
        }
        let meta =
            ObjectMeta { kind: ObjectKind::Update, round, count: 1, weight: update.weight, length: at as u64, runs };
        slot.seal(&meta).unwrap().descriptor(Kind::Update, 0)
    }

    fn write_base(&self, file: &[u8], round: u32) -> Descriptor {
        let mut slot = self.updates.reserve().expect("a free slot");
        slot.payload_mut()[..file.len()].copy_from_slice(file);
        let meta = ObjectMeta {
            kind: ObjectKind::Model,
            round: round - 1,
            count: 0,
            weight: 0.0,
            length: file.len() as u64,
            runs: vec![],
        };
        Descriptor { round, ..slot.seal(&meta).unwrap().descriptor(Kind::Model, role::TOP) }
    }

    /// Runs a round; `order` says which update comes when, `to` to which leaf. Returns the model file.
    fn round(
        &self,
        round: u32,
        base: &[f32],
        updates: &[Update],
        to: &[u32],
        shape: Shape,
        close_first: bool,
    ) -> Vec<u8> {
        let target = |leaf: u32| if shape.leaves > 1 { role::LEAF + leaf % shape.leaves } else { role::TOP };
        self.gateway.send_all(&[self.write_base(&model_file(base, 42), round)]).unwrap();
        let mut counts: HashMap<u32, u32> = HashMap::new();
        let sends: Vec<Descriptor> = updates
            .iter()
            .zip(to)
            .map(|(update, leaf)| {
                *counts.entry(target(*leaf)).or_default() += 1;
                Descriptor { dst: target(*leaf), ..self.write(update, round) }
            })
            .collect();
        let total = u32::try_from(updates.len()).unwrap();
        let mut closes: Vec<(u32, u32)> = vec![(role::TOP, total)];
        if shape.leaves > 1 {
            closes.push((role::MIDDLE, total));
            closes.extend(
                (0..shape.leaves).map(|i| (role::LEAF + i, counts.get(&(role::LEAF + i)).copied().unwrap_or(0))),
            );
        }
        let closes: Vec<Descriptor> = closes
            .into_iter()
            .map(|(dst, count)| Descriptor { round, count, ..Descriptor::new(Kind::Close, CHAIN, dst) })
            .collect();
        let all = if close_first { [closes, sends.clone()] } else { [sends.clone(), closes] };
        self.gateway.send_all(&all.concat()).unwrap();
        self.hear(round, &sends, total)
    }

    /// Plays the gateway's half: every input is contained exactly once, in the end all in the model.
    fn hear(&self, round: u32, updates: &[Descriptor], total: u32) -> Vec<u8> {
        let mut parent: HashMap<ObjectKey, ObjectKey> = HashMap::new();
        let mut sealed: HashMap<ObjectKey, u32> = HashMap::new();
        let mut got = Vec::new();
        loop {
            got.clear();
            assert_ne!(self.gateway.recv_into(&mut got).unwrap(), 0, "the path closed the gateway's socket");
            for d in &got {
                assert_eq!(d.round, round);
                match Kind::from_u8(d.kind) {
                    Some(Kind::Release) => {
                        assert_eq!(parent.insert(d.key(), d.contained_in()), None, "contained twice: {d:?}");
                    }
                    Some(Kind::Sealed) => {
                        let again = sealed.insert(d.key(), d.count).is_some();
                        assert!(!again || d.flags & flags::FINAL != 0);
                    }
                    Some(Kind::Model) => {
                        assert_eq!(d.count, total);
                        for update in updates {
                            let mut at = update.key();
                            while let Some(next) = parent.get(&at) {
                                at = *next;
                            }
                            assert_eq!(at, d.key(), "update {update:?} is not in the model");
                            assert!(self.updates.release(update.slot, update.generation));
                        }
                        return self.read(d);
                    }
                    other => panic!("unexpected {other:?}"),
                }
            }
        }
    }

    fn read(&self, d: &Descriptor) -> Vec<u8> {
        // The agent's half of the test may not have read the segment's announcement yet.
        let known = self.segments.0.lock().unwrap();
        let segments = self.segments.1.wait_while(known, |known| !known.contains_key(&d.segment)).unwrap();
        let (_, fd) = &segments[&d.segment];
        let reader = SegmentReader::map(fd, CHAIN, d.segment).unwrap();
        reader.described(d, self.elements).unwrap().payload().to_vec()
    }

    fn stop(self) {
        for control in self.controls.lock().unwrap().iter() {
            control.send(&FromAgent::Drain, &[]).unwrap();
        }
        for function in self.functions {
            function.join().unwrap().unwrap();
        }
    }
}

fn play_agent(
    control: &SyncChannel,
    role: u32,
    segments: &Known,
    controls: &Mutex<Vec<Arc<SyncChannel>>>,
    next: &AtomicU32,
) {
    while let Ok(Some((word, fds))) = control.recv::<ToAgent>() {
        match word {
            ToAgent::Grant { request, chain, .. } => {
                let segment = next.fetch_add(1, Ordering::Relaxed);
                control.send(&FromAgent::Granted { request, chain, segment }, &[]).unwrap();
            }
            ToAgent::Segment { chain, segment, .. } => {
                let fd = fds.into_iter().next().unwrap();
                for other in controls.lock().unwrap().iter().filter(|other| !std::ptr::eq(&***other, control)) {
                    let _ended_already =
                        other.send(&FromAgent::Segment { chain, segment, writer: role }, &[fd.as_fd()]);
                }
                segments.0.lock().unwrap().insert(segment, (role, fd));
                segments.1.notify_all();
                control.send(&FromAgent::Kept { chain, segment }, &[]).unwrap();
            }
            ToAgent::Failed { reason } => panic!("function {role}: {reason}"),
            _ => {}
        }
    }
}

fn encode(values: &[f32], dtype: Element) -> Vec<u8> {
    match dtype {
        Element::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        Element::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

fn as_sent(update: &Update, index: usize) -> f64 {
    let value = update.values[index];
    let dtype = if index < update.values.len() / 2 { update.dtypes.0 } else { update.dtypes.1 };
    match dtype {
        Element::F16 => f64::from(f16::from_f32(value)),
        Element::Bf16 => f64::from(bf16::from_f32(value)),
        _ => f64::from(value),
    }
}

fn floats(file: &[u8]) -> Vec<f32> {
    let tensors = safetensors::SafeTensors::deserialize(file).unwrap();
    assert_eq!(tensors.tensor("steps").unwrap().data(), 42i64.to_le_bytes(), "other tensors are the base's");
    tensors
        .tensor("weight")
        .unwrap()
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

fn check(model: &[f32], base: &[f32], updates: &[Update], diff: bool) -> Result<(), TestCaseError> {
    let total: f64 = updates.iter().map(|u| u.weight).sum();
    for (i, got) in model.iter().enumerate() {
        let sum: f64 = updates.iter().map(|u| u.weight * as_sent(u, i)).sum();
        let size: f64 = updates.iter().map(|u| u.weight * as_sent(u, i).abs()).sum::<f64>() / total;
        let want = sum / total + if diff { f64::from(base[i]) } else { 0.0 };
        let bound = 1e-6 * (updates.len() as f64 + 4.0) * (size + want.abs()) + 1e-30;
        prop_assert!((f64::from(*got) - want).abs() <= bound, "element {i}: {got} is not {want} within {bound}");
    }
    Ok(())
}

fn element() -> impl Strategy<Value = Element> {
    prop_oneof![Just(Element::F32), Just(Element::F16), Just(Element::Bf16)]
}

fn updates(elements: usize) -> impl Strategy<Value = Vec<Update>> {
    let one = (prop::collection::vec(-100f32..100.0, elements), 1u32..10_000, element(), element())
        .prop_map(|(values, weight, a, b)| Update { values, weight: f64::from(weight), dtypes: (a, b) });
    prop::collection::vec(one, 1..10)
}

fn case() -> impl Strategy<Value = (Vec<Update>, Vec<u32>, Shape, bool)> {
    let shape = (1u32..5, any::<bool>(), 1u32..5, any::<bool>(), any::<bool>()).prop_map(
        |(leaves, eager, batch, fixed, diff)| Shape {
            leaves,
            eager,
            batch,
            fixed_scale: fixed.then_some(f64::from(1u32 << 22)),
            diff,
        },
    );
    (
        prop_oneof![Just(2usize), Just(67), Just(1000)].prop_flat_map(updates),
        prop::collection::vec(0u32..8, 10),
        shape,
        any::<bool>(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_order_and_dtype_gives_the_flat_weighted_mean((updates, to, shape, close_first) in case()) {
        let elements = updates[0].values.len();
        let base: Vec<f32> = (0..elements).map(|i| i as f32 / 7.0).collect();
        let chain = Chain::start(shape, elements as u64, 10);
        for round in 1..4 {
            let model = chain.round(round, &base, &updates, &to, shape, close_first);
            check(&floats(&model), &base, &updates, shape.diff)?;
        }
        chain.stop();
    }
}

#[test]
fn reproducible_sums_have_the_same_bits_for_any_order_and_tree() {
    let elements = 513;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..6 {
        let mut sent = updates(elements).new_tree(&mut runner).unwrap().current();
        let mut models = Vec::new();
        for (leaves, eager, batch) in [(1, true, 1), (1, false, 9), (2, true, 3), (4, true, 1), (3, false, 2)] {
            let shape = Shape { leaves, eager, batch, fixed_scale: Some(f64::from(1u32 << 22)), diff: false };
            let chain = Chain::start(shape, elements as u64, 10);
            let to: Vec<u32> = (0..10).map(|i| i * leaves + batch).collect();
            models.push(chain.round(1, &vec![0.0; elements], &sent, &to, shape, !eager));
            chain.stop();
            sent.rotate_left(1);
        }
        assert!(models.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn what_is_sent_again_counts_once_and_roles_change_by_message() {
    let shape = Shape { leaves: 1, eager: true, batch: 2, fixed_scale: None, diff: false };
    let chain = Chain::start(shape, 4, 10);
    let update = |x: f32, weight: f64| Update { values: vec![x; 4], weight, dtypes: (Element::F32, Element::F32) };
    let sent = [update(1.0, 1.0), update(4.0, 2.0)];
    chain.gateway.send_all(&[chain.write_base(&model_file(&[0.0; 4], 42), 1)]).unwrap();
    let descriptors: Vec<Descriptor> =
        sent.iter().map(|u| Descriptor { dst: role::TOP, ..chain.write(u, 1) }).collect();
    for _ in 0..3 {
        chain.gateway.send_all(&descriptors).unwrap();
    }
    let close = Descriptor { round: 1, count: 2, ..Descriptor::new(Kind::Close, CHAIN, role::TOP) };
    chain.gateway.send_all(&[close, close]).unwrap();
    assert_eq!(floats(&chain.hear(1, &descriptors, 2)), [3.0; 4]);

    // The top becomes a leaf below nobody who listens: its sum is announced as final, and no model comes.
    let config = RoleConfig {
        role: role::LEAF,
        parent: Some(role::MIDDLE),
        elements: 4,
        model_bytes: 4112,
        max_runs: 4,
        fixed_scale: None,
        eager: true,
        batch: 2,
        diff: false,
    };
    chain.path.set_role(1, role::LEAF).unwrap();
    chain.path.set_route(RouteKey { chain: CHAIN, dst: role::LEAF }, 1).unwrap();
    let control = chain.controls.lock().unwrap()[0].clone();
    control.send(&FromAgent::Role { chain: CHAIN, config, failpoint: None }, &[]).unwrap();
    let update = Descriptor { dst: role::LEAF, ..chain.write(&update(5.0, 2.0), 2) };
    let close = Descriptor { round: 2, count: 1, ..Descriptor::new(Kind::Close, CHAIN, role::LEAF) };
    chain.gateway.send_all(&[update, close]).unwrap();
    let mut got = Vec::new();
    while !got.iter().any(|d: &Descriptor| d.flags & flags::FINAL != 0) {
        assert_ne!(chain.gateway.recv_into(&mut got).unwrap(), 0);
    }
    let last = got.last().unwrap();
    assert_eq!((last.src, last.count, last.weight(), last.round), (role::LEAF, 1, 2.0, 2));
    chain.stop();
}
