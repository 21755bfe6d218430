//! Figures of several rounds.

use std::fmt;

use serde::Serialize;

/// Smallest, median, largest.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Half of the values are not larger.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of some values; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let median =
            if values.len() % 2 == 1 { values[half] } else { f64::midpoint(values[half - 1], values[half]) };
        Some(Self { min, median, max })
    }

    /// Of the ratios round by round, since machines drift from one round to the next.
    pub fn of_ratios(ours: &[f64], theirs: &[f64]) -> Option<Self> {
        let ratios: Vec<f64> = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect();
        Self::of(&ratios)
    }
}

/// The median, and half of the distance between smallest and largest in percent of it.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = (self.max - self.min) / 2.0 / self.median * 100.0;
        f.pad(&format!("{:.2} ±{percent:.0}%", self.median))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        let of = |values: &[f64]| Spread::of(values).map(|s| (s.min, s.median, s.max));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[3.0, 1.0, 2.0]), Some((1.0, 2.0, 3.0)));
        assert_eq!(of(&[4.0, 1.0, 2.0, 8.0]), Some((1.0, 3.0, 8.0)));
        assert_eq!(Spread::of(&[9.0, 10.0, 12.0]).unwrap().to_string(), "10.00 ±15%");
        let ratios = Spread::of_ratios(&[2.0, 9.0], &[1.0, 3.0]).unwrap();
        assert_eq!((ratios.min, ratios.median, ratios.max), (2.0, 2.5, 3.0));
    }
}
