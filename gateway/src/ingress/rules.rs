//! What becomes of a request: from the rules of all Ingresses to one immutable table, and from a head to a decision.
//!
//! ```text
//!  listener ─> host ─> path, longest first ─> headers ─> redirect | split by percent ─> backend, headers, Host, hash
//! ```
//!
//! The rules are those of net-kourier: paths are plain prefixes; of equally long ones those with header matches come
//! first, then the order in which they are written counts; rules for the outside are served inside too; what is redirected
//! is redirected inside too; headers are set, not added, and a path's win over a split's. A host that no rule names may
//! still be the short form of one (`name.ns` for `name.ns.svc.DOMAIN`).
//!
//! A decision allocates nothing: it borrows from the table.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use lifl_api::ingress::HASH_OVERRIDE;
use lifl_cluster::Key;
use lifl_proxy::queue::K_NETWORK_HASH;

use super::{
    backend::Backend,
    hosts::{HostName, short_forms},
    translate::Translated,
};

/// Where a request came in; each has its own part of the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Listener {
    /// Plain, for clients outside.
    External,
    /// TLS, for clients outside.
    ExternalTls,
    /// Plain, for clients inside.
    Local,
    /// TLS, for clients inside.
    LocalTls,
}

/// The part of a request that rules look at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head<'a> {
    /// `:authority` or Host, port included.
    pub(super) authority: &'a str,
    /// Path without query.
    pub(super) path: &'a str,
    pub(super) headers: &'a HeaderMap,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug)]
pub(super) enum Decision<'a> {
    /// No rule is for it.
    Unknown,
    /// It is sent to HTTPS; with the hash, if it was asked for.
    Redirect(Option<&'a HeaderValue>),
    /// It goes to a backend.
    Forward(Forward<'a>),
}

/// How a request goes on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Forward<'a> {
    pub(super) backend: &'a Arc<Backend>,
    /// Set, whatever the client sent.
    pub(super) headers: &'a [(HeaderName, HeaderValue)],
    /// Replaces Host.
    pub(super) host: Option<&'a HeaderValue>,
    /// Set as `K-Network-Hash`, for it was asked for.
    pub(super) hash: Option<&'a HeaderValue>,
}

/// One path of one rule.
#[derive(Debug)]
pub(super) struct Route {
    pub(super) path: String,
    pub(super) headers: Vec<Wanted>,
    pub(super) action: Action,
    /// Of its Ingress.
    pub(super) hash: HeaderValue,
}

/// A header that a request must carry.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) name: HeaderName,
    /// Exactly this; several values of a header count as one with commas between. `None`: it must only be there.
    pub(super) value: Option<String>,
}

#[derive(Debug)]
pub(super) enum Action {
    Redirect,
    Split(Splits),
}

/// Backends by their shares.
#[derive(Debug)]
pub(super) struct Splits {
    pub(super) list: Vec<Split>,
    pub(super) total: u64,
    pub(super) host: Option<HeaderValue>,
}

#[derive(Debug)]
pub(super) struct Split {
    /// Sum of the shares up to this one, its own included.
    pub(super) until: u64,
    pub(super) backend: Arc<Backend>,
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
}

/// Routes of one rule, in the order in which they are tried.
pub(super) type Routes = Arc<[Arc<Route>]>;

/// The rules of all Ingresses that are served.
#[derive(Debug, Default)]
pub(super) struct Rules {
    listeners: [Hosts; 4],
}

/// The hosts of one listener.
#[derive(Debug, Default)]
struct Hosts {
    exact: HashMap<Box<[u8]>, Routes>,
    /// `.example.com` of `*.example.com`, the longest first.
    suffixes: Vec<(Box<[u8]>, Routes)>,
    any: Option<Routes>,
}

/// Hosts while they are collected: who declared them, and their routes by listener.
type Drafts<'a> = BTreeMap<&'a str, (&'a Key, [Vec<Routes>; 4])>;

/// Brings routes into the order in which they are tried.
pub(super) fn order(routes: &mut [Arc<Route>]) {
    routes.sort_by_key(|route| (std::cmp::Reverse(route.path.len()), route.headers.is_empty()));
}

/// Routes of a host from those of the rules that name it; shared with the rule where it is the only one.
fn merged(parts: Vec<Routes>) -> Option<Routes> {
    match parts.as_slice() {
        [] => None,
        [only] => Some(Arc::clone(only)),
        several => {
            let mut all: Vec<Arc<Route>> = several.iter().flat_map(|part| part.iter().cloned()).collect();
            order(&mut all);
            Some(all.into())
        }
    }
}

// === impl Listener ===

impl Listener {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::External, Self::ExternalTls, Self::Local, Self::LocalTls];

    /// Its name in logs and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::External => "external",
            Self::ExternalTls => "external-tls",
            Self::Local => "local",
            Self::LocalTls => "local-tls",
        }
    }

    /// The one whose socket is deposited under a name.
    #[must_use]
    pub fn of_deposit(name: &str) -> Option<Self> {
        let names = ["ingress-http", "ingress-https", "ingress-local-http", "ingress-local-https"];
        Self::ALL.into_iter().zip(names).find(|(_, own)| *own == name).map(|(listener, _)| listener)
    }

    /// Clients speak TLS to it.
    #[must_use]
    pub const fn is_tls(self) -> bool {
        matches!(self, Self::ExternalTls | Self::LocalTls)
    }

    pub(super) const fn index(self) -> usize {
        self as usize
    }
}

// === impl Route ===

impl Route {
    fn takes(&self, head: &Head<'_>) -> bool {
        head.path.starts_with(&self.path) && self.headers.iter().all(|wanted| wanted.is_met(head.headers))
    }
}

// === impl Wanted ===

impl Wanted {
    fn is_met(&self, headers: &HeaderMap) -> bool {
        let mut values = headers.get_all(&self.name).iter();
        let Some(first) = values.next() else { return false };
        let Some(wanted) = &self.value else { return true };
        let mut rest = match wanted.as_bytes().strip_prefix(first.as_bytes()) {
            Some(rest) => rest,
            None => return false,
        };
        for value in values {
            rest = match rest.strip_prefix(b",").and_then(|rest| rest.strip_prefix(value.as_bytes())) {
                Some(rest) => rest,
                None => return false,
            };
        }
        rest.is_empty()
    }
}

// === impl Splits ===

impl Splits {
    fn draw(&self, random: u64) -> Option<&Split> {
        let point = (u128::from(random) * u128::from(self.total)) >> 64;
        self.list.iter().find(|split| u128::from(split.until) > point)
    }
}

// === impl Rules ===

impl Rules {
    /// What becomes of a request; `random` decides between splits.
    pub(super) fn decide<'a>(&'a self, listener: Listener, head: &Head<'_>, random: u64) -> Decision<'a> {
        let Some(host) = HostName::of(head.authority) else { return Decision::Unknown };
        let routes = self.listeners[listener.index()].routes(host.as_bytes());
        let Some(route) = routes.iter().find(|route| route.takes(head)) else { return Decision::Unknown };
        let mut hashes = head.headers.get_all(K_NETWORK_HASH).iter();
        let asked = hashes.next().is_some_and(|value| value.as_bytes() == HASH_OVERRIDE.as_bytes());
        let hash = (asked && hashes.next().is_none()).then_some(&route.hash);
        let Action::Split(splits) = &route.action else { return Decision::Redirect(hash) };
        let Some(split) = splits.draw(random) else { return Decision::Unknown };
        Decision::Forward(Forward {
            backend: &split.backend,
            headers: &split.headers,
            host: splits.host.as_ref(),
            hash,
        })
    }

    /// Puts Ingresses together. Hosts are the first's that declares them; whoever declares one of another is left out
    /// whole and returned with the one that has it. `all` is in the order of precedence.
    pub(super) fn compile<'a>(all: &'a [Arc<Translated>], domain: &str) -> (Self, Vec<(&'a Key, &'a Key)>) {
        let mut drafts = Drafts::new();
        let mut conflicts = Vec::new();
        let mut served = Vec::with_capacity(all.len());
        for ingress in all {
            let mut declared = ingress.rules.iter().flat_map(|rule| &rule.hosts);
            if let Some(owner) = declared.find_map(|host| Some(drafts.get(host.as_str())?.0)) {
                conflicts.push((&ingress.name, owner));
                continue;
            }
            for rule in &ingress.rules {
                for host in &rule.hosts {
                    rule.join(&mut drafts.entry(host).or_insert_with(|| (&ingress.name, Default::default())).1);
                }
            }
            served.push(ingress);
        }
        // Short forms come last: what is declared anywhere is never another's short form.
        let mut short = Drafts::new();
        for ingress in served {
            for rule in &ingress.rules {
                for form in rule.hosts.iter().flat_map(|host| short_forms(host, domain)) {
                    if drafts.contains_key(form) {
                        continue;
                    }
                    let (owner, parts) = short.entry(form).or_insert_with(|| (&ingress.name, Default::default()));
                    if *owner == &ingress.name {
                        rule.join(parts);
                    }
                }
            }
        }
        drafts.append(&mut short);
        let mut rules = Self::default();
        for (host, (_, parts)) in drafts {
            for (hosts, parts) in rules.listeners.iter_mut().zip(parts) {
                if let Some(routes) = merged(parts) {
                    hosts.insert(host, routes);
                }
            }
        }
        for hosts in &mut rules.listeners {
            hosts.suffixes.sort_by_key(|(suffix, _)| std::cmp::Reverse(suffix.len()));
        }
        (rules, conflicts)
    }
}

// === impl Hosts ===

impl Hosts {
    fn insert(&mut self, host: &str, routes: Routes) {
        match host.strip_prefix('*') {
            Some("") => self.any = Some(routes),
            Some(suffix) if suffix.starts_with('.') => self.suffixes.push((suffix.as_bytes().into(), routes)),
            _ => {
                self.exact.insert(host.as_bytes().into(), routes);
            }
        }
    }

    /// Routes of a host, none when nobody serves it.
    fn routes(&self, host: &[u8]) -> &[Arc<Route>] {
        if let Some(routes) = self.exact.get(host) {
            return routes;
        }
        let wild = self.suffixes.iter().find(|(suffix, _)| host.len() > suffix.len() && host.ends_with(suffix));
        wild.map(|(_, routes)| routes).or(self.any.as_ref()).map_or(&[], |routes| routes)
    }
}

#[cfg(test)]
mod tests;
