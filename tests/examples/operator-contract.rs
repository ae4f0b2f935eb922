//! Compares a checkout of the GPU Operator with golden facts and our values file with its chart: `hack/check-operator-contract`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use e2e::contract::{
    GOLDEN, changed, differences, golden, is_supported, of_checkout, release, unknown_keys, version_of,
};

fn main() -> Result<ExitCode> {
    let mut words = std::env::args_os().skip(1).map(PathBuf::from);
    let mut next = |what: &str| words.next().with_context(|| format!("which {what}?"));
    let (facts, values, checkout) = (next("facts")?, next("values")?, next("checkout")?);
    let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()));
    let mut golden = golden(&read(&facts)?)?;
    let found = of_checkout(&checkout, &golden)?;
    let version = version_of(&checkout)?;
    is_supported(&version)?;
    if let Some(changes) = words.next().filter(|_| release(&version).is_ok_and(|release| release < GOLDEN)) {
        golden = changed(golden, &read(&changes)?)?;
    }
    let differences = differences(&golden, &found);
    let unknown = unknown_keys(&checkout, &serde_saphyr::from_str(&read(&values)?)?)?;
    if differences.is_empty() && unknown.is_empty() {
        let count: usize = golden.values().map(std::collections::BTreeSet::len).sum();
        println!(
            "GPU Operator {version}: {count} facts of {} files as expected, and its chart knows all our values",
            golden.len()
        );
        return Ok(ExitCode::SUCCESS);
    }
    println!("GPU Operator {version} differs:");
    print!("{differences}");
    for key in unknown {
        println!("{}\n  {key} is not looked at by its chart", values.display());
    }
    Ok(ExitCode::FAILURE)
}
