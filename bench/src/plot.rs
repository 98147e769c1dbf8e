//! A report as a picture: one bar per series, the series of one unit together, the rounds' range as a line on the bar.

use std::fmt::Write as _;

const WIDTH: f64 = 900.0;
/// Where bars begin; names stand before.
const LEFT: f64 = 360.0;
/// The longest bar.
const LONGEST: f64 = 420.0;
const ROW: f64 = 20.0;

/// One bar.
#[derive(Debug)]
pub(crate) struct Bar<'a> {
    pub(crate) name: &'a str,
    pub(crate) unit: &'a str,
    pub(crate) value: f64,
    /// Smallest and largest of the rounds.
    pub(crate) range: (f64, f64),
    /// It is promised.
    pub(crate) figure: bool,
}

/// The bars as SVG.
pub(crate) fn draw(title: &str, bars: &[Bar<'_>]) -> String {
    let mut units: Vec<&str> = Vec::new();
    bars.iter().filter(|bar| bar.value.is_finite()).for_each(|bar| {
        if !units.contains(&bar.unit) {
            units.push(bar.unit);
        }
    });
    let (mut body, mut y) = (String::new(), 2.0 * ROW);
    text(&mut body, 10.0, ROW, "bold", title);
    for unit in units {
        let group: Vec<_> = bars.iter().filter(|bar| bar.unit == unit && bar.value.is_finite()).collect();
        let most = group.iter().map(|bar| bar.range.1.max(bar.value)).fold(f64::MIN_POSITIVE, f64::max);
        y += ROW;
        text(&mut body, LEFT, y, "bold", unit);
        for bar in group {
            y += ROW;
            row(&mut body, bar, y, LONGEST / most);
        }
    }
    let height = y + ROW;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>{body}</svg>\n"
    )
}

fn row(body: &mut String, bar: &Bar<'_>, y: f64, scale: f64) {
    let colour = if bar.figure { "#2a6f97" } else { "#a9c6d8" };
    let (width, top, middle) = (bar.value * scale, y - 11.0, y - 4.0);
    text(body, 10.0, y, "normal", bar.name);
    let (low, high) = (LEFT + bar.range.0 * scale, LEFT + bar.range.1 * scale);
    // Writing into a string does not fail.
    let _ = write!(
        body,
        "<rect x=\"{LEFT}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"14\" fill=\"{colour}\"/>\
         <path d=\"M{low:.1} {middle:.1}H{high:.1}\" stroke=\"#333\"/>"
    );
    text(body, LEFT + (width.max(bar.range.1 * scale)) + 6.0, y, "normal", &format!("{:.3}", bar.value));
}

fn text(body: &mut String, x: f64, y: f64, weight: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = write!(body, "<text x=\"{x:.1}\" y=\"{y:.1}\" font-weight=\"{weight}\">{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_its_bar_and_names_are_text() {
        let bar = |name, unit, value| Bar { name, unit, value, range: (value, value), figure: false };
        let svg = draw("x", &[bar("a<b", "ms", 1.0), bar("c", "x", 2.0), bar("none", "ms", f64::NAN)]);
        assert_eq!(svg.matches("height=\"14\"").count(), 2);
        assert!(svg.contains("a&lt;b") && !svg.contains("none") && svg.ends_with("</svg>\n"));
    }
}
