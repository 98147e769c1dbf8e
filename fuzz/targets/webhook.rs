//! Target of the webhook: an AdmissionReview, whatever stands in it.

use std::collections::BTreeSet;

/// Whoever asks is answered by something that is JSON, or not at all.
pub(crate) fn review(input: &[u8]) {
    for namespace_asks in [false, true] {
        if let Ok(reviewed) = lifl_webhook::review(input, namespace_asks, &BTreeSet::new()) {
            assert_eq!(reviewed.answer["response"]["allowed"], true, "no pod is refused");
        }
    }
}
