//! This binary as one of its components.

use anyhow::{Context as _, Result};
use futures_util::FutureExt as _;
use lifl_daemon::{
    Child,
    logs::{self, Format},
    take_stdin,
};
use rustix::{
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::set_no_new_privs,
};

use crate::cli::{Component, LogFormat};

/// Runs a component until its supervisor or agent ends it.
///
/// # Errors
/// What ended it otherwise; the supervisor starts it again.
pub fn main_as(component: Component, log: LogFormat, log_level: &str) -> Result<()> {
    logs::start(log.into(), log_level);
    match component {
        Component::Aggregator => {
            // A function handles other people's models: nobody but root may look into it, and it can gain nothing.
            set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
            set_no_new_privs(true)?;
            let control = take_stdin().context("aggregators are started by the agent")?;
            Ok(lifl_aggregator::run(control)?)
        }
        Component::Agent => single(async {
            let (child, startup) = Child::from_stdin_outliving().await?;
            Ok(lifl_agent::run(child, startup).await?)
        }),
        Component::Coordinator => single(async {
            let (child, startup) = Child::from_stdin().await?;
            Ok(lifl_coordinator::run(child, startup).await?)
        }),
        Component::Gateway => {
            set_no_new_privs(true)?;
            tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(
                async {
                    let (child, startup) = Child::from_stdin().await?;
                    Ok(lifl_gateway::run(child, startup).await?)
                }
                .boxed_local(),
            )
        }
    }
}

/// Runs it on a runtime of one thread.
pub(crate) fn single<T>(task: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(task.boxed_local())
}

// === impl LogFormat ===

impl From<LogFormat> for Format {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}
