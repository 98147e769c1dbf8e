//! `lock`: one coordinator at a time writes into a checkpoint folder.
//!
//! The lock is the kernel's, on the open file: it ends with the process, however that dies, so a restart finds nothing to
//! clean. The file stays; it says who has, or last had, the lock.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    thread::sleep,
    time::{Duration, Instant},
};

use super::{Checkpoint, CheckpointError};

/// How long a dying predecessor is waited for: its supervisor may hear of its death before the kernel has closed its files.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);

// === impl Checkpoint ===

impl Checkpoint {
    /// Takes the folder for as long as this value lives. Blocks for a moment while another process has it.
    ///
    /// # Errors
    /// [`CheckpointError::Locked`] when it is another's.
    pub fn lock(&mut self) -> Result<(), CheckpointError> {
        let path = self.root.join("lock");
        let io = |source| CheckpointError::Io { path: path.clone(), source };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if begun.elapsed() < PATIENCE => sleep(PAUSE),
                Err(TryLockError::WouldBlock) => {
                    let holder = holder(&mut file);
                    return Err(CheckpointError::Locked { path: self.root.clone(), holder });
                }
                Err(TryLockError::Error(source)) => return Err(io(source)),
            }
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            writeln!(file, "{}", std::process::id())
        };
        // For people only: a full disk must not keep the job from its checkpoint.
        if let Err(error) = write(&mut file) {
            tracing::warn!(path = %path.display(), %error, "it cannot be written who has the checkpoint");
        }
        self.lock = Some(file);
        Ok(())
    }
}

/// Who has the lock, as far as its file says.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.rewind().and_then(|()| file.take(64).read_to_string(&mut text));
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(pid)) if pid == std::process::id() => format!("this coordinator (process {pid}) for another job"),
        (Ok(_), Ok(pid)) => format!("the coordinator of another `lifl` (process {pid})"),
        _ => "another process".to_owned(),
    }
}
