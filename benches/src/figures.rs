//! Figures of several rounds.

use std::fmt;

use serde::Serialize;

/// Where values lie.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// A quarter of the values are not larger.
    pub lower: f64,
    /// Half of them are not.
    pub median: f64,
    /// Three quarters of them are not.
    pub upper: f64,
}

impl Spread {
    /// Of some values; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        let (first, between) = values.split_first()?;
        // Between two values, as far from each as the share asks for.
        let quantile = |share: f64| {
            let place = share * between.len() as f64;
            let (below, part) = (place as usize, place.fract());
            let next = between.get(below).copied().unwrap_or(0.0);
            let value = if below == 0 { *first } else { between[below - 1] };
            if part == 0.0 { value } else { value + part * (next - value) }
        };
        Some(Self { lower: quantile(0.25), median: quantile(0.5), upper: quantile(0.75) })
    }

    /// Of the ratios round by round, since machines drift from one round to the next.
    pub fn of_ratios(ours: &[f64], theirs: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        Self::of(&ratios)
    }
}

/// The median, and half of the distance between the quarters in percent of it.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = (self.upper - self.lower) / 2.0 / self.median * 100.0;
        f.pad(&format!("{:.2} ±{percent:.0}%", self.median))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarters_of_odd_and_even_counts() {
        let of = |values: &[f64]| Spread::of(values).map(|s| (s.lower, s.median, s.upper));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[7.0]), Some((7.0, 7.0, 7.0)));
        assert_eq!(of(&[5.0, 1.0, 3.0]), Some((2.0, 3.0, 4.0)));
        assert_eq!(of(&[4.0, 1.0, 2.0, 8.0]), Some((1.75, 3.0, 5.0)));
        assert_eq!(Spread::of(&[8.0, 10.0, 12.0]).unwrap().to_string(), "10.00 ±10%");
        let ratios = Spread::of_ratios(&[2.0, 9.0], &[1.0, 3.0]).unwrap();
        assert_eq!((ratios.lower, ratios.median, ratios.upper), (2.25, 2.5, 2.75));
    }
}
