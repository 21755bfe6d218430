//! Bar charts as SVG.

use std::fmt::Write;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 60.0;
const BOTTOM: f64 = 40.0;
const COLOURS: [&str; 6] = ["#1b6ca8", "#d1495b", "#8d99ae", "#edae49", "#66a182", "#6a4c93"];

/// Groups of bars over a common scale.
pub struct BarChart {
    /// What it shows.
    pub title: String,
    /// What the scale measures.
    pub unit: String,
    /// What the bars of a group are, in order.
    pub series: Vec<String>,
    /// Name and values of each group; a value may be missing.
    pub groups: Vec<(String, Vec<Option<f64>>)>,
}

impl BarChart {
    /// The chart as a document.
    pub fn to_svg(&self) -> String {
        let step = self.step();
        let top = (self.largest() / step).ceil().max(1.0) * step;
        let y = |value: f64| HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        text(&mut svg, (LEFT, 20.0), "start", &format!("{} ({})", self.title, self.unit));
        self.legend(&mut svg);
        let mut value = 0.0;
        while value <= top {
            let (x, y) = (WIDTH - 10.0, y(value));
            line(&mut svg, format_args!("<path d=\"M{LEFT} {y:.1}H{x}\" stroke=\"#ddd\"/>"));
            text(&mut svg, (LEFT - 6.0, y + 4.0), "end", &format!("{value}"));
            value += step;
        }
        let group_width = (WIDTH - LEFT - 10.0) / self.groups.len().max(1) as f64;
        let bar_width = group_width * 0.85 / self.series.len().max(1) as f64;
        for (g, (name, values)) in self.groups.iter().enumerate() {
            let left = LEFT + group_width * (g as f64 + 0.075);
            text(&mut svg, (left + group_width * 0.425, HEIGHT - BOTTOM + 18.0), "middle", name);
            for (s, value) in values.iter().enumerate() {
                let Some(value) = value else { continue };
                let (x, y) = (left + bar_width * s as f64, y(*value));
                let (height, colour) = (HEIGHT - BOTTOM - y, COLOURS[s % COLOURS.len()]);
                let width = bar_width * 0.95;
                line(
                    &mut svg,
                    format_args!(
                        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
                    ),
                );
                text(&mut svg, (x + width / 2.0, y - 3.0), "middle", &format!("{value:.1}"));
            }
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn largest(&self) -> f64 {
        self.groups.iter().flat_map(|(_, values)| values).flatten().copied().fold(0.0, f64::max)
    }

    /// Distance of the scale's lines: 1, 2 or 5 times a power of ten, for up to ten lines.
    fn step(&self) -> f64 {
        let least = (self.largest() / 10.0).max(f64::MIN_POSITIVE);
        let power = 10f64.powf(least.log10().floor());
        [1.0, 2.0, 5.0].map(|n| n * power).into_iter().find(|step| *step >= least).unwrap_or(10.0 * power)
    }

    fn legend(&self, svg: &mut String) {
        for (s, name) in self.series.iter().enumerate() {
            let x = LEFT + 130.0 * s as f64;
            let colour = COLOURS[s % COLOURS.len()];
            line(
                svg,
                format_args!("<rect x=\"{x}\" y=\"32\" width=\"12\" height=\"12\" fill=\"{colour}\"/>"),
            );
            text(svg, (x + 18.0, 42.0), "start", name);
        }
    }
}

fn line(svg: &mut String, element: std::fmt::Arguments<'_>) {
    writeln!(svg, "{element}").expect("a string takes everything");
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    line(svg, format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_for_every_value_within_the_frame() {
        let chart = BarChart {
            title: "a < b & c".into(),
            unit: "Mframes/s".into(),
            series: vec!["x".into(), "y".into()],
            groups: vec![("64".into(), vec![Some(31.0), None]), ("1500".into(), vec![Some(9.5), Some(62.0)])],
        };
        assert_eq!(chart.step(), 10.0);
        let svg = chart.to_svg();
        assert!(svg.contains("a &lt; b &amp; c (Mframes/s)"));
        // Background, two of the legend, three values.
        assert_eq!(svg.matches("<rect").count(), 6);
        // The scale ends at 70: the largest bar has 62/70 of 300.
        assert!(svg.contains("height=\"265.7\""), "{svg}");
    }

    #[test]
    fn a_chart_of_nothing_is_a_document() {
        let chart = BarChart { title: String::new(), unit: String::new(), series: vec![], groups: vec![] };
        assert!(chart.to_svg().ends_with("</svg>\n"));
    }
}
