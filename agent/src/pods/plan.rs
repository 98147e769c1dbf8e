//! From the pods that are open to the pods that shall be.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use lifl_api::pod::NodePod;

/// First pause before a pod that could not be opened is tried again: its network is often being made right now.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause: a port that the app has taken stays taken.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Why a pod cannot be served is said after so many attempts in vain, three seconds: an ended pod's network often goes before
/// anyone says that it has ended, and an app may be about to leave the port that it has taken.
pub const SAID_AFTER: u32 = 6;

/// Where a pod stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Standing {
    /// Its listeners are open.
    Open {
        /// As the gateway was told.
        pod: NodePod,
        /// Its network namespace is still mounted where it was found. One that is gone keeps existing as long as we hold
        /// sockets in it, but no packet reaches it.
        mounted: bool,
        /// The API has said something newer of the pod since it was last seen mounted.
        renewed: bool,
    },
    /// Its network namespace has gone.
    Left {
        /// As it was served.
        pod: NodePod,
        /// The API has said something newer of the pod since.
        renewed: bool,
    },
    /// It could not be opened.
    Cannot {
        /// As it was tried.
        pod: NodePod,
        /// How often, in a row.
        tries: u32,
        /// When it is tried again.
        again: Instant,
    },
}

/// One step.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Close the listeners, forget the pod.
    Close {
        /// Its uid.
        uid: String,
    },
    /// Close the listeners, and wait for what the API says of the pod next.
    Leave {
        /// The pod.
        pod: NodePod,
    },
    /// Find its namespace, open its listeners.
    Open {
        /// The pod.
        pod: NodePod,
        /// Failed attempts before this one.
        tries: u32,
    },
    /// It must not be opened (now).
    Refuse {
        /// The pod.
        pod: NodePod,
        /// Failed attempts before this one.
        tries: u32,
        /// Why.
        reason: String,
    },
    /// The same listeners, but the gateway is to serve them otherwise.
    Tell {
        /// The pod as it is now.
        pod: NodePod,
    },
}

/// Steps from what is open to what shall be; closing comes first, so that an address is free for its next owner.
///
/// A namespace is found by its address, and whoever may administer the network of a pod may give it any. So one that has gone is
/// not looked for until the API says something newer of its pod, as it does when the pod's sandbox was made anew: what has the
/// address meanwhile is not this pod's. A pod that drains gets no other one.
#[must_use]
pub fn decide(pods: &[NodePod], known: &BTreeMap<String, Standing>, now: Instant) -> Vec<Action> {
    let gone = known.keys().filter(|uid| pods.iter().all(|pod| pod.uid != **uid));
    let mut closing: Vec<Action> = gone.map(|uid| Action::Close { uid: uid.clone() }).collect();
    let mut rest = Vec::new();
    for pod in pods {
        let tries = match known.get(&pod.uid) {
            Some(Standing::Open { pod: told, mounted: true, .. }) if same_sockets(told, pod) => {
                if told != pod {
                    rest.push(Action::Tell { pod: pod.clone() });
                }
                continue;
            }
            Some(Standing::Open { pod: told, mounted: false, renewed })
                if same_sockets(told, pod) && !may_return(pod, *renewed) =>
            {
                closing.push(Action::Leave { pod: pod.clone() });
                continue;
            }
            Some(Standing::Left { pod: left, renewed }) if same_sockets(left, pod) && !may_return(pod, *renewed) => {
                continue;
            }
            Some(Standing::Open { .. }) => {
                closing.push(Action::Close { uid: pod.uid.clone() });
                0
            }
            Some(Standing::Cannot { pod: tried, tries, again }) if same_sockets(tried, pod) => {
                if now < *again {
                    continue;
                }
                *tries
            }
            Some(Standing::Cannot { .. } | Standing::Left { .. }) | None => 0,
        };
        rest.extend(opening(pod, pods, tries));
    }
    closing.append(&mut rest);
    closing
}

/// A namespace is found by address, so an address with two owners finds nothing: for a moment a pod that has ended and its
/// successor may both be listed with it. Who drains gives way.
fn opening(pod: &NodePod, pods: &[NodePod], tries: u32) -> Option<Action> {
    let rival = pods.iter().find(|other| other.uid != pod.uid && other.address == pod.address && !other.draining);
    match rival {
        None => Some(Action::Open { pod: pod.clone(), tries }),
        Some(_) if pod.draining => None,
        Some(rival) => {
            let reason = format!("address {} is also that of {}/{}", pod.address, rival.namespace, rival.name);
            Some(Action::Refuse { pod: pod.clone(), tries, reason })
        }
    }
}

fn may_return(pod: &NodePod, renewed: bool) -> bool {
    renewed && !pod.draining
}

fn same_sockets(a: &NodePod, b: &NodePod) -> bool {
    a.address == b.address && a.settings.ports() == b.settings.ports()
}

/// Pause after so many failed attempts.
#[must_use]
pub fn pause(tries: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << tries.min(16)).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use lifl_api::pod::{PodSettings, SETTINGS_ANNOTATION};

    use super::*;

    fn pod(uid: &str, last: u8) -> NodePod {
        let settings = format!(
            r#"{{"schema":"{}","namespace":"n","configuration":"c","revision":"r","servingPort":8012,"protocol":"http1",
                "userPort":8080,"containerConcurrency":0,"timeouts":{{"request":300}}}}"#,
            PodSettings::schema()
        );
        NodePod {
            uid: uid.into(),
            namespace: "n".into(),
            name: format!("pod-{uid}"),
            address: [10, 244, 0, last].into(),
            draining: false,
            settings: PodSettings::from_annotation(&settings).expect(SETTINGS_ANNOTATION),
        }
    }

    fn open(pod: &NodePod) -> (String, Standing) {
        (pod.uid.clone(), Standing::Open { pod: pod.clone(), mounted: true, renewed: false })
    }

    fn close(uid: &str) -> Action {
        Action::Close { uid: uid.into() }
    }

    #[test]
    fn what_is_as_it_shall_be_is_left_alone() {
        let (a, b) = (pod("a", 1), pod("b", 2));
        let known = BTreeMap::from([open(&a), open(&b)]);
        assert_eq!(decide(&[a, b], &known, Instant::now()), []);
    }

    #[test]
    fn new_pods_are_opened_and_pods_that_vanished_closed_first() {
        let (a, b) = (pod("a", 1), pod("b", 1));
        let known = BTreeMap::from([open(&a)]);
        let expected = [close("a"), Action::Open { pod: b.clone(), tries: 0 }];
        assert_eq!(decide(&[b], &known, Instant::now()), expected);
    }

    #[test]
    fn other_settings_are_told_and_other_sockets_are_opened_anew() {
        let a = pod("a", 1);
        let known = BTreeMap::from([open(&a)]);
        let mut draining = a.clone();
        draining.draining = true;
        assert_eq!(decide(std::slice::from_ref(&draining), &known, Instant::now()), [Action::Tell { pod: draining }]);

        let mut metrics = a.clone();
        metrics.settings.request_metrics.protocol = "prometheus".into();
        let mut moved = a;
        moved.address = [10, 244, 0, 9].into();
        for other in [metrics, moved] {
            let expected = [close("a"), Action::Open { pod: other.clone(), tries: 0 }];
            assert_eq!(decide(&[other], &known, Instant::now()), expected);
        }
    }

    #[test]
    fn a_namespace_that_is_gone_is_looked_for_again_when_something_newer_is_said() {
        let (a, now) = (pod("a", 1), Instant::now());
        let (mut draining, mut moved) = (a.clone(), a.clone());
        draining.draining = true;
        moved.address = [10, 244, 0, 9].into();
        let gone =
            |renewed| BTreeMap::from([("a".to_owned(), Standing::Open { pod: a.clone(), mounted: false, renewed })]);
        let left = |renewed| BTreeMap::from([("a".to_owned(), Standing::Left { pod: a.clone(), renewed })]);
        let one = std::slice::from_ref;
        let open = |pod: &NodePod| Action::Open { pod: pod.clone(), tries: 0 };
        let leave = |pod: &NodePod| Action::Leave { pod: pod.clone() };
        for renewed in [false, true] {
            assert_eq!(decide(one(&draining), &gone(renewed), now), [leave(&draining)]);
            assert_eq!(decide(one(&draining), &left(renewed), now), []);
            assert_eq!(decide(one(&moved), &gone(renewed), now), [close("a"), open(&moved)]);
            assert_eq!(decide(one(&moved), &left(renewed), now), [open(&moved)]);
            assert_eq!(decide(&[], &left(renewed), now), [close("a")]);
        }
        assert_eq!(decide(one(&a), &gone(false), now), [leave(&a)]);
        assert_eq!(decide(one(&a), &left(false), now), []);
        assert_eq!(decide(one(&a), &gone(true), now), [close("a"), open(&a)]);
        assert_eq!(decide(one(&a), &left(true), now), [open(&a)]);
    }

    #[test]
    fn who_could_not_be_opened_waits_longer_each_time() {
        let (a, now) = (pod("a", 1), Instant::now());
        let again = now + Duration::from_millis(200);
        let known = BTreeMap::from([("a".to_owned(), Standing::Cannot { pod: a.clone(), tries: 3, again })]);
        assert_eq!(decide(std::slice::from_ref(&a), &known, now), []);
        assert_eq!(decide(std::slice::from_ref(&a), &known, again), [Action::Open { pod: a.clone(), tries: 3 }]);
        let mut other = a;
        other.address = [10, 244, 0, 7].into();
        assert_eq!(decide(std::slice::from_ref(&other), &known, now), [Action::Open { pod: other, tries: 0 }]);
        assert_eq!(decide(&[], &known, now), [close("a")]);
        let pauses: Vec<u64> = [0, 1, 2, 7, 8, 40].map(|n| u64::try_from(pause(n).as_millis()).unwrap()).into();
        assert_eq!(pauses, [50, 100, 200, 6400, 10_000, 10_000]);
    }

    #[test]
    fn of_two_pods_with_one_address_the_one_that_drains_gives_way() {
        let (mut old, new) = (pod("old", 1), pod("new", 1));
        let refused = |actions: &[Action]| actions.iter().filter(|a| matches!(a, Action::Refuse { .. })).count();
        let both = decide(&[old.clone(), new.clone()], &BTreeMap::new(), Instant::now());
        assert_eq!((both.len(), refused(&both)), (2, 2), "{both:?}");
        old.draining = true;
        let known =
            BTreeMap::from([("old".to_owned(), Standing::Open { pod: old.clone(), mounted: false, renewed: true })]);
        let expected = [Action::Leave { pod: old.clone() }, Action::Open { pod: new.clone(), tries: 0 }];
        assert_eq!(decide(&[old, new], &known, Instant::now()), expected);
    }
}
