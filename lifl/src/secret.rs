//! The secret that clients present.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, bail};

/// The secret of `--join-token-file`.
pub(crate) fn read(path: &Path) -> Result<String> {
    let secret = fs::read_to_string(path).with_context(|| format!("--join-token-file {}", path.display()))?;
    match secret.trim() {
        "" => bail!("--join-token-file {} is empty", path.display()),
        secret => Ok(secret.to_owned()),
    }
}
