//! From the functions that run to the functions that shall run: as few starts as possible.

use std::collections::BTreeMap;

use lifl_api::node::RoleConfig;

/// One change on the way to a plan.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// The function in this role gets another configuration.
    Configure {
        /// What it is to be.
        config: RoleConfig,
    },
    /// The function in role `from` takes another role, without restart.
    Convert {
        /// Its role until now.
        from: u32,
        /// What it is to be.
        config: RoleConfig,
    },
    /// No function is left over: one is started.
    Start {
        /// What it is to be.
        config: RoleConfig,
    },
    /// More functions than the plan needs.
    Stop {
        /// Role of the one that ends.
        role: u32,
    },
}

/// Changes that lead from `running` to `wanted`.
///
/// Whoever has a wanted role keeps it; who is left over takes a role that nobody has (the paper's reuse, section 5.3: a
/// message instead of a cold start).
#[must_use]
pub fn changes(running: &BTreeMap<u32, RoleConfig>, wanted: &[RoleConfig]) -> Vec<Change> {
    let mut left_over: Vec<u32> =
        running.keys().copied().filter(|role| wanted.iter().all(|config| config.role != *role)).collect();
    left_over.reverse();
    let mut out = Vec::new();
    for config in wanted {
        match running.get(&config.role) {
            Some(now) if now == config => {}
            Some(_) => out.push(Change::Configure { config: config.clone() }),
            None => out.push(match left_over.pop() {
                Some(from) => Change::Convert { from, config: config.clone() },
                None => Change::Start { config: config.clone() },
            }),
        }
    }
    out.extend(left_over.into_iter().map(|role| Change::Stop { role }));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(role: u32, batch: u32) -> RoleConfig {
        RoleConfig {
            role,
            parent: None,
            elements: 1,
            model_bytes: 1,
            max_runs: 1,
            fixed_scale: None,
            eager: true,
            batch,
            diff: false,
        }
    }

    fn running(roles: &[u32]) -> BTreeMap<u32, RoleConfig> {
        roles.iter().map(|role| (*role, config(*role, 8))).collect()
    }

    #[test]
    fn a_plan_that_is_met_changes_nothing() {
        assert_eq!(changes(&running(&[1, 2, 16]), &[config(1, 8), config(2, 8), config(16, 8)]), []);
    }

    #[test]
    fn who_is_left_over_takes_the_missing_role_before_anyone_is_started() {
        let wanted = [config(1, 8), config(16, 8), config(17, 8)];
        let got = changes(&running(&[2, 16]), &wanted);
        assert_eq!(got, [Change::Convert { from: 2, config: config(1, 8) }, Change::Start { config: config(17, 8) }]);
        assert_eq!(
            changes(&running(&[1, 2, 16]), &[config(1, 4)]),
            [Change::Configure { config: config(1, 4) }, Change::Stop { role: 16 }, Change::Stop { role: 2 },]
        );
    }
}
