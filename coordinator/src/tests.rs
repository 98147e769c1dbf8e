//! Tests of more than one module.

use std::{fs::File, io::Write as _, os::fd::OwnedFd};

use lifl_api::{
    job::FederatedJob,
    node::{ChainState, ReceiptEntry},
};
use rustix::fs::{MemfdFlags, memfd_create};

mod api;
mod edges;
mod kubernetes;
mod simulation;
mod store;
mod transitions;

/// A job of `goal` updates, at least `min`, over `rounds`; `more` are further lines of its spec.
fn job(rounds: u32, goal: u32, min: u32, checkpoint: &str, initial: &str, more: &str) -> FederatedJob {
    let text = format!(
        "apiVersion: fl.lifl.dev/v1alpha1\nkind: FederatedJob\nmetadata: {{name: digits}}\nspec:\n  \
         model: {{name: m, initial: {{uri: '{initial}'}}}}\n  rounds: {rounds}\n  clientsPerRound: {goal}\n  \
         minClients: {min}\n  roundDeadline: 10s\n  checkpoint: {{uri: '{checkpoint}'}}\n{more}"
    );
    FederatedJob::from_yaml(&text).unwrap()
}

/// A safetensors file of one F32 tensor.
fn model(values: &[f32]) -> Vec<u8> {
    let header = format!(
        "{{\"w\":{{\"dtype\":\"F32\",\"shape\":[{}],\"data_offsets\":[0,{}]}}}}",
        values.len(),
        values.len() * 4
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

/// A memfd that holds `bytes` from `offset` on, as a segment holds a model.
fn segment(offset: usize, bytes: &[u8]) -> OwnedFd {
    let mut file = File::from(memfd_create("segment", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&vec![0xAA; offset]).unwrap();
    file.write_all(bytes).unwrap();
    file.into()
}

/// A receipt of `count` updates of weight 2.
fn receipt(count: u32) -> Vec<ReceiptEntry> {
    let entry =
        |i| ReceiptEntry { source: format!("/c{i}"), id: format!("r-{i}"), weight: 2.0, digest: "crc32c-0".into() };
    (0..count).map(entry).collect()
}

/// What a gateway says of a chain whose round is open and empty.
fn chain_state(chain: u32, job: &str, round: u32) -> ChainState {
    let (namespace, job) = ("default".to_owned(), job.to_owned());
    ChainState { chain, namespace, job, round, open: true, admitted: 0, model_round: None }
}
