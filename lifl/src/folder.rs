//! A folder of manifests: what `lifl up` serves.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use lifl_api::job::{FederatedJob, JobError};
use serde::Deserialize;

/// A job and where it was read.
#[derive(Clone, Debug)]
pub struct JobFile {
    /// `dir/file.yaml`.
    pub path: PathBuf,
    /// The job.
    pub job: FederatedJob,
    /// Value of the Secret that it names.
    pub join_secret: Option<String>,
}

/// Manifests that cannot be served, all of them at once.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct FolderError(pub Vec<ManifestFault>);

/// What is wrong with a manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestFault {
    /// The folder or a file cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Folder or file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not YAML, or not an object of Kubernetes.
    #[error("{path}:{line}: {message}", path = path.display())]
    Document {
        /// File.
        path: PathBuf,
        /// Line where the document begins.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// Not a FederatedJob that can run.
    #[error("{path}:{line}: {source}", path = path.display())]
    Job {
        /// File.
        path: PathBuf,
        /// Line where the document begins.
        line: usize,
        /// What is wrong.
        source: JobError,
    },
    /// A Secret that a job names is not in the folder.
    #[error("{path}: job {job} names Secret {secret}, key {key}, which is not in the folder", path = path.display())]
    Secret {
        /// File.
        path: PathBuf,
        /// Job.
        job: String,
        /// Secret.
        secret: String,
        /// Key.
        key: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    api_version: String,
    kind: String,
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    string_data: BTreeMap<String, String>,
    #[serde(default)]
    data: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
struct Metadata {
    #[serde(default)]
    name: String,
    namespace: Option<String>,
}

/// Reads the jobs of all `.yaml` and `.yml` files of a folder, in the order of their names. Objects of the ingress are passed
/// over, if it is served: the gateway reads them.
///
/// # Errors
/// Every fault of every file, with its line.
pub fn read(dir: &Path, ingress: bool) -> Result<Vec<JobFile>, FolderError> {
    let unread = |source| FolderError(vec![ManifestFault::Io { path: dir.to_owned(), source }]);
    let entries = fs::read_dir(dir).map_err(unread)?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "yaml" || end == "yml"));
    files.sort();
    let (mut jobs, mut secrets, mut faults) = (Vec::new(), BTreeMap::new(), Vec::new());
    for path in files {
        faults.extend(take_file(&path, ingress, &mut jobs, &mut secrets));
    }
    for file in &mut jobs {
        let file: &mut JobFile = file;
        let Some(auth) = &file.job.spec.auth else { continue };
        let wanted = &auth.token_secret_ref;
        let key = (file.job.namespace().to_owned(), wanted.name.clone(), wanted.key.clone());
        match secrets.get(&key) {
            Some(value) => file.join_secret = Some(String::clone(value)),
            None => faults.push(ManifestFault::Secret {
                path: file.path.clone(),
                job: file.job.name().to_owned(),
                secret: wanted.name.clone(),
                key: wanted.key.clone(),
            }),
        }
    }
    if faults.is_empty() { Ok(jobs) } else { Err(FolderError(faults)) }
}

/// Reads the jobs of one file. What else is in it is for `lifl up`: the Secrets that they name are not asked for.
///
/// # Errors
/// Every fault of the file, with its line.
pub fn read_file(path: &Path) -> Result<Vec<FederatedJob>, FolderError> {
    let mut jobs = Vec::new();
    let faults = take_file(path, true, &mut jobs, &mut BTreeMap::new());
    if faults.is_empty() { Ok(jobs.into_iter().map(|file| file.job).collect()) } else { Err(FolderError(faults)) }
}

/// Values of Secrets by namespace, name and key.
type Secrets = BTreeMap<(String, String, String), String>;

/// Takes what a file holds; tells what is wrong with it.
fn take_file(path: &Path, ingress: bool, jobs: &mut Vec<JobFile>, secrets: &mut Secrets) -> Vec<ManifestFault> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(source) => return vec![ManifestFault::Io { path: path.to_owned(), source }],
    };
    let documents = documents(&text).into_iter();
    documents.filter_map(|(line, document)| take(path, line, &document, ingress, jobs, secrets).err()).collect()
}

/// The documents of a file with the line each begins at, padded so that the parser's own line numbers are the file's.
fn documents(text: &str) -> Vec<(usize, String)> {
    let mut out = vec![(1, String::new())];
    for (index, line) in text.lines().enumerate() {
        if line == "---" || line.starts_with("--- ") {
            out.push((index + 2, "\n".repeat(index + 1)));
        } else if let Some((_, document)) = out.last_mut() {
            document.push_str(line);
            document.push('\n');
        }
    }
    let says_something = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    out.retain(|(_, document)| document.lines().any(says_something));
    out
}

fn take(
    path: &Path,
    line: usize,
    document: &str,
    ingress: bool,
    jobs: &mut Vec<JobFile>,
    secrets: &mut Secrets,
) -> Result<(), ManifestFault> {
    let fault = |message: String| ManifestFault::Document { path: path.to_owned(), line, message };
    let head: Head = serde_yaml_ng::from_str(document).map_err(|e| fault(e.to_string()))?;
    match (head.api_version.as_str(), head.kind.as_str()) {
        ("fl.lifl.dev/v1alpha1", "FederatedJob") => {
            let job = FederatedJob::from_yaml(document).map_err(|source| ManifestFault::Job {
                path: path.to_owned(),
                line,
                source,
            })?;
            jobs.push(JobFile { path: path.to_owned(), job, join_secret: None });
        }
        ("v1", "Secret") => {
            let namespace = head.metadata.namespace.unwrap_or_else(|| "default".into());
            for (key, value) in head.data {
                let bytes = BASE64_STANDARD.decode(value.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
                let value = bytes.ok_or_else(|| fault(format!("data.{key} of Secret is not base64 of UTF-8 text")))?;
                secrets.insert((namespace.clone(), head.metadata.name.clone(), key), value);
            }
            for (key, value) in head.string_data {
                secrets.insert((namespace.clone(), head.metadata.name.clone(), key), value);
            }
        }
        (version, kind) if is_of_ingress(version, kind) => {
            if !ingress {
                return Err(fault(format!("{version} {kind} is not served here without --ingress")));
            }
        }
        (version, kind) => {
            return Err(fault(format!(
                "{version} {kind} is not served here; FederatedJob (fl.lifl.dev/v1alpha1) and Secret (v1) are"
            )));
        }
    }
    Ok(())
}

/// Whether an object tells the ingress something; a list of such objects is one too.
fn is_of_ingress(version: &str, kind: &str) -> bool {
    matches!(
        (version, kind),
        ("networking.internal.knative.dev/v1alpha1", "Ingress")
            | ("discovery.k8s.io/v1", "EndpointSlice")
            | ("v1", "Service" | "Endpoints" | "List")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "apiVersion: fl.lifl.dev/v1alpha1\nkind: FederatedJob\nmetadata: {name: NAME}\nspec:\n  model: {name: m, initial: {uri: 'file:///m'}}\n  rounds: 1\n  clientsPerRound: 1\n  checkpoint: {uri: 'file:///c'}\n";

    fn folder(files: &[(&str, String)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
        dir
    }

    #[test]
    fn jobs_and_their_secrets_are_read_from_all_documents() {
        let secret = "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata: {token: aHVudGVyMg==}\n";
        let with_auth = format!("{}  auth: {{tokenSecretRef: {{name: s, key: token}}}}\n", JOB.replace("NAME", "b"));
        let text = format!("# a comment\n---\n{}---\n{secret}", JOB.replace("NAME", "a"));
        let dir = folder(&[("1.yaml", text), ("2.yml", with_auth), ("notes.txt", "not yaml: [".into())]);
        let jobs = read(dir.path(), false).unwrap();
        let found: Vec<_> = jobs.iter().map(|f| (f.job.name(), f.join_secret.as_deref())).collect();
        assert_eq!(found, [("a", None), ("b", Some("hunter2"))]);
    }

    #[test]
    fn what_is_the_ingress_s_is_for_who_serves_one() {
        let service = "apiVersion: v1\nkind: Service\nmetadata: {name: s}\n";
        let dir = folder(&[("1.yaml", format!("{}---\n{service}", JOB.replace("NAME", "a")))]);
        assert_eq!(read(dir.path(), true).unwrap().len(), 1);
        let refused = read(dir.path(), false).unwrap_err().to_string();
        assert!(refused.contains("1.yaml:10: v1 Service is not served here without --ingress"), "{refused}");
    }

    #[test]
    fn every_fault_is_told_with_its_file_and_line() {
        let text = format!(
            "{}---\n{}",
            JOB.replace("NAME", "a"),
            JOB.replace("NAME", "b").replace("rounds: 1", "rounds: many")
        );
        let other = "apiVersion: v1\nkind: Pod\n".to_owned();
        let dir = folder(&[("jobs.yaml", text), ("pod.yaml", other), ("torn.yaml", "a: [\n".into())]);
        let error = read(dir.path(), false).unwrap_err().to_string();
        assert!(
            error.contains("jobs.yaml:10") && error.contains("spec.rounds") && error.contains("line 15"),
            "{error}"
        );
        assert!(error.contains("pod.yaml:1") && error.contains("v1 Pod is not served here"), "{error}");
        assert!(error.contains("torn.yaml:1"), "{error}");
        let missing = read(Path::new("/does/not/exist"), false).unwrap_err().to_string();
        assert!(missing.contains("/does/not/exist"), "{missing}");
    }
}
