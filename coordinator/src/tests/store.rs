//! The checkpoint: a crash between any two steps, damaged files, foreign folders, wrong models.

use std::{
    fs,
    os::unix::fs::{FileExt as _, PermissionsExt as _},
    path::Path,
    sync::atomic::Ordering,
};

use lifl_api::manifest::Manifest;
use rustix::fs::{FileType, Mode};
use tempfile::TempDir;

use super::{model, receipt, segment};
use crate::{
    checkpoint::{Checkpoint, CheckpointError, Finished, Source, initial, path_of},
    round::StoreFailure,
    state::{Done, Model},
};

fn open(folder: &TempDir) -> Checkpoint {
    Checkpoint::open(&format!("file://{}", folder.path().display())).unwrap()
}

fn values(round: u32) -> Vec<f32> {
    (0..1000).map(|i| i as f32 + round as f32).collect()
}

fn done(round: u32) -> (Done, Source, Manifest) {
    let bytes = model(&values(round));
    let manifest = Manifest::parse(&bytes).unwrap();
    let done = Done { round, count: 3, weight: 6.0, length: bytes.len() as u64, receipt: receipt(3) };
    (done, Source::new(segment(4096, &bytes), 4096, bytes.len() as u64), manifest)
}

async fn write(checkpoint: &Checkpoint, round: u32) -> Result<(), StoreFailure> {
    let (done, source, manifest) = done(round);
    checkpoint.write(&done, 1.5, &source, &manifest).await.map(drop)
}

fn path(folder: &TempDir, round: u32, file: &str) -> std::path::PathBuf {
    folder.path().join(format!("rounds/{round:06}/{file}"))
}

#[tokio::test]
async fn what_was_written_is_read_back() {
    let folder = TempDir::new().unwrap();
    for round in 1..=3 {
        write(&open(&folder), round).await.unwrap();
    }
    let newest = open(&folder).newest().await.unwrap();
    let (commit, sealed) = newest.committed.unwrap();
    assert_eq!((commit.round, commit.count, newest.history.len(), newest.warning), (3, 3, 3, None));
    let mut bytes = vec![0; usize::try_from(commit.model_bytes).unwrap()];
    let file = fs::File::from(sealed.fd);
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, model(&values(3)));
    assert!(file.write_at(b"x", 0).is_err(), "the model in memory is not sealed");
    let receipt = fs::read_to_string(path(&folder, 2, "receipt.json")).unwrap();
    assert!(receipt.contains("lifl.dev/receipts/v1") && receipt.contains("r-2"), "{receipt}");
}

#[tokio::test]
async fn a_crash_between_any_two_steps_leaves_a_whole_round() {
    for crash_after in 0.. {
        let folder = TempDir::new().unwrap();
        write(&open(&folder), 1).await.unwrap();
        write(&open(&folder), 2).await.unwrap();
        let checkpoint = open(&folder);
        checkpoint.newest().await.unwrap();
        checkpoint.steps_left.store(crash_after, Ordering::Relaxed);
        let written = write(&checkpoint, 3).await;
        let pruned = checkpoint.prune(1, 1).await;
        let again = open(&folder).newest().await.unwrap();
        let round = again.committed.unwrap().0.round;
        assert_eq!(again.warning, None, "a crash is no damage");
        // After the last step of the write the round may be there although its writer died.
        assert!(round == if written.is_ok() { 3 } else { round.clamp(2, 3) }, "crash after {crash_after}: {round}");
        // The successor writes the next round as if nothing had been.
        let next = open(&folder);
        write(&next, round + 1).await.unwrap();
        assert_eq!(next.newest().await.unwrap().committed.unwrap().0.round, round + 1);
        if written.is_ok() && pruned.is_ok() {
            assert!(crash_after >= 5, "only {crash_after} steps: crashes are not tested");
            return;
        }
    }
}

#[tokio::test]
async fn damage_of_any_file_is_found_and_an_older_round_is_taken() {
    type Damage = fn(&Path);
    let truncate: Damage = |p| fs::File::options().write(true).open(p).unwrap().set_len(100).unwrap();
    let flip: Damage = |p| {
        let file = fs::File::options().read(true).write(true).open(p).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 120).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 120).unwrap();
    };
    let remove: Damage = |p| fs::remove_file(p).unwrap();
    let empty: Damage = |p| fs::write(p, "").unwrap();
    let cases: [(&str, Damage); 9] = [
        ("model.safetensors", truncate),
        ("model.safetensors", flip),
        ("model.safetensors", remove),
        ("receipt.json", truncate),
        ("receipt.json", flip),
        ("receipt.json", remove),
        ("commit.json", truncate),
        ("commit.json", flip),
        ("commit.json", empty),
    ];
    for (number, (file, damage)) in cases.into_iter().enumerate() {
        let folder = TempDir::new().unwrap();
        for round in 1..=3 {
            write(&open(&folder), round).await.unwrap();
        }
        damage(&path(&folder, 3, file));
        let newest = open(&folder).newest().await.unwrap();
        assert_eq!(newest.committed.unwrap().0.round, 2, "{number}: {file}");
        assert!(newest.warning.unwrap().contains("round 3"), "{number}: {file}");
        assert!(folder.path().join("damaged/000003-0").exists());
        assert!(!path(&folder, 3, "commit.json").exists());
        assert_eq!(open(&folder).newest().await.unwrap().committed.unwrap().0.round, 2);
    }
}

#[tokio::test]
async fn nothing_is_begun_anew_when_no_round_can_be_read() {
    let folder = TempDir::new().unwrap();
    write(&open(&folder), 1).await.unwrap();
    fs::remove_file(path(&folder, 1, "model.safetensors")).unwrap();
    let error = open(&folder).newest().await.unwrap_err();
    assert!(
        matches!(error, CheckpointError::Damaged { .. }) && error.to_string().contains("move the folder away"),
        "{error}"
    );
    assert!(path(&folder, 1, "commit.json").exists());
}

#[tokio::test]
async fn wrong_models_and_receipts_are_refused() {
    type Spoil = fn(&mut Done);
    let spoils: [(Spoil, &str); 5] = [
        (|d| d.count = 4, "4 updates"),
        (|d| drop(d.receipt.pop()), "2 in the receipt"),
        (|d| d.receipt[0] = d.receipt[1].clone(), "twice"),
        (|d| d.weight = 6.1, "6.1"),
        (|d| (d.count, d.receipt) = (0, Vec::new()), "0 updates"),
    ];
    let folder = TempDir::new().unwrap();
    let checkpoint = open(&folder);
    for (spoil, word) in spoils {
        let (mut done, source, manifest) = done(1);
        spoil(&mut done);
        let error = checkpoint.write(&done, 1.0, &source, &manifest).await.unwrap_err();
        assert!(matches!(&error, StoreFailure::Rejected(why) if why.contains(word)), "{error:?}");
    }
    let (done, _, manifest) = done(1);
    let mut nan = values(1);
    nan[997] = f32::INFINITY;
    for (bytes, word) in [
        (model(&nan), "not finite"),
        (model(&values(1)[1..]), "bytes instead of"),
        (vec![0xFF; model(&values(1)).len()], "header"),
        (model(&values(1))[..2000].to_vec(), "read"),
    ] {
        let length = if word == "read" { done.length } else { bytes.len() as u64 };
        let source = Source::new(segment(64, &bytes), 64, length);
        let error = checkpoint.write(&done, 1.0, &source, &manifest).await.unwrap_err();
        assert!(matches!(&error, StoreFailure::Rejected(why) if why.contains(word)), "{word}: {error:?}");
    }
    assert!(checkpoint.newest().await.unwrap().committed.is_none());
}

#[tokio::test]
async fn pruning_takes_old_models_only() {
    for (every, keep, kept) in [(1, 3, vec![8, 9, 10]), (1, 1, vec![10]), (4, 2, vec![4, 8, 10]), (3, 1, vec![9, 10])] {
        let folder = TempDir::new().unwrap();
        for round in 1..=10 {
            let checkpoint = open(&folder);
            checkpoint.newest().await.unwrap();
            write(&checkpoint, round).await.unwrap();
            checkpoint.prune(every, keep).await.unwrap();
            assert_eq!(checkpoint.newest().await.unwrap().committed.unwrap().0.round, round);
        }
        let there = |file: &'static str| (1..=10).filter(|r| path(&folder, *r, file).exists()).collect::<Vec<u32>>();
        assert_eq!(there("model.safetensors"), kept, "every {every}, keep {keep}");
        assert_eq!((there("receipt.json").len(), there("commit.json").len()), (10, 10));
    }
}

#[tokio::test]
async fn a_failed_disk_is_told_with_its_words_and_can_be_tried_again() {
    let folder = TempDir::new().unwrap();
    let checkpoint = open(&folder);
    // A file where the folder of rounds should be: the same error for root and user.
    fs::write(folder.path().join("rounds"), "").unwrap();
    let error = write(&checkpoint, 1).await.unwrap_err();
    assert!(matches!(&error, StoreFailure::Storage(why) if why.contains("os error")), "{error:?}");
    fs::remove_file(folder.path().join("rounds")).unwrap();
    write(&checkpoint, 1).await.unwrap();
}

#[test]
fn the_folder_belongs_to_one_job_and_its_key_to_its_owner() {
    let folder = TempDir::new().unwrap();
    let mut identity = open(&folder).identity("default", "digits").unwrap();
    assert_eq!(identity.token_key.len(), 64);
    let mode = fs::metadata(folder.path().join("job.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    identity.chain = Some(7);
    open(&folder).save_identity(&identity).unwrap();
    assert_eq!(open(&folder).identity("default", "digits").unwrap(), identity);
    let error = open(&folder).identity("default", "other").unwrap_err().to_string();
    assert!(error.contains("default/digits"), "{error}");
    assert!(!format!("{identity:?}").contains(&identity.token_key), "the key is shown");
}

#[test]
fn initial_models_are_read_or_refused_by_name() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("m.safetensors");
    fs::write(&file, model(&[1.0, 2.0])).unwrap();
    assert_eq!(initial(&file).unwrap().manifest.elements(), 2);
    let mut values = vec![1.0; 5_000_000];
    values[4_999_999] = f32::NAN;
    for bytes in
        [model(&[1.0, f32::NAN]), model(&values), b"no model".to_vec(), Vec::new(), model(&[1.0, 2.0])[..60].to_vec()]
    {
        fs::write(&file, bytes).unwrap();
        let error = initial(&file).unwrap_err().to_string();
        assert!(error.contains("m.safetensors"), "{error}");
    }
    let error = initial(&folder.path().join("absent")).unwrap_err().to_string();
    assert!(error.contains("absent") && error.contains("os error 2"), "{error}");
}

#[test]
fn what_is_no_file_is_no_model_and_blocks_nobody() {
    let folder = TempDir::new().unwrap();
    let fifo = folder.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    for (path, word) in
        [(fifo.as_path(), "is a FIFO"), (folder.path(), "is a directory"), (Path::new("/dev/null"), "is a device")]
    {
        let error = initial(path).unwrap_err().to_string();
        assert!(error.contains(word) && error.contains(&path.display().to_string()), "{error}");
    }
}

#[test]
fn a_folder_has_one_coordinator_until_it_dies() {
    let folder = TempDir::new().unwrap();
    let mut first = open(&folder);
    first.lock().unwrap();
    let mut second = open(&folder);
    let error = second.lock().unwrap_err();
    assert!(matches!(error, CheckpointError::Locked { .. }), "{error}");
    let text = error.to_string();
    let pid = format!("process {}", std::process::id());
    assert!(text.contains(&folder.path().display().to_string()) && text.contains(&pid), "{text}");
    // A predecessor that is still dying is waited for.
    let (begun, dies) = std::sync::mpsc::channel::<()>();
    let dying = std::thread::spawn(move || {
        dies.recv().unwrap();
        drop(first);
    });
    begun.send(()).unwrap();
    second.lock().unwrap();
    dying.join().unwrap();
    // What the dead one wrote into the file is no lock.
    drop(second);
    fs::write(folder.path().join("lock"), "1\n").unwrap();
    open(&folder).lock().unwrap();
    assert_eq!(fs::read_to_string(folder.path().join("lock")).unwrap(), format!("{}\n", std::process::id()));
}

#[test]
fn the_kernel_frees_the_folder_of_a_killed_process() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("lock");
    // Holds the lock until its input ends, which it does only by being killed.
    let mut child = std::process::Command::new("flock")
        .args(["--no-fork", &path.display().to_string(), "sh", "-c", "echo $$ > \"$0\"; echo; exec cat"])
        .arg(&path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let text = open(&folder).lock().unwrap_err().to_string();
    assert!(text.contains(&format!("another `lifl` (process {})", child.id())), "{text}");
    child.kill().unwrap();
    open(&folder).lock().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn the_end_counts_beside_its_model_and_under_its_manifest() {
    let folder = TempDir::new().unwrap();
    let spec = |rounds, stop: &str| super::job(rounds, 2, 2, "file:///c", "file:///m", stop).spec;
    let stop = "  stop: {metric: accuracy, atLeast: 0.1}\n";
    let model = Model { round: 1, sha256: "ab".into(), length: 1, uri: String::new() };
    let finished = Finished::new(&spec(3, stop), &model, "accuracy 0.3 reached 0.1".into());
    assert_eq!(open(&folder).finished().await.unwrap(), None);
    open(&folder).write_finished(&finished).await.unwrap();
    let read = open(&folder).finished().await.unwrap().unwrap();
    assert_eq!(read, finished);
    assert!(read.holds(&spec(3, stop), &model) && read.holds(&spec(2, stop), &model));
    for (what, spec) in [
        ("more rounds", spec(4, stop)),
        ("another value", spec(3, "  stop: {metric: accuracy, atLeast: 0.2}\n")),
        ("another metric", spec(3, "  stop: {metric: loss, atLeast: 0.1}\n")),
        ("no condition", spec(3, "")),
    ] {
        assert!(!read.holds(&spec, &model), "{what}");
    }
    assert!(!read.holds(&spec(3, stop), &Model { round: 2, ..model.clone() }));
    assert!(!read.holds(&spec(3, stop), &Model { sha256: "cd".into(), ..model }));
    // A crash before it is written whole leaves none, damage as well.
    let other = TempDir::new().unwrap();
    let checkpoint = open(&other);
    checkpoint.steps_left.store(0, Ordering::Relaxed);
    checkpoint.write_finished(&finished).await.unwrap_err();
    assert_eq!(open(&other).finished().await.unwrap(), None);
    fs::write(folder.path().join("finished.json"), "{").unwrap();
    assert_eq!(open(&folder).finished().await.unwrap(), None);
}

#[test]
fn uris_name_paths_of_this_machine() {
    for (uri, path) in [
        ("file:///var/lib/lifl/digits", Some("/var/lib/lifl/digits")),
        ("file:///a%20b", Some("/a b")),
        ("digits", None),
        ("s3://bucket/x", None),
        ("file://host/x", None),
        ("file:relative", None),
    ] {
        assert_eq!(path_of(uri).ok().as_deref(), path.map(Path::new), "{uri}");
    }
}
