//! Accuracy by round, as an SVG: written by hand, since a chart of one line needs no library.

use super::table::percent;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 28.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 60.0;

/// The picture; `measured` may be in any order.
pub(super) fn svg(measured: &[(u32, f64)], goal: f64) -> String {
    let mut points = measured.to_vec();
    points.sort_by_key(|point| point.0);
    let last = points.last().map_or(1, |point| point.0.max(1));
    let x = |round: u32| LEFT + f64::from(round) / f64::from(last) * (WIDTH - LEFT - RIGHT);
    let y = |share: f64| TOP + (1.0 - share) * (HEIGHT - TOP - BOTTOM);
    let mut body = String::new();
    grid(&mut body, last, x, y);
    goal_line(&mut body, goal, y);
    curve(&mut body, &points, x, y);
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="Accuracy by round" font-family="system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif" font-size="13" fill="#57606a">
<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>
<text x="{LEFT}" y="34" font-size="17" font-weight="600" fill="#1f2328">Accuracy on images that no client has</text>
{body}</svg>
"##
    )
}

fn grid(body: &mut String, last: u32, x: impl Fn(u32) -> f64, y: impl Fn(f64) -> f64) {
    let right = WIDTH - RIGHT;
    let floor = y(0.0);
    for percent in (0..=100).step_by(20) {
        let at = y(f64::from(percent) / 100.0);
        let colour = if percent == 0 { "#8c959f" } else { "#e6e8eb" };
        line(body, &format!(r#"<line x1="{LEFT}" y1="{at:.1}" x2="{right}" y2="{at:.1}" stroke="{colour}"/>"#));
        let (label_x, label_y) = (LEFT - 10.0, at + 4.5);
        line(body, &format!(r#"<text x="{label_x}" y="{label_y:.1}" text-anchor="end">{percent}%</text>"#));
    }
    for round in (0..=last).step_by(step(last)) {
        let (at, end, label_y) = (x(round), floor + 5.0, floor + 22.0);
        line(body, &format!(r##"<line x1="{at:.1}" y1="{floor:.1}" x2="{at:.1}" y2="{end:.1}" stroke="#8c959f"/>"##));
        line(body, &format!(r#"<text x="{at:.1}" y="{label_y:.1}" text-anchor="middle">{round}</text>"#));
    }
    let (middle, bottom) = ((LEFT + right) / 2.0, HEIGHT - 14.0);
    line(body, &format!(r#"<text x="{middle}" y="{bottom}" text-anchor="middle">round</text>"#));
}

fn goal_line(body: &mut String, goal: f64, y: impl Fn(f64) -> f64) {
    let (at, right) = (y(goal), WIDTH - RIGHT);
    line(
        body,
        &format!(
            r##"<line class="goal" x1="{LEFT}" y1="{at:.1}" x2="{right}" y2="{at:.1}" stroke="#1a7f37" stroke-width="1.5" stroke-dasharray="6 4"/>"##
        ),
    );
    let (label_x, label_y, percent) = (LEFT + 8.0, at + 17.0, goal * 100.0);
    line(body, &format!(r##"<text x="{label_x}" y="{label_y:.1}" fill="#1a7f37">goal {percent:.0}%</text>"##));
}

fn curve(body: &mut String, points: &[(u32, f64)], x: impl Fn(u32) -> f64, y: impl Fn(f64) -> f64) {
    let places: Vec<(f64, f64)> = points.iter().map(|&(round, share)| (x(round), y(share))).collect();
    let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    line(
        body,
        &format!(
            r##"<polyline points="{}" fill="none" stroke="#0969da" stroke-width="2.5" stroke-linejoin="round" stroke-linecap="round"/>"##,
            path.join(" ")
        ),
    );
    for ((x, y), (round, share)) in places.iter().zip(points) {
        let percent = percent(*share);
        line(
            body,
            &format!(
                r##"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="#ffffff" stroke="#0969da" stroke-width="2"><title>round {round}: {percent}</title></circle>"##
            ),
        );
    }
    if let (Some((x, y)), Some((_, share))) = (places.last(), points.last()) {
        // Below the point: above it runs the goal.
        let (label_y, percent) = (y + 24.0, percent(*share));
        line(
            body,
            &format!(
                r##"<text x="{x:.1}" y="{label_y:.1}" text-anchor="end" font-weight="600" fill="#0969da">{percent}</text>"##
            ),
        );
    }
}

/// Rounds between two labels: 1, 2, 5, 10 ..., so that at most a dozen stand side by side.
fn step(last: u32) -> usize {
    let steps = [1, 2, 5, 10, 20, 50, 100, 200, 500];
    steps.into_iter().find(|step| last as usize / step <= 12).unwrap_or(1000)
}

fn line(body: &mut String, text: &str) {
    body.push_str(text);
    body.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::ui::{Path, table::tests::example};

    #[test]
    fn every_measurement_has_its_place() {
        let text = example(Path::Ebpf).to_svg();
        assert_eq!(text.matches("<circle").count(), 9);
        let points = text.split("points=\"").nth(1).and_then(|rest| rest.split('"').next());
        let points: Vec<(f64, f64)> = points
            .expect("a curve")
            .split(' ')
            .map(|point| point.split_once(',').expect("x,y"))
            .map(|(x, y)| (x.parse().expect("x"), y.parse().expect("y")))
            .collect();
        assert_eq!(points.len(), 9);
        assert!(points.is_sorted_by(|a, b| a.0 < b.0));
        assert!((points[0].0 - LEFT).abs() < 0.1 && (points[8].0 - (WIDTH - RIGHT)).abs() < 0.1);
        for (x, y) in &points {
            assert!((LEFT..=WIDTH - RIGHT).contains(x) && (TOP..=HEIGHT - BOTTOM).contains(y));
        }
        let goal = text.split("class=\"goal\"").nth(1).expect("a goal");
        let goal: f64 = goal.split("y1=\"").nth(1).and_then(|y| y.split('"').next()).expect("y1").parse().expect("y1");
        assert!(points[8].1 < goal && goal < points[7].1, "95.28% stands above the goal, 93.06% below");
        assert!(text.contains("goal 95%") && text.contains("round 8: 95.2%"));
    }

    #[test]
    fn it_is_well_formed_even_when_empty() {
        for measured in [vec![], vec![(0, 0.1)], vec![(40, 0.9), (3, 0.5)]] {
            let text = svg(&measured, 0.95);
            assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n") && !text.contains("NaN"));
            let (mut open, mut closed) = (0, 0);
            for tag in text.split('<').skip(1) {
                let whole = tag.split('>').next().expect("an end");
                match (whole.starts_with('/'), whole.ends_with('/')) {
                    (true, _) => closed += 1,
                    (false, false) => open += 1,
                    (false, true) => {}
                }
            }
            assert_eq!(open, closed);
        }
    }

    #[test]
    fn labels_never_crowd() {
        for last in 1..400 {
            assert!(last as usize / step(last) <= 12);
        }
        assert_eq!((step(8), step(13), step(40)), (1, 2, 5));
    }
}
