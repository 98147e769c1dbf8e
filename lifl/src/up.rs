//! `lifl up DIR`.

use anyhow::{Result, anyhow, bail};
use lifl_daemon::logs;
use lifl_gateway::ingress;

use crate::{
    cli::{LogFormat, UpArgs},
    component::single,
    folder,
    platform::{self, Platform, PlatformConfig},
    secret,
};

/// Serves the folder until SIGTERM or Ctrl-C.
///
/// # Errors
/// What is wrong with the folder, a port, or the platform.
pub fn run(args: &UpArgs, log: LogFormat, log_level: &str) -> Result<()> {
    logs::start(log.into(), log_level);
    let mut jobs = folder::read(&args.dir, args.ingress.is_some())?;
    if args.ingress.is_some() {
        ingress::read(&args.dir)
            .map_err(|faults| anyhow!(faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")))?;
    } else if jobs.is_empty() {
        bail!("{}: no FederatedJob in any .yaml or .yml file", args.dir.display());
    }
    if let Some(path) = &args.join_token_file {
        let secret = secret::read(path)?;
        for job in &mut jobs {
            job.join_secret.get_or_insert_with(|| secret.clone());
        }
    }
    let open: Vec<&str> = jobs.iter().filter(|job| job.join_secret.is_none()).map(|job| job.job.name()).collect();
    if !args.listen.ip().is_loopback() && !open.is_empty() && !args.insecure {
        bail!(
            "{} is not a loopback address and anyone could join {}: give the jobs auth.tokenSecretRef, use \
             --join-token-file, or say --insecure",
            args.listen,
            open.join(", ")
        );
    }
    let platform = Platform::start(PlatformConfig {
        listen: args.listen,
        ingress: args.ingress.map(|address| (address, args.dir.clone())),
        admin: args.admin,
        jobs,
        shm_limit: args.platform.shm_limit.map(|size| size.0),
        userspace: args.platform.userspace,
        failpoints: args.platform.failpoint.clone(),
        settings: serde_json::Value::Null,
        state_dir: args.state_dir.clone(),
        log_level: log_level.to_owned(),
        log: log.into(),
    })?;
    if let Some(why) = single(serve(&platform))? {
        bail!("{why}");
    }
    tracing::info!("draining");
    Ok(platform.stop()?)
}

async fn serve(platform: &Platform) -> Result<Option<String>> {
    let stop = platform::stop_signal()?;
    let announce = async {
        platform.ready().await;
        let ingress = platform.ingress.map(tracing::field::display);
        tracing::info!(gateway = %platform.gateway, admin = %platform.admin, ingress, "ready");
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = announce => Ok(None),
        why = platform.ended() => Ok(why),
        () = stop => Ok(None),
    }
}
