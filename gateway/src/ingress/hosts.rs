//! Names of hosts: as clients write them, and the short forms under which a cluster also knows them.

/// Longest name that the DNS carries.
const LONGEST: usize = 253;

/// A host as it is looked up: lower case, without port. On the stack, because every request makes one.
#[derive(Debug)]
pub(super) struct HostName {
    bytes: [u8; LONGEST],
    len: usize,
}

/// The other names of a host: without `.DOMAIN` and without `.svc.DOMAIN`, where what is left can be one.
pub(super) fn short_forms<'a>(host: &'a str, domain: &str) -> impl Iterator<Item = &'a str> {
    let service = host.strip_suffix(domain).and_then(|rest| rest.strip_suffix('.')).filter(|rest| !rest.is_empty());
    let name = service.and_then(|rest| rest.strip_suffix(".svc"));
    service.into_iter().chain(name).filter(|name| can_end_a_name(name))
}

/// All digits, or longer than a label may be: no name ends so, it would be taken for an address.
fn can_end_a_name(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    last.len() <= 63 && last.bytes().any(|byte| byte == b'-' || byte > b'9')
}

/// Takes the port off `host:port` and `[address]:port`.
fn without_port(authority: &str) -> &str {
    let end = match authority.strip_prefix('[') {
        Some(address) => address.find(']').map(|at| at + 2),
        None => authority.find(':'),
    };
    end.map_or(authority, |end| &authority[..end])
}

// === impl HostName ===

impl HostName {
    /// `None` when nothing can be known by that name.
    pub(super) fn of(authority: &str) -> Option<Self> {
        let host = without_port(authority).as_bytes();
        let mut name = Self { bytes: [0; LONGEST], len: host.len() };
        let room = name.bytes.get_mut(..host.len()).filter(|room| !room.is_empty())?;
        room.copy_from_slice(host);
        room.make_ascii_lowercase();
        Some(name)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(authority: &str) -> Option<String> {
        HostName::of(authority).map(|name| String::from_utf8(name.as_bytes().to_vec()).unwrap())
    }

    #[test]
    fn a_host_is_looked_up_in_lower_case_and_without_port() {
        for (authority, want) in [
            ("Shop.Example.com", "shop.example.com"),
            ("shop.example.com:8080", "shop.example.com"),
            ("shop.example.com:", "shop.example.com"),
            ("[::1]:80", "[::1]"),
            ("[::1]", "[::1]"),
        ] {
            assert_eq!(name(authority).as_deref(), Some(want), "{authority}");
        }
        assert_eq!(name(""), None);
        assert_eq!(name(":80"), None);
        assert_eq!(name(&"a".repeat(254)), None);
        assert!(name(&"a".repeat(253)).is_some());
    }

    // The table of knative/networking's pkg/ingress/ingress_test.go.
    #[test]
    fn short_forms_are_those_of_knative() {
        let long = format!("service.{}.svc.cluster.local", "s".repeat(64));
        let short = format!("service.{}.svc", "s".repeat(64));
        for (host, want) in [
            ("service.name-space.svc.cluster.local", vec!["service.name-space.svc", "service.name-space"]),
            ("service.1234.svc.cluster.local", vec!["service.1234.svc"]),
            ("service.1-1.svc.cluster.local", vec!["service.1-1.svc", "service.1-1"]),
            (long.as_str(), vec![short.as_str()]),
            ("foo.bar.example.com", vec![]),
            ("foo.cluster.local", vec!["foo"]),
            ("cluster.local", vec![]),
            (".cluster.local", vec![]),
            ("foo-cluster.local", vec![]),
        ] {
            assert_eq!(short_forms(host, "cluster.local").collect::<Vec<_>>(), want, "{host}");
        }
    }
}
