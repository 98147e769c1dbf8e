//! The shape of the house: arrows go strictly downwards, modules make no circles, drawers have no place.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

/// Floor of each package; a package may depend on lower floors only, dev and build dependencies included.
const FLOORS: &[(&str, u32)] = &[
    ("lifl-api", 0),
    ("lifl-ebpf-common", 0),
    ("lifl-shm", 1),
    ("lifl-fold", 1),
    ("lifl-events", 1),
    ("lifl-daemon", 1),
    ("lifl-cluster", 1),
    ("lifl-proxy", 1),
    ("lifl-ebpf", 1),
    ("lifl-gateway", 2),
    ("lifl-agent", 2),
    ("lifl-aggregator", 2),
    ("lifl-autoscaler", 2),
    ("lifl-coordinator", 2),
    ("lifl-webhook", 2),
    ("lifl", 3),
    ("lifl-bench", 4),
];

/// Pairs of modules that reach each other, by crate: what is left to untie. It may shrink, never grow.
const KNOTS: &[(&str, usize)] =
    &[("lifl-shm", 2), ("lifl-fold", 9), ("lifl-ebpf", 2), ("lifl-gateway", 5), ("lifl-coordinator", 1)];

/// Rooms in which `unsafe` may stand.
const UNSAFE_ROOMS: &[&str] = &["lib/shm", "lib/fold", "ebpf"];

/// File names that say nothing about what is inside.
const DRAWERS: &[&str] = &["utils.rs", "util.rs", "helpers.rs", "common.rs", "misc.rs", "manager.rs", "types.rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the workspace")
}

fn metadata() -> Value {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let out = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo metadata");
    serde_json::from_slice(&out.stdout).expect("metadata is JSON")
}

fn rust_files(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|end| end == "rs") {
            out.push(path);
        }
    }
}

#[test]
fn arrows_go_strictly_downwards() {
    let floors: BTreeMap<&str, u32> = FLOORS.iter().copied().collect();
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    assert_eq!(packages.len(), FLOORS.len(), "a package without a floor, or a floor without a package");
    let mut faults = Vec::new();
    for package in packages {
        let name = package["name"].as_str().expect("name");
        let floor = floors.get(name).unwrap_or_else(|| panic!("{name} has no floor"));
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let on = dependency["name"].as_str().expect("name");
            if let Some(other) = floors.get(on)
                && other >= floor
            {
                faults.push(format!("{name} (floor {floor}) -> {on} (floor {other}), kind {}", dependency["kind"]));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn modules_of_a_crate_make_no_new_circles() {
    let known: BTreeMap<&str, usize> = KNOTS.iter().copied().collect();
    let mut faults = Vec::new();
    for package in metadata()["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("name");
        let manifest = Path::new(package["manifest_path"].as_str().expect("path"));
        let arrows = module_arrows(&manifest.parent().expect("folder").join("src"));
        let ahead = |from: &String, to: &String| from < to && reaches(&arrows, to, from);
        let pairs = arrows.iter().flat_map(|(from, tos)| tos.iter().map(move |to| (from, to)));
        let circles: Vec<String> =
            pairs.filter(|(from, to)| ahead(from, to)).map(|(from, to)| format!("{from} <-> {to}")).collect();
        if circles.len() != known.get(name).copied().unwrap_or(0) {
            faults.push(format!("{name}: {}", circles.join(", ")));
        }
    }
    assert!(faults.is_empty(), "circles differ from KNOTS:\n{}", faults.join("\n"));
}

/// Top-level modules of a crate, and which other top-level modules each names by `crate::`.
fn module_arrows(src: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut files = Vec::new();
    rust_files(src, &mut files);
    let mut arrows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let module_of = |file: &Path| {
        let first = file.strip_prefix(src).ok()?.components().next()?;
        let name = first.as_os_str().to_str()?;
        Some(name.strip_suffix(".rs").unwrap_or(name).to_owned())
    };
    let modules: BTreeSet<String> = files.iter().filter_map(|file| module_of(file)).collect();
    for file in &files {
        let Some(module) = module_of(file).filter(|m| m != "lib" && m != "main") else { continue };
        let text = fs::read_to_string(file).expect("source");
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
        for named in names_in(code, &modules) {
            if named != module {
                arrows.entry(module.clone()).or_default().insert(named);
            }
        }
    }
    arrows
}

/// Modules named in `crate::x` and in `use crate::{x, y::..}`.
fn names_in(code: &str, modules: &BTreeSet<String>) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 1;
            let mut item = String::new();
            for c in list.chars() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 0 || (depth == 1 && c == ',') {
                    out.insert(word(item.trim()));
                    item.clear();
                } else {
                    item.push(c);
                }
                if depth == 0 {
                    break;
                }
            }
        } else {
            out.insert(word(rest));
        }
    }
    out.retain(|name| modules.contains(name));
    out
}

fn reaches(arrows: &BTreeMap<String, BTreeSet<String>>, from: &str, to: &str) -> bool {
    let (mut seen, mut open) = (BTreeSet::new(), vec![from.to_owned()]);
    while let Some(at) = open.pop() {
        if at == to {
            return true;
        }
        if seen.insert(at.clone()) {
            open.extend(arrows.get(&at).into_iter().flatten().cloned());
        }
    }
    false
}

#[test]
fn unsafe_stands_only_in_its_rooms_and_drawers_nowhere() {
    let root = root();
    let mut files = Vec::new();
    rust_files(&root, &mut files);
    let mut faults = Vec::new();
    for file in files {
        let path = file.strip_prefix(&root).expect("inside").to_string_lossy().into_owned();
        let name = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if DRAWERS.contains(&name) {
            faults.push(format!("{path}: a drawer, not a room"));
        }
        let text = fs::read_to_string(&file).expect("source");
        let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
        let has_unsafe = code
            .clone()
            .any(|line| line.contains("unsafe {") || line.contains("unsafe impl") || line.contains("unsafe fn"));
        if has_unsafe && !path.starts_with("tests/floors") && !UNSAFE_ROOMS.iter().any(|room| path.starts_with(room)) {
            faults.push(format!("{path}: unsafe outside its rooms"));
        }
        if code.clone().any(|line| line.contains("#[allow(") || line.contains("#![allow("))
            && !path.starts_with("tests/floors")
        {
            faults.push(format!("{path}: a lint silenced with allow; use expect with a reason"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
