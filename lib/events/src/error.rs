//! What is wrong with an event.

/// Why a request is no CloudEvent that we read. Names the attribute, and the value where it is no secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// A required attribute is absent.
    #[error("attribute '{0}' is missing")]
    Missing(String),
    /// An attribute that must not be empty is.
    #[error("attribute '{0}' is empty")]
    Empty(String),
    /// One attribute, two values: which one counts would depend on who reads it.
    #[error("attribute '{0}' is given more than once")]
    Repeated(String),
    /// Not a name of an attribute.
    #[error("'{0}' is not the name of an attribute: use a-z and 0-9 only, and not 'data'")]
    Name(String),
    /// Another version of CloudEvents.
    #[error("attribute 'specversion' is '{0}', only '1.0' is understood")]
    Version(String),
    /// `ce-datacontenttype` beside Content-Type.
    #[error("attribute 'datacontenttype' belongs into the Content-Type header, not into 'ce-datacontenttype'")]
    ContentType,
    /// Bytes that are no UTF-8 text, before or after percent-decoding.
    #[error("attribute '{name}' is not UTF-8 text: '{value}'")]
    Encoding {
        /// Attribute.
        name: String,
        /// Its bytes, what is not UTF-8 replaced.
        value: String,
    },
    /// A value of another type than the attribute has.
    #[error("attribute '{name}' is '{value}', which is not {wanted}")]
    Value {
        /// Attribute.
        name: String,
        /// Its value.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// A structured event in another format than JSON.
    #[error("'{0}' is not understood: structured events are application/cloudevents+json")]
    Format(String),
    /// A structured event that is too long.
    #[error("structured event of more than {limit} bytes")]
    TooLong {
        /// Bytes accepted.
        limit: usize,
    },
    /// A structured event that is unreadable, or data that are.
    #[error("unreadable event: {0}")]
    Unreadable(String),
}

// === impl EventError ===

impl EventError {
    pub(crate) fn value(name: &str, value: &str, wanted: &'static str) -> Self {
        // A hostile value shall not blow up the answer that names it.
        let value = value.chars().take(200).collect();
        Self::Value { name: name.to_owned(), value, wanted }
    }
}
