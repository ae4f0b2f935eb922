//! Kernel modules: which there are, what they need, and the index files that `modprobe` reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ArtifactError, Kernel, file_error};
use crate::elf::{ModuleInfo, module_info};

/// Why init loads a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The guest itself needs it: its network card.
    Base,
    /// VFIO; left out with `lab.modules=none` on the kernel's command line.
    Vfio,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Base => "base",
            Self::Vfio => "vfio",
        })
    }
}

/// A module that init loads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadedModule {
    /// When.
    pub stage: Stage,
    /// Path within `/lib/modules/RELEASE`.
    pub path: PathBuf,
}

#[derive(Clone, Debug)]
pub(crate) struct Module {
    /// Relative to the modules folder.
    pub(crate) path: PathBuf,
    pub(crate) info: ModuleInfo,
}

/// Modules by name, with underscores as the kernel shows them.
pub(crate) type Modules = BTreeMap<String, Module>;

/// The name of a module's file, without its endings; the kernel takes `-` and `_` for the same.
pub(crate) fn name_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(".ko").or_else(|| name.strip_suffix(".ko.xz"))?;
    Some(stem.replace('-', "_"))
}

/// Files below a folder.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>, ArtifactError> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).map_err(file_error("read", &folder))? {
            let entry = entry.map_err(file_error("read", &folder))?;
            let kind = entry.file_type().map_err(file_error("read", &folder))?;
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Reads the uncompressed modules of a folder.
pub(crate) fn scan(folder: &Path) -> Result<Modules, ArtifactError> {
    let mut modules = Modules::new();
    for file in files(folder)? {
        let Some(name) = name_of(&file) else { continue };
        let info = read_info(&file)?;
        let path = file.strip_prefix(folder).unwrap_or(&file).to_owned();
        modules.insert(name, Module { path, info });
    }
    Ok(modules)
}

pub(crate) fn read_info(file: &Path) -> Result<ModuleInfo, ArtifactError> {
    let bytes = fs::read(file).map_err(file_error("read", file))?;
    module_info(&bytes).ok_or_else(|| ArtifactError::Unusable {
        what: file.display().to_string(),
        reason: "not a kernel module".to_owned(),
    })
}

/// A module's needs before itself, deepest first, without what `seen` has.
pub(crate) fn load_order(
    kernel: Kernel,
    modules: &Modules,
    wanted: &[(Stage, &str)],
) -> Result<Vec<LoadedModule>, ArtifactError> {
    let mut seen = BTreeSet::new();
    let mut order = Vec::new();
    for (stage, name) in wanted {
        for module in with_needs(kernel, modules, name, &mut seen)? {
            order.push(LoadedModule { stage: *stage, path: module.path.clone() });
        }
    }
    Ok(order)
}

fn with_needs<'a>(
    kernel: Kernel,
    modules: &'a Modules,
    name: &str,
    seen: &mut BTreeSet<String>,
) -> Result<Vec<&'a Module>, ArtifactError> {
    let name = name.replace('-', "_");
    if !seen.insert(name.clone()) {
        return Ok(Vec::new());
    }
    let module = modules.get(&name).ok_or(ArtifactError::NoModule { kernel, module: name })?;
    let mut order = Vec::new();
    for need in &module.info.depends {
        order.extend(with_needs(kernel, modules, need, seen)?);
    }
    order.push(module);
    Ok(order)
}

/// Writes `modules.dep` and `modules.alias`, as depmod would.
pub(crate) fn write_index(kernel: Kernel, folder: &Path, modules: &Modules) -> Result<(), ArtifactError> {
    let mut dep = String::new();
    let mut alias = String::new();
    for (name, module) in modules {
        let mut needs = with_needs(kernel, modules, name, &mut BTreeSet::new())?;
        needs.pop();
        dep.push_str(&module.path.to_string_lossy());
        dep.push(':');
        // The module to be loaded first comes last.
        for need in needs.iter().rev() {
            dep.push(' ');
            dep.push_str(&need.path.to_string_lossy());
        }
        dep.push('\n');
        for pattern in &module.info.aliases {
            // Writing to a string does not fail.
            let _ = writeln!(alias, "alias {pattern} {name}");
        }
    }
    for (file, text) in [("modules.dep", dep), ("modules.alias", alias)] {
        let path = folder.join(file);
        fs::write(&path, text).map_err(file_error("write", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("kernel/vfio")).unwrap();
        for (name, modinfo) in modules {
            let bytes = crate::elf::tests::module(modinfo.as_bytes());
            fs::write(folder.path().join("kernel/vfio").join(name), bytes).unwrap();
        }
        folder
    }

    #[test]
    fn needs_come_first_and_once() {
        let folder = folder(&[
            ("vfio-pci.ko", "depends=vfio-pci-core,vfio\0alias=vfio_pci:v*d*\0"),
            ("vfio-pci-core.ko", "depends=irqbypass,vfio\0"),
            ("vfio.ko", "depends=iommufd\0"),
            ("iommufd.ko", "depends=\0"),
            ("irqbypass.ko", "depends=\0"),
            ("vfio_iommu_type1.ko", "depends=vfio\0"),
        ]);
        let modules = scan(folder.path()).unwrap();
        let wanted = [(Stage::Base, "irqbypass"), (Stage::Vfio, "vfio_iommu_type1"), (Stage::Vfio, "vfio-pci")];
        let order = load_order(Kernel::Iommufd, &modules, &wanted).unwrap();
        let lines: Vec<String> =
            order.iter().map(|module| format!("{} {}", module.stage, module.path.display())).collect();
        assert_eq!(
            lines,
            [
                "base kernel/vfio/irqbypass.ko",
                "vfio kernel/vfio/iommufd.ko",
                "vfio kernel/vfio/vfio.ko",
                "vfio kernel/vfio/vfio_iommu_type1.ko",
                "vfio kernel/vfio/vfio-pci-core.ko",
                "vfio kernel/vfio/vfio-pci.ko",
            ]
        );
        write_index(Kernel::Iommufd, folder.path(), &modules).unwrap();
        let dep = fs::read_to_string(folder.path().join("modules.dep")).unwrap();
        assert!(dep.contains("kernel/vfio/vfio_iommu_type1.ko: kernel/vfio/vfio.ko kernel/vfio/iommufd.ko\n"), "{dep}");
        assert!(dep.contains("kernel/vfio/iommufd.ko:\n"), "{dep}");
        let alias = fs::read_to_string(folder.path().join("modules.alias")).unwrap();
        assert_eq!(alias, "alias vfio_pci:v*d* vfio_pci\n");
    }

    #[test]
    fn an_absent_need_and_a_circle_do_not_hang() {
        let folder = folder(&[("a.ko", "depends=b\0"), ("b.ko", "depends=a\0"), ("c.ko", "depends=gone\0")]);
        let modules = scan(folder.path()).unwrap();
        assert_eq!(load_order(Kernel::Stock, &modules, &[(Stage::Vfio, "a")]).unwrap().len(), 2);
        let error = load_order(Kernel::Stock, &modules, &[(Stage::Vfio, "c")]).unwrap_err();
        assert_eq!(error.to_string(), "The stock kernel has no module gone");
    }

    #[test]
    fn a_file_that_is_no_module_is_named() {
        let folder = folder(&[]);
        fs::write(folder.path().join("kernel/bad.ko"), "text").unwrap();
        assert!(scan(folder.path()).unwrap_err().to_string().contains("bad.ko"));
    }

    #[test]
    fn names_are_those_the_kernel_shows() {
        for (path, name) in
            [("a/vfio-pci.ko", Some("vfio_pci")), ("virtio_net.ko.xz", Some("virtio_net")), ("modules.dep", None)]
        {
            assert_eq!(name_of(Path::new(path)).as_deref(), name);
        }
    }
}
