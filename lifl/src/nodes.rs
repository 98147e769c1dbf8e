//! Nodes as their users write them: `--node n1=20,memory=8Gi`, or a file of them.

use std::{collections::BTreeMap, fs, path::Path, str::FromStr};

use anyhow::{Context as _, Result, bail};
use lifl_api::quantity::{Bytes, Span};
use lifl_autoscaler::{Load, plan::Node};
use serde::Deserialize;

/// A node. Without memory, bandwidth or cores these are no bound; without arrivals and execution it has nothing to do yet.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSpec {
    name: String,
    capacity: Option<f64>,
    memory: Option<Bytes>,
    bandwidth: Option<Bytes>,
    cores: Option<u32>,
    #[serde(default)]
    arrivals: f64,
    execution: Option<Span>,
}

/// A word of `--node` that describes no node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// No name, or none that can be told from the rest.
    #[error("'{0}' has no name before a '=': write NAME=CAPACITY, for example n1=20")]
    Name(String),
    /// No capacity.
    #[error(
        "node {name} has no capacity: write {name}=20 if it aggregates 20 updates at once before each takes longer (paper's machines)"
    )]
    Capacity {
        /// The node.
        name: String,
    },
    /// A field that nodes do not have.
    #[error("node {name} has no '{key}': there are memory, bandwidth, cores, arrivals and execution")]
    Unknown {
        /// The node.
        name: String,
        /// Before its '='.
        key: String,
    },
    /// A value that cannot be read.
    #[error("{key} of node {name}: {message}")]
    Value {
        /// The node.
        name: String,
        /// The field.
        key: String,
        /// What is wrong, with the value.
        message: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodesFile {
    nodes: Vec<NodeSpec>,
}

/// The nodes of file and command line together; none, if there are neither.
///
/// # Errors
/// A file that cannot be read, a node without capacity or with a figure that makes no sense.
pub fn read(file: Option<&Path>, words: &[NodeSpec]) -> Result<Vec<Node>> {
    let mut specs = match file {
        None => Vec::new(),
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("--nodes {}", path.display()))?;
            let file: NodesFile = serde_yaml_ng::from_str(&text)
                .with_context(|| format!("--nodes {} is not a list of nodes", path.display()))?;
            if file.nodes.is_empty() {
                bail!("--nodes {}: no nodes", path.display());
            }
            file.nodes
        }
    };
    specs.extend_from_slice(words);
    Ok(specs.into_iter().map(NodeSpec::resolve).collect::<Result<_, _>>()?)
}

// === impl NodeSpec ===

impl NodeSpec {
    fn resolve(self) -> Result<Node, NodeError> {
        let Some(capacity) = self.capacity else { return Err(NodeError::Capacity { name: self.name }) };
        if !(self.arrivals.is_finite() && self.arrivals >= 0.0) {
            let message = format!("{} updates a second cannot arrive", self.arrivals);
            return Err(NodeError::Value { name: self.name, key: "arrivals".to_owned(), message });
        }
        let bytes = |size: Option<Bytes>| size.map_or(u64::MAX, |size| size.0);
        let execution = self.execution.map_or(0.0, |span| span.0.as_secs_f64());
        Ok(Node {
            capacity,
            memory: bytes(self.memory),
            bandwidth: bytes(self.bandwidth),
            cores: self.cores,
            load: Load { arrivals: self.arrivals, execution },
            name: self.name,
        })
    }
}

impl FromStr for NodeSpec {
    type Err = NodeError;

    /// `NAME=CAPACITY[,memory=SIZE][,bandwidth=SIZE][,cores=N][,arrivals=K][,execution=E]`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split(',');
        let first = words.next().unwrap_or_default();
        let (name, capacity) = first.split_once('=').unwrap_or((first, ""));
        let name = name.trim();
        if name.is_empty() {
            return Err(NodeError::Name(text.to_owned()));
        }
        if capacity.is_empty() {
            return Err(NodeError::Capacity { name: name.to_owned() });
        }
        let mut fields: BTreeMap<&str, &str> = BTreeMap::from([("capacity", capacity)]);
        for word in words {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            if !["memory", "bandwidth", "cores", "arrivals", "execution"].contains(&key) {
                return Err(NodeError::Unknown { name: name.to_owned(), key: key.to_owned() });
            }
            fields.insert(key, value);
        }
        Ok(Self {
            capacity: value(name, &fields, "capacity")?,
            memory: value(name, &fields, "memory")?,
            bandwidth: value(name, &fields, "bandwidth")?,
            cores: value(name, &fields, "cores")?,
            arrivals: value(name, &fields, "arrivals")?.unwrap_or(0.0),
            execution: value(name, &fields, "execution")?,
            name: name.to_owned(),
        })
    }
}

fn value<T: FromStr<Err: ToString>>(
    name: &str,
    fields: &BTreeMap<&str, &str>,
    key: &str,
) -> Result<Option<T>, NodeError> {
    let Some(text) = fields.get(key) else { return Ok(None) };
    text.parse().map(Some).map_err(|error: T::Err| {
        let error = error.to_string();
        let message = if error.contains(text) { error } else { format!("'{text}': {error}") };
        NodeError::Value { name: name.to_owned(), key: key.to_owned(), message }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_says_the_same_as_a_file() {
        let word: NodeSpec = "n1=20,memory=8Gi,bandwidth=125M,cores=64,arrivals=10,execution=250ms".parse().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nodes.yaml");
        fs::write(
            &path,
            "nodes:\n- {name: n1, capacity: 20, memory: 8Gi, bandwidth: 125M, cores: 64, arrivals: 10, execution: 250ms}\n\
             - {name: n2, capacity: 4}\n",
        )
        .unwrap();
        let nodes = read(Some(&path), &[]).unwrap();
        assert_eq!(nodes[0], word.resolve().unwrap());
        assert_eq!(nodes[0].load, Load { arrivals: 10.0, execution: 0.25 });
        assert_eq!((nodes[1].memory, nodes[1].cores, nodes[1].load), (u64::MAX, None, Load::default()));
        assert_eq!(read(Some(&path), &["n3=1".parse().unwrap()]).unwrap().len(), 3, "file and words together");
        assert_eq!(read(None, &[]).unwrap(), []);
    }

    #[test]
    fn a_word_that_is_no_node_is_told_with_what_is_wrong() {
        for (text, words) in [
            ("", &["NAME=CAPACITY"][..]),
            ("=20", &["'=20'", "NAME=CAPACITY"]),
            ("n1", &["n1", "no capacity", "n1=20"]),
            ("n1=", &["n1", "no capacity"]),
            ("n1=many", &["n1", "capacity", "'many'"]),
            ("n1=20,memory=8GB", &["n1", "memory", "'8GB'", "Gi"]),
            ("n1=20,execution=fast", &["n1", "execution", "'fast'", "ms"]),
            ("n1=20,cores=-1", &["n1", "cores", "'-1'"]),
            ("n1=20,disk=1", &["n1", "'disk'", "bandwidth"]),
        ] {
            let error = text.parse::<NodeSpec>().unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{text}: {error}");
        }
        let error = "n1=20,arrivals=-3".parse::<NodeSpec>().unwrap().resolve().unwrap_err().to_string();
        assert!(error.contains("n1") && error.contains("-3"), "{error}");
    }
}
