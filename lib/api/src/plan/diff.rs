//! What makes one plan of another: for programs by path, for people by node.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{NodeShare, Plan, table::counted};

/// `schema` of a [`PlanDiff`].
const SCHEMA: &str = "lifl.dev/plan-diff/v1";

/// What makes one plan of another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PlanDiff {
    /// `lifl.dev/plan-diff/v1`.
    pub schema: String,
    /// In the order of their paths; empty: the plans are the same.
    pub changes: Vec<Change>,
}

/// A value of a plan that is another one in the newer plan, is new there, or is there no more.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Change {
    /// Where it stands in the plan's JSON form: a JSON pointer (RFC 6901), `/nodes/n1/leaves`. A node that came or went is one
    /// change: `/nodes/n4`.
    pub path: String,
    /// In the older plan; absent: not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Value>,
    /// In the newer plan; absent: not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Value>,
}

// === impl PlanDiff ===

impl PlanDiff {
    pub(super) fn between(older: &Plan, newer: &Plan) -> Self {
        let mut changes = Vec::new();
        let nodes = |plan: &Plan| -> BTreeMap<String, Value> {
            plan.nodes.iter().map(|(name, share)| (name.clone(), json(share))).collect()
        };
        let of_job = |plan: &Plan| {
            let mut fields = fields(&json(plan));
            fields.remove("nodes");
            fields
        };
        each(&of_job(older), &of_job(newer), |key, before, after| {
            changes.push(Change { path: format!("/{key}"), before, after });
        });
        each(&nodes(older), &nodes(newer), |name, before, after| {
            let path = format!("/nodes/{}", name.replace('~', "~0").replace('/', "~1"));
            match (&before, &after) {
                (Some(older), Some(newer)) => inside(&path, older, newer, &mut changes),
                _ => changes.push(Change { path, before, after }),
            }
        });
        changes.sort_by(|a, b| a.path.cmp(&b.path));
        Self { schema: SCHEMA.to_owned(), changes }
    }

    /// The plans are the same.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Something is to be done otherwise: more differs than the figures that the plan follows from.
    #[must_use]
    pub fn decides(&self) -> bool {
        self.changes.iter().any(|change| !change.path.contains("/why/"))
    }
}

impl fmt::Display for PlanDiff {
    /// A line for the job and one for each node that differs: `+` came, `-` went, `~` changed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "no difference");
        }
        let mut lines: BTreeMap<(bool, String), (char, Vec<String>)> = BTreeMap::new();
        for change in &self.changes {
            let (node, field) = place(&change.path);
            let (is_node, name) = (node.is_some(), node.unwrap_or_else(|| "job".to_owned()));
            let line = lines.entry((is_node, name)).or_insert(('~', Vec::new()));
            match (field, &change.before, &change.after) {
                ("", None, Some(share)) => *line = ('+', vec![part(share)]),
                ("", Some(share), None) => *line = ('-', vec![part(share)]),
                (field, before, after) => {
                    line.1.push(format!("{field} {} -> {}", word(before.as_ref()), word(after.as_ref())));
                }
            }
        }
        lines.iter().try_for_each(|((_, name), (sign, words))| writeln!(f, "{sign} {name}: {}", words.join(", ")))
    }
}

fn json(value: &impl Serialize) -> Value {
    // Maps with text keys and finite numbers: it cannot fail.
    serde_json::to_value(value).unwrap_or_default()
}

fn fields(value: &Value) -> BTreeMap<String, Value> {
    value.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Visits what differs between two maps, by key.
fn each(
    older: &BTreeMap<String, Value>,
    newer: &BTreeMap<String, Value>,
    mut visit: impl FnMut(&str, Option<Value>, Option<Value>),
) {
    let keys: BTreeSet<&String> = older.keys().chain(newer.keys()).collect();
    for key in keys {
        let (before, after) = (older.get(key), newer.get(key));
        if before != after {
            visit(key, before.cloned(), after.cloned());
        }
    }
}

/// Compares two objects down to their values.
fn inside(path: &str, older: &Value, newer: &Value, changes: &mut Vec<Change>) {
    each(&fields(older), &fields(newer), |key, before, after| {
        let path = format!("{path}/{key}");
        match (&before, &after) {
            (Some(older @ Value::Object(_)), Some(newer @ Value::Object(_))) => inside(&path, older, newer, changes),
            _ => changes.push(Change { path, before, after }),
        }
    });
}

/// The node of a path, and the rest of it.
fn place(path: &str) -> (Option<String>, &str) {
    let Some(rest) = path.strip_prefix("/nodes/") else { return (None, path.trim_start_matches('/')) };
    let (name, field) = rest.split_once('/').unwrap_or((rest, ""));
    (Some(name.replace("~1", "/").replace("~0", "~")), field.trim_start_matches("why/"))
}

fn part(share: &Value) -> String {
    let Ok(share) = serde_json::from_value::<NodeShare>(share.clone()) else { return share.to_string() };
    if share.clients == 0 {
        return "not needed".to_owned();
    }
    let (clients, leaves) = (counted(share.clients, "client", "clients"), counted(share.leaves, "leaf", "leaves"));
    let more = [(share.middle, ", a middle"), (share.top, ", the top")];
    more.iter().filter(|(there, _)| *there).fold(format!("{clients}, {leaves}"), |text, (_, word)| text + word)
}

fn word(value: Option<&Value>) -> String {
    match value {
        None => "not known".to_owned(),
        Some(Value::Bool(true)) => "yes".to_owned(),
        Some(Value::Bool(false)) => "no".to_owned(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{Policy, Why, tests::plan},
        *,
    };
    use crate::quantity::Bytes;

    #[test]
    fn people_read_what_is_to_be_done_otherwise() {
        let older = plan();
        assert_eq!(older.diff(&older).to_string(), "no difference\n");
        let mut newer = older.clone();
        (newer.goal, newer.update_size) = (60, None);
        if let Some(first) = newer.nodes.get_mut("n1") {
            (first.clients, first.leaves, first.top) = (20, 10, false);
            first.why.arrivals = 6.0;
        }
        let share = NodeShare { clients: 1, leaves: 1, top: true, ..NodeShare::default() };
        newer.nodes.insert("n/4".to_owned(), share);
        newer.nodes.remove("n2");
        newer.nodes.remove("n3");
        let diff = older.diff(&newer);
        assert_eq!(
            diff.to_string(),
            "~ job: goal 20 -> 60, updateSize 44Mi -> not known\n\
             + n/4: 1 client, 1 leaf, the top\n\
             ~ n1: clients 18 -> 20, leaves 7 -> 10, top yes -> no, arrivals 4.0 -> 6.0\n\
             - n2: 8 clients, 4 leaves, a middle\n\
             - n3: not needed\n"
        );
        let json = serde_json::to_value(&diff).unwrap();
        assert_eq!(json["schema"], "lifl.dev/plan-diff/v1");
        assert_eq!(json["changes"][0], serde_json::json!({"path": "/goal", "before": 20, "after": 60}));
        assert_eq!(json["changes"][1]["path"], "/nodes/n1/clients");
        assert!(json.to_string().contains(r#""path":"/nodes/n~14""#), "{json}");
        assert_eq!(serde_json::from_value::<PlanDiff>(json).unwrap(), diff);
    }

    #[test]
    fn other_figures_alone_decide_nothing() {
        let older = plan();
        let mut newer = older.clone();
        newer.nodes.values_mut().for_each(|share| share.why.arrivals += 1.0);
        let diff = older.diff(&newer);
        assert!(!diff.is_empty() && !diff.decides());
        newer.policy = Policy::WorstFit;
        assert!(older.diff(&newer).decides());
    }

    /// Applies a difference the slow way: on the JSON form, path by path.
    fn applied(plan: &Plan, diff: &PlanDiff) -> Plan {
        let mut value = json(plan);
        for change in &diff.changes {
            let (parent, key) = change.path.rsplit_once('/').unwrap();
            let object = value.pointer_mut(parent).unwrap().as_object_mut().unwrap();
            let key = key.replace("~1", "/").replace("~0", "~");
            assert_eq!(object.get(&key), change.before.as_ref(), "{}", change.path);
            match &change.after {
                Some(after) => object.insert(key, after.clone()),
                None => object.remove(&key),
            };
        }
        serde_json::from_value(value).unwrap()
    }

    fn any_plan() -> impl Strategy<Value = Plan> {
        let share = (0..3_u32, 0..3_u32, any::<bool>(), any::<bool>(), 0..3_u8, prop::option::of(0..3_u32)).prop_map(
            |(clients, leaves, middle, top, arrivals, most_leaves)| NodeShare {
                clients,
                leaves,
                middle,
                top,
                why: Why { arrivals: f64::from(arrivals), most_leaves, ..Why::default() },
            },
        );
        let nodes = prop::collection::btree_map("[a-c~/]{1,2}", share, 0..5);
        (nodes, 1..3_u32, prop::sample::select(Policy::ALL.to_vec()), prop::option::of(0..2_u64)).prop_map(
            |(nodes, goal, policy, size)| Plan { nodes, goal, policy, update_size: size.map(Bytes), ..plan() },
        )
    }

    proptest! {
        #[test]
        fn a_difference_makes_the_newer_plan_of_the_older(older in any_plan(), newer in any_plan()) {
            let diff = older.diff(&newer);
            prop_assert_eq!(diff.is_empty(), older == newer);
            prop_assert_eq!(&applied(&older, &diff), &newer);
            let lines = diff.to_string().lines().count();
            prop_assert!(lines <= newer.nodes.len() + older.nodes.len() + 1);
        }
    }
}
