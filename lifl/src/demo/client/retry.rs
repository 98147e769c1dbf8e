//! What a sender does after an answer: the table of `surface.md` 1, from the client's side.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode, header::RETRY_AFTER};

/// First pause; doubled with each attempt.
const FIRST: Duration = Duration::from_millis(50);
/// Longest pause that a client chooses by itself.
const LONGEST: Duration = Duration::from_secs(5);
/// Longest pause that a server can ask for: beyond it the answer is not believed.
const LONGEST_ASKED: Duration = Duration::from_secs(60);

/// What an answer means for the one who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As wished.
    Done,
    /// This round takes no more updates: ask for the next task.
    RoundOver,
    /// The token is not, or no longer, good: join again.
    Rejoin,
    /// The same request, with the same id, after a pause.
    Again(Duration),
    /// Hopeless as it is.
    Refused,
}

/// Judges an answer; `attempt` counts from 0.
pub(crate) fn judge(status: StatusCode, headers: &HeaderMap, attempt: u32) -> Verdict {
    match status.as_u16() {
        200..=299 | 304 => Verdict::Done,
        401 | 403 => Verdict::Rejoin,
        410 => Verdict::RoundOver,
        404 | 408 | 409 | 429 | 500..=599 => Verdict::Again(asked(headers).unwrap_or_else(|| pause(attempt))),
        _ => Verdict::Refused,
    }
}

/// Pause before attempt `attempt + 1`: doubled each time, and spread so that clients that failed together do not return together.
pub(crate) fn pause(attempt: u32) -> Duration {
    let doubled = FIRST.saturating_mul(1 << attempt.min(10)).min(LONGEST);
    doubled.mul_f32(0.5 + 0.5 * fastrand::f32())
}

/// `Retry-After`, as seconds or as a date.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let duration = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_not_a_number) => {
            let date = httpdate::parse_http_date(text).ok()?;
            date.duration_since(SystemTime::now()).unwrap_or_default()
        }
    };
    Some(duration.min(LONGEST_ASKED))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(status: u16, retry_after: Option<&str>) -> Verdict {
        let mut headers = HeaderMap::new();
        if let Some(value) = retry_after {
            headers.insert(RETRY_AFTER, value.parse().expect("header"));
        }
        judge(StatusCode::from_u16(status).expect("status"), &headers, 0)
    }

    #[test]
    fn statuses_follow_the_table() {
        for status in [404, 408, 409, 429, 500, 503] {
            assert!(matches!(judged(status, None), Verdict::Again(_)), "{status}");
        }
        for status in [400, 413, 415, 422] {
            assert_eq!(judged(status, None), Verdict::Refused, "{status}");
        }
        assert_eq!(judged(202, None), Verdict::Done);
        assert_eq!(judged(410, Some("5")), Verdict::RoundOver);
        assert_eq!(judged(401, None), Verdict::Rejoin);
        assert_eq!(judged(403, None), Verdict::Rejoin);
    }

    #[test]
    fn retry_after_is_honoured_within_reason() {
        assert_eq!(judged(429, Some("7")), Verdict::Again(Duration::from_secs(7)));
        assert_eq!(judged(503, Some("0")), Verdict::Again(Duration::ZERO));
        assert_eq!(judged(503, Some("86400")), Verdict::Again(LONGEST_ASKED));
        let past = Some("Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(judged(503, past), Verdict::Again(Duration::ZERO));
        let future = Some("Fri, 31 Dec 9999 23:59:59 GMT");
        assert_eq!(judged(503, future), Verdict::Again(LONGEST_ASKED));
        let Verdict::Again(own) = judged(503, Some("soon")) else {
            panic!("an unreadable Retry-After is no reason to give up")
        };
        assert!(own <= FIRST);
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        for attempt in 0..40 {
            let pause = pause(attempt);
            let doubled = FIRST.saturating_mul(1 << attempt.min(10)).min(LONGEST);
            assert!(doubled / 2 <= pause && pause <= doubled, "{attempt}: {pause:?}");
        }
    }
}
