//! `lifl crd`.

use std::io::Write as _;

use anyhow::Result;
use kube::CustomResourceExt as _;
use lifl_api::job::FederatedJob;

/// Prints the CustomResourceDefinition as it is generated from the types.
///
/// # Errors
/// When standard output is closed.
pub fn run() -> Result<()> {
    let crd = serde_yaml_ng::to_string(&FederatedJob::crd())?;
    Ok(std::io::stdout().write_all(crd.as_bytes())?)
}
