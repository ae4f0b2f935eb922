//! The workspace's own programs, built and ready to be put into a guest.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

/// The programs that a node of the lab has, and the further names that they answer to.
pub const PROGRAMS: [(&str, &[&str]); 5] = [
    ("ccnode", &[]),
    ("cc-manager", &["k8s-cc-manager"]),
    ("vfio-manager", &["vfio-manage", "driver-manager"]),
    ("device-plugin", &["nvidia-sandbox-device-plugin", "nvidia-kubevirt-gpu-device-plugin"]),
    ("lab-kubelet", &[]),
];

/// Variables that `cargo run` and test runners set for one package.
const OF_THIS_PACKAGE: [&str; 5] = ["CARGO_BIN_", "CARGO_CRATE_", "CARGO_MANIFEST_", "CARGO_PKG_", "CARGO_PRIMARY_"];

/// Builds the programs unless they are up to date, and says where they are.
///
/// They are built with the profile and target of the running program, by the very command that the scripts use, so that
/// nothing is built twice. `CCNODE_LAB_PROGRAMS` names a folder with other builds of them, a release's for instance.
pub fn built() -> anyhow::Result<PathBuf> {
    if let Some(folder) = env::var_os("CCNODE_LAB_PROGRAMS") {
        return complete(PathBuf::from(folder));
    }
    let folder = target_folder()?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--workspace", "--bins", "--manifest-path"]).arg(&manifest);
    if folder.ends_with("release") {
        command.arg("--release");
    }
    // What cargo told this process of its own package is not for other packages: build scripts that look at such
    // variables would run again, and all that depends on them be built again.
    for (name, _) in env::vars_os() {
        if OF_THIS_PACKAGE.iter().any(|start| name.to_string_lossy().starts_with(start)) {
            command.env_remove(name);
        }
    }
    command.env("CARGO_TARGET_DIR", cargo_target_dir(&folder)?);
    let status = command.status().context("Cargo cannot be started to build the agents")?;
    if !status.success() {
        bail!("The agents could not be built (cargo ended with {status})");
    }
    complete(folder)
}

fn complete(folder: PathBuf) -> anyhow::Result<PathBuf> {
    match PROGRAMS.iter().find(|(name, _)| !folder.join(name).is_file()) {
        Some((name, _)) => bail!("{} has no program {name}", folder.display()),
        None => Ok(folder),
    }
}

/// The folder that this program was built into; tests are one level deeper.
fn target_folder() -> anyhow::Result<PathBuf> {
    let own = env::current_exe().context("The path of this program cannot be read")?;
    let folder = own.parent().context("This program has no folder")?;
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    Ok(folder.to_owned())
}

/// `<target>/<triple>/<profile>` is three below `<target>`'s parent; without a triple in the path, two.
fn cargo_target_dir(folder: &Path) -> anyhow::Result<PathBuf> {
    let above = folder.parent().context("The build folder has no parent")?;
    let has_triple = above.file_name().is_some_and(|name| name.to_string_lossy().matches('-').count() >= 2);
    let target = if has_triple { above.parent().unwrap_or(above) } else { above };
    Ok(target.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_folder_is_found_with_and_without_a_triple() {
        for (folder, target) in [
            ("/p/target/x86_64-unknown-linux-gnu/debug", "/p/target"),
            ("/p/target/debug", "/p/target"),
            ("/p/my-build/release", "/p/my-build"),
        ] {
            assert_eq!(cargo_target_dir(Path::new(folder)).unwrap(), Path::new(target));
        }
    }

    #[test]
    fn a_folder_without_the_programs_is_refused() {
        let empty = tempfile::tempdir().unwrap();
        let error = complete(empty.path().to_owned()).unwrap_err();
        assert!(error.to_string().contains("ccnode"), "{error}");
    }
}
