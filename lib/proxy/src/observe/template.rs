//! Templates of Knative's request log: the subset of Go's `text/template` that such lines are written in.
//!
//! `{{.Field}}`, `{{js .Field}}` and `{{.Field | js}}` (also `html` and `urlquery`), with the trim markers `{{-` and `-}}`;
//! fields of the request, the response, the revision, and `.TraceID`. `{{index .Request.Header "Name"}}` and
//! `{{.Request.Header.Get "Name"}}` give a header. Conditions, loops and variables are refused: whoever has asked for them
//! is told, and gets lines of the default shape.

use std::{fmt::Write as _, net::SocketAddr};

use http::{HeaderName, Request, Version, header};

use super::trace_id;
use crate::head::host;

/// A template that was read.
#[derive(Clone, Debug)]
pub struct Template {
    pieces: Vec<Piece>,
}

/// What is known of a pod before any request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The revision.
    pub revision: String,
    /// Its namespace.
    pub namespace: String,
    /// Its Service, or nothing.
    pub service: String,
    /// Its Configuration.
    pub configuration: String,
    /// The pod.
    pub pod: String,
    /// The pod's address.
    pub address: String,
}

/// What is known when the response has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Response {
    /// Its status.
    pub status: u16,
    /// Bytes of its body.
    pub bytes: u64,
    /// Seconds since the request came.
    pub seconds: f64,
}

/// A line that lacks only what the response tells.
#[derive(Debug)]
pub struct Draft {
    text: String,
    /// What belongs where in the text.
    holes: Vec<(usize, Late, Escape)>,
}

/// A template that is beyond the subset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("template: {0}")]
pub struct TemplateError(String);

#[derive(Clone, Debug)]
enum Piece {
    Text(String),
    Early(Early, Escape),
    Late(Late, Escape),
}

/// Known with the request.
#[derive(Clone, Debug)]
enum Early {
    Method,
    RequestUri,
    Path,
    Host,
    Proto,
    ContentLength,
    UserAgent,
    Referer,
    RemoteAddr,
    Header(HeaderName),
    TraceId,
    Fact(fn(&Facts) -> &str),
}

/// Known with the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Late {
    Code,
    Size,
    Latency,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    Js,
    Html,
    Query,
}

// === impl Facts ===

impl Facts {
    /// What OpenTelemetry calls the service: the first of these that there is.
    #[must_use]
    pub fn service_name(&self) -> &str {
        let names = [&self.service, &self.configuration, &self.revision, &self.pod];
        names.into_iter().find(|name| !name.is_empty()).map_or("", String::as_str)
    }
}

// === impl Template ===

impl Template {
    /// Knative's own default.
    pub const DEFAULT: &str = r#"{"httpRequest": {"requestMethod": "{{.Request.Method}}", "requestUrl": "{{js .Request.RequestURI}}", "requestSize": "{{.Request.ContentLength}}", "status": {{.Response.Code}}, "responseSize": "{{.Response.Size}}", "userAgent": "{{js .Request.UserAgent}}", "remoteIp": "{{js .Request.RemoteAddr}}", "serverIp": "{{.Revision.PodIP}}", "referer": "{{js .Request.Referer}}", "latency": "{{.Response.Latency}}s", "protocol": "{{.Request.Proto}}"}, "traceId": "{{.TraceID}}"}"#;

    /// Reads a template.
    ///
    /// # Errors
    /// [`TemplateError`] with what is not understood.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let mut pieces = Vec::new();
        let mut rest = text;
        let mut trim = false;
        loop {
            let (mut plain, action) = match rest.split_once("{{") {
                Some((plain, after)) => (plain, Some(after)),
                None => (rest, None),
            };
            if trim {
                plain = plain.trim_start();
            }
            let Some(after) = action else {
                pieces.push(Piece::Text(plain.trim_end_matches('\n').to_owned()));
                return Ok(Self { pieces });
            };
            let (inside, left) =
                after.split_once("}}").ok_or_else(|| TemplateError(format!("'{{{{{after}' has no end")))?;
            let before = inside.strip_prefix("- ");
            let (inside, trim_before) = (before.unwrap_or(inside), before.is_some());
            let behind = inside.strip_suffix(" -");
            (rest, trim) = (left, behind.is_some());
            pieces.push(Piece::Text(if trim_before { plain.trim_end() } else { plain }.to_owned()));
            pieces.extend(action_of(behind.unwrap_or(inside).trim())?);
        }
    }

    /// The line of a request that has come from `peer`, as far as it is known.
    #[must_use]
    pub fn draft<B: hyper::body::Body>(&self, request: &Request<B>, peer: SocketAddr, facts: &Facts) -> Draft {
        let mut draft = Draft { text: String::with_capacity(512), holes: Vec::with_capacity(4) };
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => draft.text.push_str(text),
                Piece::Early(field, escape) => field.write(&mut draft.text, *escape, request, peer, facts),
                Piece::Late(field, escape) => draft.holes.push((draft.text.len(), *field, *escape)),
            }
        }
        draft
    }
}

/// What stands between braces; a comment is nothing.
fn action_of(inside: &str) -> Result<Option<Piece>, TemplateError> {
    let unknown = || TemplateError(format!("'{{{{{inside}}}}}' is beyond what is understood"));
    if inside.starts_with("/*") && inside.ends_with("*/") {
        return Ok(None);
    }
    let (field, piped) = match inside.split_once('|') {
        Some((field, pipe)) => (field.trim(), Some(pipe.trim())),
        None => (inside, None),
    };
    let (called, field) = match field.split_once(' ') {
        Some((function @ ("js" | "html" | "urlquery" | "print" | "printf"), field)) => (Some(function), field.trim()),
        _ => (None, field),
    };
    let escape = match (called, piped) {
        (None, None) => Escape::None,
        (Some(name), None) | (None, Some(name)) => match name {
            "js" => Escape::Js,
            "html" => Escape::Html,
            "urlquery" => Escape::Query,
            "print" => Escape::None,
            _ => return Err(unknown()),
        },
        _ => return Err(unknown()),
    };
    let fact = |fact: fn(&Facts) -> &str| Piece::Early(Early::Fact(fact), escape);
    Ok(Some(match field {
        ".Request.Method" => Piece::Early(Early::Method, escape),
        ".Request.RequestURI" | ".Request.URL" => Piece::Early(Early::RequestUri, escape),
        ".Request.URL.Path" => Piece::Early(Early::Path, escape),
        ".Request.Host" => Piece::Early(Early::Host, escape),
        ".Request.Proto" => Piece::Early(Early::Proto, escape),
        ".Request.ContentLength" => Piece::Early(Early::ContentLength, escape),
        ".Request.UserAgent" => Piece::Early(Early::UserAgent, escape),
        ".Request.Referer" => Piece::Early(Early::Referer, escape),
        ".Request.RemoteAddr" => Piece::Early(Early::RemoteAddr, escape),
        ".TraceID" => Piece::Early(Early::TraceId, escape),
        ".Response.Code" => Piece::Late(Late::Code, escape),
        ".Response.Size" => Piece::Late(Late::Size, escape),
        ".Response.Latency" => Piece::Late(Late::Latency, escape),
        ".Revision.Name" => fact(|facts| &facts.revision),
        ".Revision.Namespace" => fact(|facts| &facts.namespace),
        ".Revision.Service" => fact(|facts| &facts.service),
        ".Revision.Configuration" => fact(|facts| &facts.configuration),
        ".Revision.PodName" => fact(|facts| &facts.pod),
        ".Revision.PodIP" => fact(|facts| &facts.address),
        other => {
            let name =
                ["index .Request.Header ", ".Request.Header.Get "].iter().find_map(|call| other.strip_prefix(call));
            let name = name.and_then(|name| name.trim().strip_prefix('"')?.strip_suffix('"'));
            let name = name.and_then(|name| HeaderName::try_from(name).ok()).ok_or_else(unknown)?;
            Piece::Early(Early::Header(name), escape)
        }
    }))
}

// === impl Early ===

impl Early {
    fn write<B: hyper::body::Body>(
        &self,
        out: &mut String,
        escape: Escape,
        request: &Request<B>,
        peer: SocketAddr,
        facts: &Facts,
    ) {
        let header = |name: &HeaderName| request.headers().get(name).map_or(&[][..], |value| value.as_bytes());
        let text = |name: &HeaderName| String::from_utf8_lossy(header(name));
        match self {
            Self::Method => escape.write(out, request.method().as_str()),
            Self::RequestUri => escape.write(out, request.uri().path_and_query().map_or("/", |target| target.as_str())),
            Self::Path => escape.write(out, request.uri().path()),
            Self::Host => match request.uri().authority() {
                Some(authority) => escape.write(out, host(authority)),
                None => escape.write(out, &text(&header::HOST)),
            },
            Self::Proto => escape.write(out, proto(request.version())),
            Self::ContentLength => {
                // Of a body that is not told in advance, Go's length is -1.
                let length = request.body().size_hint().exact().map_or(-1, u64::cast_signed);
                let _to_a_string = write!(out, "{length}");
            }
            Self::UserAgent => escape.write(out, &text(&header::USER_AGENT)),
            Self::Referer => escape.write(out, &text(&header::REFERER)),
            Self::RemoteAddr => escape.write(out, &peer.to_string()),
            Self::Header(name) => escape.write(out, &text(name)),
            Self::TraceId => escape.write(out, trace_id(request.headers())),
            Self::Fact(fact) => escape.write(out, fact(facts)),
        }
    }
}

/// As Go's `Request.Proto` has it.
const fn proto(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2.0",
        _ => "HTTP/1.1",
    }
}

// === impl Draft ===

impl Draft {
    /// The whole line.
    #[must_use]
    pub fn finish(&self, response: &Response) -> String {
        let mut line = String::with_capacity(self.text.len() + 32);
        let mut from = 0;
        for (at, field, escape) in &self.holes {
            line.push_str(&self.text[from..*at]);
            from = *at;
            let value = match field {
                Late::Code => response.status.to_string(),
                Late::Size => response.bytes.to_string(),
                Late::Latency => response.seconds.to_string(),
            };
            escape.write(&mut line, &value);
        }
        line.push_str(&self.text[from..]);
        // One line per request, whatever the template says.
        if line.contains('\n') { line.replace('\n', " ") } else { line }
    }
}

// === impl Escape ===

impl Escape {
    fn write(self, out: &mut String, text: &str) {
        for c in text.chars() {
            let replaced = match self {
                Self::None => None,
                Self::Js => js(c),
                Self::Html => html(c),
                Self::Query => {
                    query(out, c);
                    continue;
                }
            };
            match replaced {
                Some(replaced) => out.push_str(replaced),
                None if self == Self::Js && c.is_control() => {
                    let _to_a_string = write!(out, "\\u{:04X}", u32::from(c));
                }
                None => out.push(c),
            }
        }
    }
}

/// As Go's `JSEscapeString`.
const fn js(c: char) -> Option<&'static str> {
    Some(match c {
        '\\' => r"\\",
        '\'' => r"\'",
        '"' => r#"\""#,
        '<' => r"\u003C",
        '>' => r"\u003E",
        '&' => r"\u0026",
        '=' => r"\u003D",
        _ => return None,
    })
}

const fn html(c: char) -> Option<&'static str> {
    Some(match c {
        '&' => "&amp;",
        '\'' => "&#39;",
        '"' => "&#34;",
        '<' => "&lt;",
        '>' => "&gt;",
        _ => return None,
    })
}

fn query(out: &mut String, c: char) {
    match c {
        'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_' | '.' | '~' => out.push(c),
        ' ' => out.push('+'),
        other => {
            for byte in other.encode_utf8(&mut [0; 4]).bytes() {
                let _to_a_string = write!(out, "%{byte:02X}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;

    use super::*;

    const RESPONSE: Response = Response { status: 201, bytes: 7, seconds: 0.25 };

    fn line(template: &str) -> Result<String, TemplateError> {
        let request = Request::post("http://u:p@a.example/x?q=1&r='2'")
            .header("user-agent", "curl \"8\"")
            .header("x-many", "m")
            .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
            .body(Full::new(bytes::Bytes::from_static(b"body")))
            .expect("a request");
        let facts = Facts { revision: "r".into(), address: "10.0.0.7".into(), ..Facts::default() };
        Ok(Template::parse(template)?
            .draft(&request, "1.2.3.4:5".parse().expect("an address"), &facts)
            .finish(&RESPONSE))
    }

    #[test]
    fn knative_the_default_template_makes_its_line() {
        let expected = concat!(
            r#"{"httpRequest": {"requestMethod": "POST", "requestUrl": "/x?q\u003D1\u0026r\u003D\'2\'", "requestSize": "4", "#,
            r#""status": 201, "responseSize": "7", "userAgent": "curl \"8\"", "remoteIp": "1.2.3.4:5", "#,
            r#""serverIp": "10.0.0.7", "referer": "", "latency": "0.25s", "protocol": "HTTP/1.1"}, "#,
            r#""traceId": "0af7651916cd43dd8448eb211c80319c"}"#
        );
        assert_eq!(line(Template::DEFAULT).as_deref(), Ok(expected));
    }

    #[test]
    fn a_subset_of_go_templates_is_understood_and_the_rest_is_refused() {
        let rows = [
            ("plain", "plain"),
            ("{{.Request.Host}} {{.Revision.Name}}\n", "a.example r"),
            ("{{ .Request.URL.Path | js }}{{/* nothing */}}.", "/x."),
            ("a {{- .Response.Code -}} b", "a201b"),
            (r#"{{.Request.Header.Get "X-Many"}}{{index .Request.Header "X-None"}}"#, "m"),
            ("{{urlquery .Request.RequestURI}}", "%2Fx%3Fq%3D1%26r%3D%272%27"),
            ("{{html .Request.RequestURI}}", "/x?q=1&amp;r=&#39;2&#39;"),
        ];
        for (template, expected) in rows {
            assert_eq!(line(template).as_deref(), Ok(expected), "{template}");
        }
        for template in ["{{if .TraceID}}a{{end}}", "{{.Request.Method", "{{.Nothing}}", "{{printf .Request.Method}}"] {
            assert!(line(template).is_err(), "{template}");
        }
    }
}
