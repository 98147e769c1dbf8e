//! Tokens of clients: stateless, so that a gateway that lost its memory still knows its own.
//!
//! `base64url(role, client) "." base64url(HMAC-SHA256(key of the job, role, client))`: who presents it is read from it.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use lifl_api::event::ClientRole;
use sha2::Sha256;

/// Who holds a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bearer {
    pub(crate) client: String,
    pub(crate) role: ClientRole,
}

/// The key of a job's tokens.
#[derive(Clone)]
pub(crate) struct Key(Hmac<Sha256>);

// === impl Key ===

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// From the coordinator's hex text; any other text is a key too.
    pub(crate) fn new(text: &str) -> Option<Self> {
        Hmac::new_from_slice(text.as_bytes()).ok().map(Self)
    }

    /// The token of a client.
    pub(crate) fn token(&self, bearer: &Bearer) -> String {
        let name = bearer.name();
        let proof = self.0.clone().chain_update(&name).finalize().into_bytes();
        format!("{}.{}", URL_SAFE_NO_PAD.encode(name), URL_SAFE_NO_PAD.encode(proof))
    }

    /// Who the token was made for, if this job made it.
    pub(crate) fn bearer(&self, token: &str) -> Option<Bearer> {
        let (name, proof) = token.split_once('.')?;
        let (name, proof) = (URL_SAFE_NO_PAD.decode(name).ok()?, URL_SAFE_NO_PAD.decode(proof).ok()?);
        self.0.clone().chain_update(&name).verify_slice(&proof).ok()?;
        let text = String::from_utf8(name).ok()?;
        let (role, client) = text.split_at_checked(1)?;
        let role = if role == "e" { ClientRole::Evaluator } else { ClientRole::Trainer };
        Some(Bearer { client: client.to_owned(), role })
    }

    /// Whether two secrets are the same, in a time that tells nothing of where they differ.
    pub(crate) fn same_secret(&self, presented: &str, secret: &str) -> bool {
        let proof = self.0.clone().chain_update(secret).finalize().into_bytes();
        self.0.clone().chain_update(presented).verify_slice(&proof).is_ok()
    }
}

// === impl Bearer ===

impl Bearer {
    fn name(&self) -> String {
        let role = if self.role == ClientRole::Evaluator { 'e' } else { 't' };
        format!("{role}{}", self.client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_its_client_and_fits_its_job_only() {
        let (key, other) = (Key::new("k1").unwrap(), Key::new("k2").unwrap());
        for role in [ClientRole::Trainer, ClientRole::Evaluator] {
            let bearer = Bearer { client: "alice".into(), role };
            let token = key.token(&bearer);
            assert_eq!(key.bearer(&token), Some(bearer));
            assert_eq!(other.bearer(&token), None);
        }
    }

    #[test]
    fn forged_tokens_are_nobodys() {
        let key = Key::new("k1").unwrap();
        let good = key.token(&Bearer { client: "alice".into(), role: ClientRole::Trainer });
        let (_, proof) = good.split_once('.').unwrap();
        let forged = format!("{}.{proof}", URL_SAFE_NO_PAD.encode("tbob"));
        let raised = format!("{}.{proof}", URL_SAFE_NO_PAD.encode("ealice"));
        for token in ["", ".", "a.b", &forged, &raised, &good[1..], &format!("{good}A"), "é.é"] {
            assert_eq!(key.bearer(token), None, "{token}");
        }
        assert!(key.same_secret("open", "open"));
        assert!(!key.same_secret("open", "open2") && !key.same_secret("", "open"));
    }
}
