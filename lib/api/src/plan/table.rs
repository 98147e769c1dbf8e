//! A plan for people.

use std::fmt;

use super::Plan;

/// Nodes without a part that are named; of others the number is told.
const NAMED: usize = 5;

impl fmt::Display for Plan {
    /// A head, a row for each node that takes part, what they come to.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, job, goal, clients, policy, leaf_fan_in, .. } = self;
        write!(f, "{namespace}/{job}: {goal} updates of {clients} clients, {leaf_fan_in} to a leaf, {policy}")?;
        match self.update_size {
            Some(size) => writeln!(f, ", {size} each")?,
            None => writeln!(f, "; an update's size is not known, so memory and links are no bound")?,
        }
        let width = self.taking_part().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max(4);
        writeln!(
            f,
            "\n{:<width$}  {:>7}  {:>6}  {:>6}  {:>3}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}",
            "NODE", "CLIENTS", "LEAVES", "MIDDLE", "TOP", "QUEUE", "ROOM", "CAPACITY", "k", "E"
        )?;
        for (name, share) in self.taking_part() {
            let (middle, top) = (mark(share.middle), mark(share.top));
            let why = &share.why;
            writeln!(
                f,
                "{name:<width$}  {:>7}  {:>6}  {middle:>6}  {top:>3}  {:>9}  {:>9}  {:>9}  {:>7}/s  {:>8}s",
                share.clients,
                share.leaves,
                short(why.queue),
                short(why.residual),
                short(why.capacity),
                short(why.arrivals),
                short(why.execution_seconds),
            )?;
        }
        let part = self.taking_part().count();
        let of = self.nodes.len();
        let (leaves, middles) =
            (counted(self.leaves(), "leaf", "leaves"), counted(self.middles(), "middle", "middles"));
        writeln!(f, "\n{part} of {of} {}: {leaves}, {middles}, 1 top", if of == 1 { "node" } else { "nodes" })?;
        for (name, share) in self.taking_part() {
            if let Some(slots) = share.why.slots.filter(|slots| *slots < share.clients) {
                writeln!(f, "{name} has memory for {slots} updates at once: further clients are asked to wait")?;
            }
        }
        let idle: Vec<&str> =
            self.nodes.iter().filter(|(_, share)| share.clients == 0).map(|(name, _)| name.as_str()).collect();
        match idle.len() {
            0 => Ok(()),
            more if more > NAMED => writeln!(f, "not needed: {} and {} more", idle[..NAMED].join(", "), more - NAMED),
            _ => writeln!(f, "not needed: {}", idle.join(", ")),
        }
    }
}

pub(super) fn counted(count: u32, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

fn mark(there: bool) -> &'static str {
    if there { "yes" } else { "-" }
}

/// At most two decimals, and none that say nothing; small ones keep three digits that do.
fn short(value: f64) -> String {
    if value != 0.0 && value.abs() < 0.01 {
        return format!("{value:.1e}");
    }
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::{super::tests::plan, *};

    #[test]
    fn a_table_for_people() {
        let expected = "\
default/digits: 20 updates of 26 clients, 2 to a leaf, bestfit, 44Mi each

NODE  CLIENTS  LEAVES  MIDDLE  TOP      QUEUE       ROOM   CAPACITY          k          E
n1         18       7     yes  yes      13.85         18         20        4/s       0.5s
n2          8       4     yes    -       6.15         18         20        4/s       0.5s

2 of 3 nodes: 11 leaves, 2 middles, 1 top
not needed: n3
";
        assert_eq!(plan().to_string(), expected);
    }

    #[test]
    fn what_is_not_known_is_said_and_what_is_many_is_counted() {
        let mut plan = plan();
        plan.update_size = None;
        if let Some(first) = plan.nodes.get_mut("n1") {
            first.why.slots = Some(12);
        }
        let idle = plan.nodes["n3"].clone();
        for number in 4..10 {
            plan.nodes.insert(format!("n{number}"), idle.clone());
        }
        let text = plan.to_string();
        assert!(
            text.contains("size is not known") && text.contains("not needed: n3, n4, n5, n6, n7 and 2 more"),
            "{text}"
        );
    }

    #[test]
    fn numbers_are_as_long_as_they_say_something() {
        for (value, text) in
            [(0.0, "0"), (20.0, "20"), (0.5, "0.5"), (6.153, "6.15"), (0.0002, "2.0e-4"), (100_000.0, "100000")]
        {
            assert_eq!(short(value), text);
        }
    }
}
