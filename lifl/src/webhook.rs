//! `lifl webhook`: no supervisor, no child; kubelet starts it again when it dies, and pods start with their sidecar meanwhile.

use std::{future::pending, time::Duration};

use anyhow::Result;
use futures_util::FutureExt as _;
use lifl_cluster::{Client, connect, registration};
use lifl_daemon::{Supervisor, admin, logs};
use lifl_webhook::{CertificateSource, Config};

use crate::{
    cli::{LogFormat, WebhookArgs},
    component::single,
    platform,
};

/// Its registration.
const REGISTRATION: &str = "data-plane.lifl.dev";
/// Whoever registers it anew does not know its root: it is looked after so often.
const LOOK: Duration = Duration::from_secs(10);

/// Serves until SIGTERM.
///
/// # Errors
/// A port or a certificate that cannot be had, no credentials.
pub fn run(args: &WebhookArgs, log: LogFormat, log_level: &str) -> Result<()> {
    logs::start(log.into(), log_level);
    let source = match (&args.certificate, &args.key) {
        (Some(certificate), Some(key)) => {
            CertificateSource::Files { certificate: certificate.clone(), key: key.clone() }
        }
        _ => CertificateSource::SelfMade { names: vec![args.name.clone()] },
    };
    let config = Config { listen: args.listen, ..Config::new(source) };
    single(serve(args, config))
}

async fn serve(args: &WebhookArgs, config: Config) -> Result<()> {
    let stop = platform::stop_signal()?.inspect(|()| tracing::info!("draining"));
    let (admin, listener) = platform::bind(args.admin, "--admin")?;
    let webhook = lifl_webhook::build(config).await?;
    let root = webhook.certificates.root();
    // A certificate of files has its issuer, who is known to whoever registered it.
    let client = match &root {
        Some(_) => Some(connect(args.kubeconfig.as_deref()).await?),
        None => None,
    };
    let trusted = async {
        if let (Some(client), Some(root)) = (client, root) {
            trust(&client, &root).await;
        }
        pending::<()>().await;
    };
    // A supervisor of nobody: its admin page says that this process lives.
    let (supervisor, run) = Supervisor::start(Vec::new())?;
    tokio::spawn(admin::serve(tokio::net::TcpListener::from_std(listener)?, supervisor).boxed());
    tracing::info!(listen = %webhook.address, %admin, "webhook serves");
    tokio::select! {
        () = webhook.run(stop) => Ok(()),
        () = trusted => Ok(()),
        ended = run => Ok(ended?),
    }
}

/// Keeps the root in the registration.
async fn trust(client: &Client, root: &str) {
    let mut last = None;
    loop {
        match registration::trust(client, REGISTRATION, root).await {
            Ok(written) => {
                if written || last.is_some() {
                    tracing::info!(registration = REGISTRATION, "the API server knows this webhook's certificate");
                }
                last = None;
            }
            Err(error) => {
                let why = error.to_string();
                if last.as_ref() != Some(&why) {
                    tracing::error!(
                        why,
                        "the API server cannot know this webhook's certificate: pods keep their sidecars"
                    );
                    last = Some(why);
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}
