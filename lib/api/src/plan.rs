//! The plan of a job: which nodes aggregate, with how many aggregators, which of them has the top, and why (paper, 5.1 and 5.2).
//!
//! `lib/api` only says what a plan is; the autoscaler makes it. It is printed as a table ([`Plan`]'s `Display`), written as JSON
//! or YAML, and compared with another one ([`Plan::diff`]). Nodes are kept by name, so that equal plans are equal texts.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::quantity::Bytes;

mod diff;
mod table;

pub use diff::{Change, PlanDiff};

/// `schema` of a [`Plan`].
pub const SCHEMA: &str = "lifl.dev/plan/v1";
/// Leaves per processor, at most: an idle leaf costs two accumulators, a busy one a processor.
pub const LEAVES_PER_CORE: u32 = 4;
/// Accumulators of an aggregator: two take turns.
pub const ACCUMULATORS: u64 = 2;
/// Updates for which a node has memory, at least: one is folded while the next one comes in, else clients would only wait for
/// each other.
pub const LEAST_SLOTS: u64 = 2;
/// Models of the top: the one served and the one being made.
pub const TOP_MODELS: u64 = 2;
/// Model-sized slots of a gateway: the base that differences are added to.
pub const GATEWAY_MODELS: u64 = 1;

/// Which of the nodes that have room takes a client's update (paper, 5.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Policy {
    /// The one with least room: LIFL's. Few nodes are used, and partials cross between few.
    #[default]
    BestFit,
    /// The one with most room: what Knative's least connections come to.
    WorstFit,
    /// The first one by name.
    FirstFit,
    /// The next one by name.
    RoundRobin,
}

/// A word that is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a policy: bestfit (LIFL's), worstfit, firstfit or roundrobin")]
pub struct PolicyError(pub String);

/// What a job's rounds are to be aggregated by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Plan {
    /// [`SCHEMA`].
    pub schema: String,
    /// Namespace of the job.
    pub namespace: String,
    /// The job.
    pub job: String,
    /// How clients were placed.
    pub policy: Policy,
    /// Updates that close a round.
    pub goal: u32,
    /// Clients that are selected for a round: more than `goal`, against dropouts.
    pub clients: u32,
    /// Updates per leaf: the paper's `I`.
    pub leaf_fan_in: u32,
    /// Bytes that an update takes; absent: not known, so that memory and links were no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_size: Option<Bytes>,
    /// Every node by its name, those too that take no part.
    pub nodes: BTreeMap<String, NodeShare>,
}

/// What a node has of the job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeShare {
    /// Clients that send their updates here; 0: the node takes no part.
    pub clients: u32,
    /// Aggregators that take updates.
    pub leaves: u32,
    /// One takes what the leaves have made. A leaf alone needs none: its partial goes up as it is.
    pub middle: bool,
    /// The cluster's top is here.
    pub top: bool,
    /// What it follows from.
    pub why: Why,
}

/// The figures behind a node's share; all are finite.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Why {
    /// `MC`: updates that it aggregates at once before each takes longer.
    pub capacity: f64,
    /// `k`: updates a second that arrive there already.
    pub arrivals: f64,
    /// `E`: seconds that it takes there to aggregate one.
    pub execution_seconds: f64,
    /// `RC = MC - k·E`: updates at once for which there was room before this job.
    pub residual: f64,
    /// `Q` of this job: updates that are there at once. Leaves are `Q / I`, rounded up.
    pub queue: f64,
    /// Leaves that its processors and memory bear; absent: no bound is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most_leaves: Option<u32>,
    /// Updates that its memory holds at once; fewer than clients: they wait for each other. Absent: no bound is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
}

// === impl Policy ===

impl Policy {
    /// All of them, LIFL's first.
    pub const ALL: [Self; 4] = [Self::BestFit, Self::WorstFit, Self::FirstFit, Self::RoundRobin];

    /// As the command line has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::BestFit => "bestfit",
            Self::WorstFit => "worstfit",
            Self::FirstFit => "firstfit",
            Self::RoundRobin => "roundrobin",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    /// Takes the command line's words and those of documents alike: `bestfit`, `BestFit`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|policy| policy.name().eq_ignore_ascii_case(text));
        found.ok_or_else(|| PolicyError(text.to_owned()))
    }
}

// === impl Plan ===

impl Plan {
    /// The nodes that take part, by name.
    pub fn taking_part(&self) -> impl Iterator<Item = (&str, &NodeShare)> {
        self.nodes.iter().filter(|(_, share)| share.clients > 0).map(|(name, share)| (name.as_str(), share))
    }

    /// The node that has the top.
    #[must_use]
    pub fn top(&self) -> Option<&str> {
        self.nodes.iter().find(|(_, share)| share.top).map(|(name, _)| name.as_str())
    }

    /// Leaves of all nodes. With reuse no more aggregators than these are started: who has finished first becomes middle, and top.
    #[must_use]
    pub fn leaves(&self) -> u32 {
        self.nodes.values().map(|share| share.leaves).sum()
    }

    /// Middles of all nodes.
    #[must_use]
    pub fn middles(&self) -> u32 {
        self.nodes.values().map(|share| u32::from(share.middle)).sum()
    }

    /// What has to be changed to make `newer` of this one.
    #[must_use]
    pub fn diff(&self, newer: &Self) -> PlanDiff {
        PlanDiff::between(self, newer)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The paper's figure 8 at 60 updates, less a few: two nodes take part, a third does not.
    pub(crate) fn plan() -> Plan {
        let why = |queue| Why {
            capacity: 20.0,
            arrivals: 4.0,
            execution_seconds: 0.5,
            residual: 18.0,
            queue,
            most_leaves: Some(64),
            slots: None,
        };
        let nodes = [
            ("n1", NodeShare { clients: 18, leaves: 7, middle: true, top: true, why: why(13.85) }),
            ("n2", NodeShare { clients: 8, leaves: 4, middle: true, top: false, why: why(6.15) }),
            ("n3", NodeShare { why: why(0.0), ..NodeShare::default() }),
        ];
        Plan {
            schema: SCHEMA.to_owned(),
            namespace: "default".to_owned(),
            job: "digits".to_owned(),
            policy: Policy::BestFit,
            goal: 20,
            clients: 26,
            leaf_fan_in: 2,
            update_size: Some(Bytes(44 << 20)),
            nodes: nodes.into_iter().map(|(name, share)| (name.to_owned(), share)).collect(),
        }
    }

    #[test]
    fn a_plan_is_read_as_it_was_written() {
        let plan = plan();
        let json = serde_json::to_string_pretty(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
        let yaml = serde_yaml_ng::to_string(&plan).unwrap();
        assert_eq!(serde_yaml_ng::from_str::<Plan>(&yaml).unwrap(), plan);
        assert!(json.contains(r#""schema": "lifl.dev/plan/v1""#) && json.contains(r#""updateSize": "44Mi""#), "{json}");
        assert!(yaml.contains("policy: BestFit") && yaml.contains("executionSeconds: 0.5"), "{yaml}");
        assert!(serde_json::from_str::<Plan>(&json.replace("leaves", "leafs")).is_err(), "a misspelt field is told");
    }

    #[test]
    fn sums_are_those_of_the_nodes() {
        let plan = plan();
        assert_eq!((plan.leaves(), plan.middles(), plan.top()), (11, 2, Some("n1")));
        assert_eq!(plan.taking_part().map(|(name, _)| name).collect::<Vec<_>>(), ["n1", "n2"]);
    }

    #[test]
    fn policies_are_named_as_in_documents_and_as_on_the_command_line() {
        for policy in Policy::ALL {
            assert_eq!(policy.to_string().parse(), Ok(policy));
            let word = serde_json::to_value(policy).unwrap();
            assert_eq!(word.as_str().unwrap().parse(), Ok(policy));
        }
        let error = "tightfit".parse::<Policy>().unwrap_err().to_string();
        assert!(
            error.contains("'tightfit'") && Policy::ALL.iter().all(|policy| error.contains(policy.name())),
            "{error}"
        );
    }
}
