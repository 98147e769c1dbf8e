//! Two ways to one image: the Containerfile, and `manifests/image` where there is no container engine.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};

/// What of an image counts when it runs.
#[derive(Debug, PartialEq, Eq)]
struct Image {
    entrypoint: Vec<String>,
    user: String,
    /// Files, owner and mode of each.
    files: BTreeMap<String, (String, u32)>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace")
}

/// Reads the last stage of a Containerfile. An instruction that this does not know fails: it would make another image.
fn of_containerfile(text: &str) -> Image {
    let joined = text.replace("\\\n", " ");
    let lines = joined.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let instructions: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once(' ')).collect();
    let last = instructions.iter().rposition(|(word, _)| *word == "FROM").expect("a stage");
    assert_eq!(instructions[last].1, "scratch", "nothing but what is copied");
    let built =
        instructions[..last].iter().find_map(|(word, what)| what.contains("install ").then_some((*word, *what)));
    let (_, built) = built.expect("a step that puts the program where it is copied from");
    let mode = built.split("--mode=").nth(1).and_then(|rest| rest.split(' ').next()).expect("its mode");
    let mode = u32::from_str_radix(mode, 8).expect("octal");
    let mut image = Image { entrypoint: Vec::new(), user: String::new(), files: BTreeMap::new() };
    for (word, what) in &instructions[last + 1..] {
        match *word {
            "COPY" => {
                let words: Vec<&str> = what.split_whitespace().collect();
                let [from, source, to] = words[..] else { panic!("COPY {what}") };
                assert!(from == "--from=build" && built.ends_with(source), "{what} of {built}");
                image.files.insert(to.trim_start_matches('/').to_owned(), ("0/0".to_owned(), mode));
            }
            "USER" => (*what).clone_into(&mut image.user),
            "ENTRYPOINT" => image.entrypoint = serde_json::from_str(what).expect("a list"),
            other => panic!("{other} {what}"),
        }
    }
    image
}

/// Runs `manifests/image`, unpacks what it prints, and checks each digest on the way.
fn of_command(reference: &str, from: &Path) -> (Image, Vec<u8>) {
    let made = Command::new(root().join("manifests/image")).arg(reference).arg(from).output().expect("manifests/image");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let folder = tempfile::tempdir().expect("a folder");
    tar(&["--extract", "--directory", &folder.path().to_string_lossy()], &made.stdout);
    let read = |path: &str| fs::read(folder.path().join(path)).expect("a file of the archive");
    let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).expect("JSON");
    let blob = |of: &Value| {
        let digest = of["digest"].as_str().and_then(|digest| digest.strip_prefix("sha256:")).expect("a digest");
        let bytes = read(&format!("blobs/sha256/{digest}"));
        assert_eq!(of["size"], json!(bytes.len()));
        assert_eq!(digest_of(&bytes), digest);
        bytes
    };
    assert_eq!(json(&read("oci-layout")), json!({"imageLayoutVersion": "1.0.0"}));
    let index = json(&read("index.json"));
    let named = &index["manifests"][0];
    assert_eq!(named["annotations"]["io.containerd.image.name"], reference);
    let manifest = json(&blob(named));
    let config = json(&blob(&manifest["config"]));
    let layer = blob(&manifest["layers"][0]);
    assert_eq!(config["rootfs"]["diff_ids"], json!([format!("sha256:{}", digest_of(&layer))]));
    assert!(["amd64", "arm64"].contains(&config["architecture"].as_str().expect("a machine")));
    let list = |value: &Value| serde_json::from_value(value.clone()).expect("a list of words");
    let image = Image {
        entrypoint: list(&config["config"]["Entrypoint"]),
        user: config["config"]["User"].as_str().expect("a user").to_owned(),
        files: files_of(&layer),
    };
    (image, made.stdout)
}

fn digest_of(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn tar(arguments: &[&str], archive: &[u8]) -> String {
    let mut tar = Command::new("tar");
    let mut tar = tar.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("tar");
    let mut to = tar.stdin.take().expect("its input");
    let out = std::thread::scope(|scope| {
        scope.spawn(move || to.write_all(archive).expect("it reads"));
        tar.wait_with_output().expect("it ends")
    });
    assert!(out.status.success());
    String::from_utf8(out.stdout).expect("text")
}

fn files_of(layer: &[u8]) -> BTreeMap<String, (String, u32)> {
    let listed = tar(&["--list", "--verbose", "--numeric-owner"], layer);
    let file = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (mode, owner, name) = (words[0], words[1], words[5]);
        // drwxr-xr-x
        let bits = mode[1..].chars().fold(0, |bits, flag| bits << 1 | u32::from(flag != '-'));
        mode.starts_with('-').then(|| (name.trim_start_matches("./").to_owned(), (owner.to_owned(), bits)))
    };
    listed.lines().filter_map(file).collect()
}

#[test]
fn the_containerfile_and_the_command_make_the_same_image() {
    let folder = tempfile::tempdir().unwrap();
    // No library goes with it, as with a static program.
    let program = folder.path().join("program");
    fs::write(&program, "of one piece\n").unwrap();
    let (made, archive) = of_command("dev.local/lifl:1", &program);
    assert_eq!(made, of_containerfile(&fs::read_to_string(root().join("Containerfile")).unwrap()));
    assert_eq!(made.entrypoint, ["/lifl"]);
    // By number, or kubelet cannot tell that it is not root.
    assert_eq!(made.user, "65532:65532");
    assert_eq!(made.files.keys().collect::<Vec<_>>(), ["lifl"]);
    assert_eq!(of_command("dev.local/lifl:1", &program).1, archive, "the same files, another image");
}

#[test]
fn a_program_brings_its_libraries() {
    let (made, _) = of_command("dev.local/a-test:2", Path::new(env!("CARGO_BIN_EXE_lifl")));
    assert_eq!(made.entrypoint, ["/a-test"]);
    let libraries: BTreeSet<&str> = made.files.keys().filter_map(|file| file.rsplit('/').next()).collect();
    assert!(libraries.contains("a-test"), "{libraries:?}");
    let linked = Command::new("ldd").arg(env!("CARGO_BIN_EXE_lifl")).output().unwrap();
    let linked = String::from_utf8_lossy(&linked.stdout).into_owned();
    for path in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        assert!(made.files.contains_key(path.trim_start_matches('/')), "{path} is not in {:?}", made.files);
    }
}

#[test]
fn without_a_program_the_command_says_how_it_is_used() {
    for arguments in [&[][..], &["dev.local/lifl:1"], &["dev.local/lifl:1", "/nowhere"]] {
        let refused = Command::new(root().join("manifests/image")).args(arguments).output().unwrap();
        assert_eq!(refused.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("image REFERENCE FROM"), "{arguments:?}");
        assert!(refused.stdout.is_empty());
    }
}
