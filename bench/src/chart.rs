//! Bars, as SVG.

use std::fmt::Write as _;

/// A bar.
pub struct Bar {
    pub name: String,
    pub value: f64,
    /// What stands beside it.
    pub text: String,
    pub color: &'static str,
}

/// Colours that can be told apart by everybody, on white and on black.
pub const OURS: &str = "#0072b2";
pub const SAFE: &str = "#999999";
pub const UNSAFE: &str = "#d9a441";

const HEIGHT: usize = 22;
const LABELS: usize = 220;
const BARS: usize = 420;
const WIDTH: usize = LABELS + BARS + 160;

/// Draws bars below each other, the longest as wide as there is room.
pub fn bars(title: &str, bars: &[Bar]) -> String {
    let longest = bars.iter().map(|bar| bar.value).fold(f64::EPSILON, f64::max);
    let height = HEIGHT * (bars.len() + 2);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\" role=\"img\">\n\
         <title>{title}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"8\" y=\"18\" font-weight=\"bold\">{title}</text>\n"
    );
    for (index, bar) in bars.iter().enumerate() {
        let top = HEIGHT * (index + 1) + 8;
        let width = (bar.value / longest * BARS as f64).max(1.0);
        let (middle, label, end) = (top + 14, LABELS - 8, LABELS as f64 + width + 6.0);
        let _ = write!(
            svg,
            "<text x=\"{label}\" y=\"{middle}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LABELS}\" y=\"{top}\" width=\"{width:.1}\" height=\"18\" fill=\"{}\"/>\n\
             <text x=\"{end:.1}\" y=\"{middle}\">{}</text>\n",
            bar.name, bar.color, bar.text
        );
    }
    svg.push_str("</svg>\n");
    svg
}
