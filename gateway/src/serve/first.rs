//! `initial: {fromFirstClient: true}`: the first upload of round 1 becomes the job's first model.

use std::sync::Arc;

use super::upload::Upload;
use crate::{
    chain::{Chain, Claim},
    problem::{Code, Refusal},
    state::Gateway,
};

/// Takes the body as the job's model; always a refusal: the client is asked to send the same again, as an update.
pub(crate) async fn adopt(_: &Arc<Gateway>, _: &Arc<Chain>, _: &Claim, _: &mut Upload) -> Refusal {
    Code::Starting.with("the job's model is not here yet")
}
