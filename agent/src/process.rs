//! Function processes: started from this same binary, with nothing but their private channel.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Command, Stdio},
};

use lifl_daemon::{Channel, logs::Format};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};

/// A function that was started.
#[derive(Debug)]
pub(crate) struct Spawned {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) control: OwnedFd,
}

/// Starts an aggregator. It has no environment, no standard output, and sits in a process group of its own.
pub(crate) fn spawn(uid: Option<u32>, log: Format, log_level: &str) -> io::Result<Spawned> {
    let (control, theirs) = Channel::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["aggregator", &format!("--log-level={log_level}"), &format!("--log={log}")])
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .env_clear()
        .process_group(0)
        .current_dir("/");
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let child = command.spawn()?;
    let pid = Pid::from_child(&child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(Spawned { pid: pid.as_raw_nonzero().get(), pidfd, control })
}

/// Ends a function for good. One that has ended already is no error.
pub(crate) fn kill(pidfd: BorrowedFd<'_>) {
    let _ended_already = pidfd_send_signal(pidfd, Signal::KILL);
}

/// Waits for the end of a function that has ended or was killed, and tells how; blocks for its memory to be returned.
pub(crate) fn reap(pidfd: &OwnedFd) -> String {
    match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (_, Some(signal)) => format!("signal {signal}"),
            _ => "unknown status".to_owned(),
        },
        // A function of an earlier agent is the supervisor's to reap; until it has ended it may still send.
        _ => {
            while poll(&mut [PollFd::new(pidfd, PollFlags::IN)], None) == Err(rustix::io::Errno::INTR) {}
            "ended".to_owned()
        }
    }
}
