//! Agent: GPUs, and what shares their IOMMU groups, bound to VFIO and kept bound.
//!
//! [`binding`] decides, without touching anything, what is to be done with each function; [`executor`] does it through
//! sysfs; `controller` is the loop around the two, and [`commands`] are what people and pods call.

#![forbid(unsafe_code)]

pub mod args;
pub mod binding;
pub mod commands;
mod controller;
mod driver;
pub mod driver_manager;
pub mod executor;
mod holders;
mod manager;
mod metrics;
pub mod modalias;
#[cfg(feature = "node-labels")]
mod pauses;
pub mod selection;
#[cfg(test)]
mod testing;
mod validations;

#[cfg(test)]
mod tests {
    #[test]
    fn every_code_has_a_row_in_the_documentation() {
        let sources = [
            include_str!("binding.rs"),
            include_str!("controller.rs"),
            include_str!("driver_manager.rs"),
            include_str!("executor.rs"),
            include_str!("modalias.rs"),
        ];
        let code_of = |line: &'static str| {
            let (_, rest) = line.split_once("} => \"").or_else(|| line.split_once("code = \""))?;
            rest.split('"').next()
        };
        // The variants of `Action` are written in the same form, in small letters.
        let is_code = |code: &&str| code.starts_with(|letter: char| letter.is_ascii_uppercase());
        let codes: std::collections::BTreeSet<&str> = sources
            .iter()
            .flat_map(|source| source.split("#[cfg(test)]\nmod tests").next().unwrap_or_default().lines())
            .filter_map(code_of)
            .filter(is_code)
            .collect();
        assert!(codes.len() > 18, "{codes:?}");
        for code in ["BindRefused", "SelectionRefused", "HostDriver", "NoModulesAlias", "StatusFiles"] {
            assert!(codes.contains(code), "{code}");
        }
        let page = include_str!("../../../docs/troubleshooting.md");
        let page = page.split("## Codes of vfio-manager").nth(1).unwrap().split("\n## ").next().unwrap();
        let rows: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect();
        for code in &codes {
            assert_eq!(rows.iter().filter(|row| row == &code).count(), 1, "{code} in docs/troubleshooting.md");
        }
        let left: Vec<&&str> = rows.iter().filter(|row| !codes.contains(*row)).collect();
        assert!(left.is_empty(), "docs/troubleshooting.md explains codes that nothing has: {left:?}");
    }
}
