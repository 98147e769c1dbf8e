//! A FederatedJob as an API server has it.

use std::borrow::Cow;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Resource,
    core::{NamespaceResourceScope, object::HasStatus},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{FederatedJob, FederatedJobSpec, FederatedJobStatus, JobError};

/// A [`FederatedJob`] whose spec is not read yet.
///
/// The schema cannot say all that a spec must be: who keeps these learns of a job that cannot be read, and can tell it so.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobObject {
    #[serde(default = "api_version")]
    api_version: String,
    #[serde(default = "kind")]
    kind: String,
    /// Name, namespace, generation.
    pub metadata: ObjectMeta,
    /// The spec as it was written.
    #[serde(default)]
    pub spec: Value,
    /// What was said of it last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<FederatedJobStatus>,
}

fn api_version() -> String {
    FederatedJob::api_version(&()).into_owned()
}

fn kind() -> String {
    FederatedJob::kind(&()).into_owned()
}

// === impl JobObject ===

impl JobObject {
    /// The job, if it is one: with what identifies it, without what others noted on it, and without its status.
    ///
    /// # Errors
    /// [`JobError`] with the path of the field.
    pub fn read(&self) -> Result<FederatedJob, JobError> {
        let spec: FederatedJobSpec = serde_path_to_error::deserialize(&self.spec).map_err(|error| {
            let path = error.path().to_string();
            let path = if path == "." { "spec".to_owned() } else { format!("spec.{path}") };
            JobError::Parse { path, message: error.inner().to_string() }
        })?;
        let ObjectMeta { name, namespace, uid, generation, .. } = self.metadata.clone();
        let metadata = ObjectMeta { name, namespace, uid, generation, ..ObjectMeta::default() };
        let job = FederatedJob { metadata, spec, status: None };
        job.validate()?;
        Ok(job)
    }
}

impl Resource for JobObject {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        FederatedJob::kind(&())
    }

    fn group((): &()) -> Cow<'_, str> {
        FederatedJob::group(&())
    }

    fn version((): &()) -> Cow<'_, str> {
        FederatedJob::version(&())
    }

    fn plural((): &()) -> Cow<'_, str> {
        FederatedJob::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl HasStatus for JobObject {
    type Status = FederatedJobStatus;

    fn status(&self) -> Option<&FederatedJobStatus> {
        self.status.as_ref()
    }

    fn status_mut(&mut self) -> &mut Option<FederatedJobStatus> {
        &mut self.status
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(spec: Value) -> JobObject {
        let metadata = json!({"name": "digits", "namespace": "fl", "uid": "u", "generation": 3, "labels": {"a": "b"}});
        serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
    }

    fn spec() -> Value {
        json!({"model": {"name": "m", "initial": {"fromFirstClient": true}}, "rounds": 1, "clientsPerRound": 2,
            "checkpoint": {"uri": "file:///m"}})
    }

    #[test]
    fn it_is_read_and_written_as_the_job_that_it_is() {
        let object = object(spec());
        let job = object.read().unwrap();
        assert_eq!((job.namespace(), job.name(), job.metadata.generation), ("fl", "digits", Some(3)));
        assert_eq!((job.metadata.labels, job.status), (None, None));
        let written = serde_json::to_value(&object).unwrap();
        assert_eq!(
            (&written["apiVersion"], &written["kind"]),
            (&json!("fl.lifl.dev/v1alpha1"), &json!("FederatedJob"))
        );
        assert_eq!(written["spec"], spec());
    }

    #[test]
    fn what_is_wrong_has_its_path() {
        for (field, value, path) in [
            ("roundDeadline", json!("soon"), "spec.roundDeadline: "),
            ("minClients", json!(3), "spec.minClients: 3"),
            ("rounds", Value::Null, "spec.rounds: "),
            ("checkpoint", json!({}), "spec.checkpoint: "),
        ] {
            let mut spec = spec();
            spec[field] = value;
            let error = object(spec).read().unwrap_err().to_string();
            assert!(error.starts_with(path), "{error}");
        }
        let error = object(Value::Null).read().unwrap_err().to_string();
        assert!(error.starts_with("spec: "), "{error}");
    }
}
