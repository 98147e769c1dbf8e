//! `lifl plan FILE`: where a job's updates would be aggregated, and why; nothing is started.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
};

use anyhow::{Context as _, Result, bail};
use lifl_api::{
    job::{FederatedJob, MAX_SELECTED},
    plan::{Plan, SCHEMA},
};
use lifl_autoscaler::{
    Load,
    plan::{Job, Node, decide},
};
use lifl_coordinator::checkpoint::{Source, path_of};
use serde::Serialize;

use crate::{
    cli::{PlanArgs, PlanOutput},
    folder, nodes,
    platform::memory_limit,
};

/// Exit code of `--diff` when the plans differ: 1 says that something failed.
pub const DIFFERS: u8 = 3;

/// Prints the plan, or how it differs from another one.
///
/// # Errors
/// A file that cannot be read or a job that cannot be aggregated on these nodes, with the value that is wrong.
pub fn run(args: &PlanArgs) -> Result<ExitCode> {
    let job = job(&args.file, args.job.as_deref())?;
    let mut nodes = nodes::read(args.nodes.as_deref(), &args.node)?;
    if nodes.is_empty() {
        nodes.push(this_machine());
    }
    let update = update_size(&job)?;
    let plan = decide(&Job::of(&job, update), &nodes, args.policy)
        .with_context(|| format!("{}: job {} cannot be planned", args.file.display(), job.name()))?;
    let Some(older) = &args.diff else {
        print(&plan, args.output)?;
        return Ok(ExitCode::SUCCESS);
    };
    let diff = older_plan(older)?.diff(&plan);
    print(&diff, args.output)?;
    Ok(if diff.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(DIFFERS) })
}

fn print(document: &(impl Serialize + ToString), output: PlanOutput) -> Result<()> {
    let text = match output {
        PlanOutput::Table => document.to_string(),
        PlanOutput::Yaml => serde_yaml_ng::to_string(document)?,
        PlanOutput::Json => serde_json::to_string_pretty(document)? + "\n",
    };
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// As `lifl up` uses it. Alone it takes all clients that a round may have; what bounds it is memory, and jobs get half of that.
fn this_machine() -> Node {
    Node {
        name: "local".to_owned(),
        capacity: f64::from(MAX_SELECTED),
        memory: memory_limit() / 2,
        bandwidth: u64::MAX,
        cores: thread::available_parallelism().ok().and_then(|cores| u32::try_from(cores.get()).ok()),
        load: Load::default(),
    }
}

/// The file's job, or the one of this name.
fn job(path: &Path, name: Option<&str>) -> Result<FederatedJob> {
    let jobs = folder::read_file(path)?;
    let names = jobs.iter().map(FederatedJob::name).collect::<Vec<_>>().join(", ");
    let mut wanted = jobs.into_iter().filter(|job| name.is_none_or(|name| job.name() == name));
    match (wanted.next(), wanted.next(), name) {
        (Some(job), None, _) => Ok(job),
        (None, _, Some(name)) => bail!("{}: no job {name}; there is: {names}", path.display()),
        (None, _, None) => bail!("{}: no FederatedJob", path.display()),
        (Some(_), Some(_), _) => bail!("{}: several jobs, say with --job which one: {names}", path.display()),
    }
}

/// Bytes that an update of the job takes: its model's floats in the widest type that clients may send; where the model is not here,
/// the largest body that is accepted. None: neither is known.
fn update_size(job: &FederatedJob) -> Result<Option<u64>> {
    let largest = job.spec.update.max_size.map(|size| size.0);
    let Some(uri) = &job.spec.model.initial.uri else { return Ok(largest) };
    let path = path_of(uri).with_context(|| format!("model.initial.uri of job {}", job.name()))?;
    // A plan may be made on another machine than the one that has the model.
    let Ok(file) = fs::File::open(&path) else { return Ok(largest) };
    let length = file.metadata().with_context(|| path.display().to_string())?.len();
    let manifest = match Source::new(file.into(), 0, length).manifest() {
        Ok(manifest) => manifest,
        Err(why) => bail!("{}, the first model of job {}: {why}", path.display(), job.name()),
    };
    let widest = job.spec.update.dtypes.iter().map(|dtype| dtype.size()).max().unwrap_or(4);
    Ok(Some(manifest.elements() * widest))
}

/// A plan that was written with `-o json` or `-o yaml`: JSON is YAML.
fn older_plan(path: &PathBuf) -> Result<Plan> {
    let text = fs::read_to_string(path).with_context(|| format!("--diff {}", path.display()))?;
    let plan: Plan = serde_yaml_ng::from_str(&text).with_context(|| {
        format!("--diff {} is not a plan as `lifl plan -o json` or `-o yaml` writes it", path.display())
    })?;
    if plan.schema != SCHEMA {
        bail!("--diff {}: its schema is '{}', {SCHEMA} is what can be compared", path.display(), plan.schema);
    }
    Ok(plan)
}
