//! Reads one os-vif envelope per line, writes it as understood: `{"ok": …}` or `{"exception": …, "message": …}`.
//! What `testdata/crosscheck.py` compares with os-vif itself.

use std::io::{self, BufRead, Write};

use serde_json::json;

fn main() -> io::Result<()> {
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let envelope = serde_json::from_str(&line?)?;
        let answer = match vif::decode(&envelope) {
            Ok(object) => json!({ "ok": vif::encode(&object) }),
            Err(error) => json!({ "exception": error.cause.exception(), "message": error.to_string() }),
        };
        writeln!(out, "{answer}")?;
    }
    Ok(())
}
