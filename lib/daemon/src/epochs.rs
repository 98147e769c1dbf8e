//! Which life of each sibling's supervisor a component's own state belongs to.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{Child, ChildError, Deposit};

/// Deposits of these begin with this.
const DEPOSIT: &str = "epoch/";

/// Epochs of the siblings that this component has dealt with; kept over its own death.
#[derive(Debug, Default)]
pub struct Epochs {
    known: BTreeMap<String, u64>,
}

/// What an epoch says of a sibling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// There was none of this name before.
    First,
    /// It may have been started again, and has what it had kept.
    Same,
    /// It is another one: nothing of what the one before had kept is left.
    New,
}

// === impl Epochs ===

impl Epochs {
    /// Takes what an earlier life deposited out of its deposits.
    pub fn take(restored: &mut Vec<Deposit>) -> Self {
        let mut known = BTreeMap::new();
        restored.retain(|deposit| match deposit.key.strip_prefix(DEPOSIT) {
            Some(name) => {
                known.extend(deposit.meta.as_u64().map(|epoch| (name.to_owned(), epoch)));
                false
            }
            None => true,
        });
        Self { known }
    }

    /// What this epoch says of the sibling of this name.
    #[must_use]
    pub fn standing(&self, name: &str, epoch: u64) -> Standing {
        match self.known.get(name) {
            None => Standing::First,
            Some(known) if *known == epoch => Standing::Same,
            Some(_) => Standing::New,
        }
    }

    /// Keeps an epoch, once all that follows from it is done: a life that ends before finds the old one, and does it again.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub async fn keep(&mut self, child: &Child, name: &str, epoch: u64) -> Result<(), ChildError> {
        if self.known.insert(name.to_owned(), epoch) != Some(epoch) {
            child.deposit(&format!("{DEPOSIT}{name}"), &Value::from(epoch), &[]).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Startup, TestSupervisor};

    fn startup(restored: Vec<Deposit>) -> Startup {
        Startup { config: Value::Null, first: restored.is_empty(), restored }
    }

    #[tokio::test]
    async fn epochs_outlive_the_component_and_are_kept_when_it_has_dealt_with_them() {
        let (supervisor, end) = TestSupervisor::new().unwrap();
        let (child, mut begun) = Child::for_test(&supervisor, end, startup(Vec::new())).await.unwrap();
        let mut epochs = Epochs::take(&mut begun.restored);
        assert_eq!(epochs.standing("agent", 7), Standing::First);
        epochs.keep(&child, "agent", 7).await.unwrap();
        assert_eq!(epochs.standing("agent", 7), Standing::Same);
        assert_eq!(epochs.standing("agent", 8), Standing::New);
        assert_eq!(epochs.standing("gateway", 8), Standing::First);
        let (_, kept) = supervisor.next_deposit().await.unwrap();

        let other = Deposit { key: "listener".into(), meta: Value::Null, fds: Vec::new() };
        let mut restored = vec![kept.unwrap(), other];
        let epochs = Epochs::take(&mut restored);
        assert_eq!((epochs.standing("agent", 7), epochs.standing("agent", 8)), (Standing::Same, Standing::New));
        assert_eq!(restored.iter().map(|deposit| deposit.key.as_str()).collect::<Vec<_>>(), ["listener"]);
    }
}
