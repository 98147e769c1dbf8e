//! What a proxy changes in heads. Pure.

use std::{any::Any, fmt::Write as _, net::SocketAddr, sync::Arc};

use http::{
    HeaderMap, HeaderName, HeaderValue, Uri, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, Entry, FORWARDED, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER,
        TRANSFER_ENCODING, UPGRADE,
    },
    request, response,
    uri::{Authority, PathAndQuery, Scheme},
};

use crate::{
    endpoint::{Endpoint, Protocol},
    timeouts::Spare,
};

/// The host that the client asked for, while the activator's own stands in `Host`.
pub const K_ORIGINAL_HOST: HeaderName = HeaderName::from_static("k-original-host");
/// Says that the request came by way of the activator.
pub const K_PROXY_REQUEST: HeaderName = HeaderName::from_static("k-proxy-request");
/// The revision's namespace, for the activator.
pub const SERVING_NAMESPACE: HeaderName = HeaderName::from_static("knative-serving-namespace");
/// The revision's name, for the activator.
pub const SERVING_REVISION: HeaderName = HeaderName::from_static("knative-serving-revision");
/// Addresses that a request came by.
pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// The host that the first proxy saw.
pub const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
/// The scheme that the first proxy saw.
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// Of an upgrade to h2c.
pub(crate) const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// Meant for one connection. `Trailer` stays, though it is on Go's list: hyper sends only trailers that it announces.
static HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    HTTP2_SETTINGS,
];

/// Of a `Forwarded`, for what stands around its values.
const FORWARDED_ROOM: usize = 48;

/// The other end of a client's connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its address.
    pub addr: SocketAddr,
    /// The address as it goes into `X-Forwarded-For`; made once per connection.
    forwarded: HeaderValue,
    /// For the clocks of its requests.
    pub(crate) timer: Spare,
    /// What is held as long as its connection is, whatever becomes of that.
    holds: Option<Arc<dyn Any + Send + Sync>>,
}

/// A request that cannot be passed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed request: {0}")]
pub struct Malformed(&'static str);

// === impl Peer ===

impl Peer {
    /// The other end at `addr`.
    #[must_use]
    pub fn new(addr: SocketAddr) -> Self {
        // IPv4 clients of an IPv6 listener are IPv4 clients.
        let ip = addr.ip().to_canonical();
        let forwarded = HeaderValue::try_from(ip.to_string()).unwrap_or(HeaderValue::from_static("unknown"));
        Self { addr, forwarded, timer: Spare::default(), holds: None }
    }

    /// The same, with what is held as long as the connection is: a tunnel that it becomes included.
    #[must_use]
    pub fn holding<T: Send + Sync + 'static>(self, held: T) -> Self {
        Self { holds: Some(Arc::new(held)), ..self }
    }

    pub(crate) fn held(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.holds.clone()
    }
}

/// A header's first value as text; empty if there is none, or none that is text.
#[must_use]
pub fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// The host and the port of an authority. What stands before an `@` is neither, and for nobody: who read it as a host would send a
/// request elsewhere than who did not.
#[must_use]
pub fn host(authority: &Authority) -> &str {
    let authority = authority.as_str();
    authority.rsplit_once('@').map_or(authority, |(_user, host)| host)
}

/// Takes away what the client's `Connection` names, and of itself leaves the wish for an upgrade only: `Upgrade` and `TE` are looked
/// at later. It comes before anything is added to the head, for a client is not to take away what is added.
pub(crate) fn drop_named(headers: &mut HeaderMap) {
    if !headers.contains_key(CONNECTION) {
        return;
    }
    let upgrades = has_token(headers, &CONNECTION, "upgrade");
    let named = named(headers).filter(|name| !is_hop_by_hop(name));
    for name in named.collect::<Vec<_>>() {
        headers.remove(name);
    }
    if upgrades {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    } else {
        headers.remove(CONNECTION);
    }
}

/// Makes a client's head an endpoint's: hop-by-hop headers go, `X-Forwarded-For` grows, target and `Host` get the form of
/// the protocol. Tells whether the client asks for an upgrade.
///
/// # Errors
/// [`Malformed`]: no host, or a target that is no path.
pub fn to_endpoint(head: &mut request::Parts, peer: &Peer, endpoint: &Endpoint) -> Result<bool, Malformed> {
    let upgrade = match endpoint.protocol {
        Protocol::H1 if head.version == Version::HTTP_11 => wanted_upgrade(&head.headers),
        _ => None,
    };
    let trailers = has_token(&head.headers, &TE, "trailers");
    strip_hop_by_hop(&mut head.headers);
    if trailers {
        head.headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    let upgrading = upgrade.is_some();
    if let Some(to) = upgrade {
        head.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        head.headers.insert(UPGRADE, to);
    }
    append_forwarded_for(&mut head.headers, peer);
    target(head, endpoint)?;
    Ok(upgrading)
}

/// Makes an endpoint's head a client's.
pub fn from_endpoint(head: &mut response::Parts) {
    strip_hop_by_hop(&mut head.headers);
    head.version = Version::HTTP_11;
}

/// Makes the head of an endpoint's `101` a client's.
///
/// # Errors
/// [`Malformed`]: it switches to something that was not asked for.
pub fn switched(head: &mut response::Parts, asked: Option<&HeaderValue>) -> Result<(), Malformed> {
    let to = head.headers.get(UPGRADE).cloned();
    let same = |a: &HeaderValue, b: &HeaderValue| a.as_bytes().eq_ignore_ascii_case(b.as_bytes());
    match (to, asked) {
        (Some(to), Some(asked)) if same(&to, asked) => {
            from_endpoint(head);
            head.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            head.headers.insert(UPGRADE, to);
            Ok(())
        }
        _ => Err(Malformed("the endpoint switched to a protocol that was not asked for")),
    }
}

/// `Host` becomes what the client asked for; the header that carried it goes.
pub fn restore_host(head: &mut request::Parts) {
    let Some(original) = head.headers.remove(K_ORIGINAL_HOST) else { return };
    if original.is_empty() {
        return;
    }
    if head.uri.authority().is_some() {
        let path = head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        head.uri = Uri::from(path);
    }
    head.headers.insert(HOST, original);
}

/// Takes away what is meant for activators.
pub fn strip_revision(headers: &mut HeaderMap) {
    headers.remove(SERVING_NAMESPACE);
    headers.remove(SERVING_REVISION);
}

/// Makes a `Forwarded` of the `X-Forwarded-*`, if there is none. Host and scheme belong to the first address only.
pub fn shim_forwarded(headers: &mut HeaderMap) {
    let text = |name: &HeaderName| text(headers, name).trim();
    if !text(&FORWARDED).is_empty() {
        return;
    }
    let (addresses, host, scheme) = (text(&X_FORWARDED_FOR), text(&X_FORWARDED_HOST), text(&X_FORWARDED_PROTO));
    if addresses.is_empty() && host.is_empty() && scheme.is_empty() {
        return;
    }
    let mut made = String::with_capacity(addresses.len() + host.len() + scheme.len() + FORWARDED_ROOM);
    for (number, address) in addresses.split(',').map(str::trim).enumerate() {
        let first = number == 0;
        made.push_str(if first { "" } else { ", " });
        // An address with a colon is IPv6 and must be quoted.
        let _to_a_string = match address.contains(':') {
            true => write!(made, "for=\"[{address}]\""),
            false if first && addresses.is_empty() => Ok(()),
            false => write!(made, "for={address}"),
        };
        let pairs = [("host", host), ("proto", scheme)];
        for (name, value) in pairs.into_iter().filter(|(_, value)| first && !value.is_empty()) {
            made.push_str(if made.is_empty() { "" } else { ";" });
            let _to_a_string = write!(made, "{name}={value}");
        }
    }
    if let Ok(made) = HeaderValue::try_from(made) {
        headers.insert(FORWARDED, made);
    }
}

/// What a request wants to upgrade to. `h2c` is for us to answer, not for the endpoint.
#[must_use]
pub fn wanted_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let to = headers.get(UPGRADE)?;
    let named = has_token(headers, &CONNECTION, "upgrade");
    (named && !to.is_empty() && !to.as_bytes().eq_ignore_ascii_case(b"h2c")).then(|| to.clone())
}

/// Whether a list header has this element, whatever its case.
#[must_use]
pub fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).into_iter();
    values.flat_map(|value| tokens(value.as_bytes())).any(|found| found.eq_ignore_ascii_case(token.as_bytes()))
}

/// Whether a header is meant for one connection, named by `Connection` or not.
pub(crate) fn is_hop_by_hop(name: &HeaderName) -> bool {
    HOP_BY_HOP.contains(name)
}

/// What frames, routes or tells of trailers has no place in them: RFC 9110 6.5.1.
pub(crate) fn may_be_trailer(name: &HeaderName) -> bool {
    !is_hop_by_hop(name) && ![CONTENT_LENGTH, HOST, TRAILER].contains(name)
}

/// The elements of a list header.
pub(crate) fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(|token| token.trim_ascii()).filter(|token| !token.is_empty())
}

/// What `Connection` names.
fn named(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> {
    let values = headers.get_all(CONNECTION).into_iter();
    let tokens = values.flat_map(|value| tokens(value.as_bytes()));
    // The host is no header to take away: without it a request has no meaning.
    tokens.filter_map(|token| HeaderName::from_bytes(token).ok()).filter(|name| name != HOST)
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        for name in named(headers).collect::<Vec<_>>() {
            headers.remove(name);
        }
    }
    // One pass over the few that there are: cheaper than nine look-ups that mostly find nothing.
    let mut found = [false; HOP_BY_HOP.len()];
    for name in headers.keys() {
        if let Some(at) = HOP_BY_HOP.iter().position(|hop| hop == name) {
            found[at] = true;
        }
    }
    for (name, _) in HOP_BY_HOP.iter().zip(found).filter(|(_, found)| *found) {
        headers.remove(name);
    }
}

/// Adds the client's address to those that a request came by.
pub fn append_forwarded_for(headers: &mut HeaderMap, peer: &Peer) {
    let mut before = match headers.entry(X_FORWARDED_FOR) {
        Entry::Occupied(before) => before,
        Entry::Vacant(first) => {
            first.insert(peer.forwarded.clone());
            return;
        }
    };
    let length: usize = before.iter().map(|value| value.len() + 2).sum();
    let mut all = Vec::with_capacity(length + peer.forwarded.len());
    for value in before.iter() {
        all.extend_from_slice(value.as_bytes());
        all.extend_from_slice(b", ");
    }
    all.extend_from_slice(peer.forwarded.as_bytes());
    if let Ok(all) = HeaderValue::from_maybe_shared(bytes::Bytes::from(all)) {
        before.insert(all);
    }
}

/// The target and the host in the form of the protocol.
fn target(head: &mut request::Parts, endpoint: &Endpoint) -> Result<(), Malformed> {
    if let Some(query) = head.uri.path_and_query().filter(|path| path.as_str().starts_with('?')) {
        // A query on no path is one on `/`, and everybody is to see it so.
        let path = PathAndQuery::try_from(format!("/{}", query.as_str()));
        let mut parts = std::mem::take(&mut head.uri).into_parts();
        parts.path_and_query = Some(path.map_err(|_invalid| Malformed("target"))?);
        head.uri = Uri::from_parts(parts).map_err(|_invalid| Malformed("target"))?;
    }
    match endpoint.protocol {
        Protocol::H1 => {
            if let Some(authority) = head.uri.authority() {
                // The target's own host counts, as RFC 9112 3.2.2 says; in HTTP/2 there is no other.
                let host = HeaderValue::try_from(host(authority)).map_err(|_invalid| Malformed("host"))?;
                head.headers.insert(HOST, host);
                let path = head.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
                head.uri = Uri::from(path);
            }
            if head.version == Version::HTTP_10 && !head.headers.contains_key(HOST) {
                // HTTP/1.1 needs a host: where nobody has named one it is the endpoint's own, as with Go.
                let addr = HeaderValue::try_from(endpoint.addr.to_string()).map_err(|_invalid| Malformed("host"))?;
                head.headers.insert(HOST, addr);
            }
            head.version = Version::HTTP_11;
        }
        Protocol::H2c => {
            let named = head.headers.remove(HOST);
            let mut parts = std::mem::take(&mut head.uri).into_parts();
            let read = |host: &[u8]| Authority::try_from(host).map_err(|_invalid| Malformed("host"));
            let authority = match (parts.authority.take(), named) {
                (Some(authority), _) => authority,
                (None, Some(host)) => read(host.as_bytes())?,
                (None, None) => return Err(Malformed("no host")),
            };
            // RFC 9113 8.3.1: no user goes there.
            let bare = host(&authority);
            let has_user = bare.len() < authority.as_str().len();
            parts.authority = Some(if has_user { read(bare.as_bytes())? } else { authority });
            parts.scheme.get_or_insert(Scheme::HTTP);
            parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
            head.uri = Uri::from_parts(parts).map_err(|_invalid| Malformed("target"))?;
            head.version = Version::HTTP_2;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
