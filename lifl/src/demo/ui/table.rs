//! The lines of the demo, as text: pure, so that tests read what a person reads.

use indicatif::{HumanBytes, HumanCount};

use super::{Intro, Path, RoundLine, Summary};

/// Cells of the bar that a wide line ends in.
const BAR: usize = 20;

/// What is about to be seen.
pub(super) fn intro(intro: &Intro) -> String {
    let Intro { clients, per_round, training_images, held_out_images, goal } = intro;
    format!(
        "\
{clients} clients learn to read handwritten digits; no image leaves its client.
They share {training} images, unevenly; {held_out_images} that none of them has judge each model.
A round takes the first {per_round} updates; the job ends at an accuracy of {goal}.

",
        training = HumanCount(*training_images),
        goal = percent(*goal),
    )
}

/// Heads the lines of [`line`].
pub(super) fn header() -> String {
    "round  accuracy  updates  seconds  leaf/middle/top      memory  descriptors\n".to_owned()
}

/// One committed round.
pub(super) fn line(line: &RoundLine, wide: bool) -> String {
    let RoundLine { round, updates, seconds, leaves, middles, tops, descriptors, path, .. } = line;
    let accuracy = line.accuracy.map_or("-".to_owned(), percent);
    let tree = format!("{leaves}/{middles}/{tops}");
    let memory = HumanBytes(line.shm_bytes).to_string();
    let descriptors = format!("{descriptors} by {path}");
    let text = format!("{round:5}  {accuracy:>8}  {updates:7}  {seconds:7.2}  {tree:>15}  {memory:>10}  ");
    match line.accuracy.filter(|_| wide) {
        Some(accuracy) => format!("{text}{descriptors:18}  {}\n", bar(accuracy)),
        None => format!("{text}{descriptors}\n"),
    }
}

/// The closing table, and a sentence on what was not to be seen.
pub(super) fn closing(summary: &Summary, program: &str) -> String {
    let accuracy = summary.accuracy().map_or("not measured".to_owned(), percent);
    let rounds = summary.rounds.len();
    let updates = if summary.updates_accepted == summary.updates_committed {
        format!("{} acknowledged, all of them in a model, each once", HumanCount(summary.updates_accepted))
    } else {
        format!(
            "{} acknowledged, but {} in a model",
            HumanCount(summary.updates_accepted),
            HumanCount(summary.updates_committed)
        )
    };
    let way = match summary.path {
        Path::Ebpf => "redirected in the kernel by eBPF",
        Path::Userspace => "over the router in userspace",
    };
    let mut rows = vec![
        ("accuracy", format!("{accuracy} (goal {})", percent(summary.goal))),
        ("rounds", format!("{rounds} in {:.1} s, {:.1} s of CPU", summary.seconds, summary.cpu_seconds)),
        ("updates", updates),
        ("shared memory", format!("at most {}", HumanBytes(summary.shm_peak_bytes))),
        ("descriptors", format!("{} of 64 bytes, {way}", HumanCount(summary.descriptors))),
    ];
    if let Some(failure) = &summary.failure {
        rows.insert(0, ("failed", failure.clone()));
    }
    let mut text = "\n".to_owned();
    for (name, value) in rows {
        text += &format!("{name:>13}  {value}\n");
    }
    if summary.path == Path::Userspace {
        text +=
            &format!("\nTo see descriptors redirected in the kernel by eBPF, run it as root: sudo {program} demo\n");
    }
    text
}

/// Cut, not rounded: 94.96 % must not look like the goal of 95 %.
pub(super) fn percent(share: f64) -> String {
    format!("{:.1}%", (share * 1000.0 + 1e-9).floor() / 10.0)
}

fn bar(share: f64) -> String {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and BAR")]
    let full = (share.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    "█".repeat(full) + &"░".repeat(BAR - full)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn example(path: Path) -> Summary {
        let measured = [0.1, 0.8083, 0.8778, 0.8778, 0.9278, 0.9139, 0.9306, 0.9306, 0.9528];
        let measured: Vec<(u32, f64)> = (0..).zip(measured).collect();
        let line = |&(round, accuracy): &(u32, f64)| RoundLine {
            round,
            accuracy: Some(accuracy),
            updates: 20,
            seconds: 0.4321,
            leaves: 4,
            middles: 1,
            tops: 1,
            shm_bytes: 1_234_567,
            descriptors: 97,
            path,
        };
        Summary {
            goal: 0.95,
            rounds: measured[1..].iter().map(line).collect(),
            measured,
            seconds: 4.25,
            cpu_seconds: 1.5,
            path,
            descriptors: 1097,
            updates_accepted: 160,
            updates_committed: 160,
            shm_peak_bytes: 2_345_678,
            failure: None,
        }
    }

    #[test]
    fn a_line_stands_under_its_header() {
        let summary = example(Path::Userspace);
        let text = header() + &line(&summary.rounds[0], false);
        assert_eq!(
            text,
            "\
round  accuracy  updates  seconds  leaf/middle/top      memory  descriptors
    1     80.8%       20     0.43            4/1/1    1.18 MiB  97 by userspace
"
        );
        assert!(text.lines().all(|line| line.chars().count() <= 80));
        let unmeasured = RoundLine { accuracy: None, ..summary.rounds[0].clone() };
        assert!(line(&unmeasured, true).starts_with("    1         -       20 "));
    }

    #[test]
    fn a_wide_line_ends_in_a_bar() {
        let text = line(&example(Path::Ebpf).rounds[7], true);
        assert!(text.ends_with("97 by eBPF          ███████████████████░\n"), "{text}");
        assert_eq!(text.trim_end().chars().count(), usize::from(super::super::WIDE));
        assert_eq!((bar(-1.0).len(), bar(2.0)), (BAR * 3, "█".repeat(BAR)));
    }

    #[test]
    fn the_closing_table_says_what_was_kept() {
        let text = closing(&example(Path::Ebpf), "lifl");
        assert_eq!(
            text,
            "
     accuracy  95.2% (goal 95.0%)
       rounds  8 in 4.2 s, 1.5 s of CPU
      updates  160 acknowledged, all of them in a model, each once
shared memory  at most 2.24 MiB
  descriptors  1,097 of 64 bytes, redirected in the kernel by eBPF
"
        );
        assert!(text.lines().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn without_root_it_says_how_to_see_more() {
        let text = closing(&example(Path::Userspace), "target/release/lifl");
        assert!(text.ends_with("run it as root: sudo target/release/lifl demo\n"), "{text}");
        assert!(!closing(&example(Path::Ebpf), "lifl").contains("sudo"));
    }

    #[test]
    fn what_was_lost_and_why_it_failed_is_said() {
        let mut summary = example(Path::Ebpf);
        assert!(summary.succeeded());
        summary.updates_committed = 159;
        assert!(!summary.succeeded());
        summary.failure = Some("too few clients".to_owned());
        let text = closing(&summary, "lifl");
        assert!(text.contains("\n       failed  too few clients\n"), "{text}");
        assert!(text.contains("160 acknowledged, but 159 in a model"), "{text}");
    }

    #[test]
    fn percentages_never_flatter() {
        assert_eq!(percent(0.9499), "94.9%");
        assert_eq!(percent(0.95), "95.0%");
        assert_eq!(percent(342.0 / 360.0), "95.0%");
        assert_eq!(percent(1.0), "100.0%");
    }

    #[test]
    fn the_intro_fits_a_terminal() {
        let text =
            intro(&Intro { clients: 100, per_round: 20, training_images: 1437, held_out_images: 360, goal: 0.95 });
        assert!(text.contains("1,437 images"));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
}
