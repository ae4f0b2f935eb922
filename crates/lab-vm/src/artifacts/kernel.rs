//! The guest's kernels: ours from Debian's source, and Debian's own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::apt::{Apt, Package, STABLE};
use super::modules::{self, LoadedModule, Modules, Stage};
use super::steps::{Steps, unxz};
use super::{ArtifactError, Cache, Kernel, Manifest, file_error, file_name, kernel_recipe, publish};

const FRAGMENT: &str = include_str!("../../data/kernel.config");
const SOURCE: &str = "linux-source-6.12";

/// Drivers of the lab's own, built as part of the kernel's tree.
const DRIVERS: [(&str, &str); 4] = [
    ("Makefile", include_str!("../../data/drivers/Makefile")),
    ("nouveau.c", include_str!("../../data/drivers/nouveau.c")),
    ("nvidia.c", include_str!("../../data/drivers/nvidia.c")),
    ("nvidia-uvm.c", include_str!("../../data/drivers/nvidia-uvm.c")),
];

/// Where the kernel's source gets a line more, after a line that it has.
struct Edit {
    file: &'static str,
    after: &'static str,
    line: &'static str,
}

const EDITS: [Edit; 2] = [
    Edit { file: "drivers/Makefile", after: "obj-$(CONFIG_VFIO)\t\t+= vfio/", line: "obj-m\t\t\t\t+= lab/" },
    // GB200, as later kernels of upstream know it.
    Edit {
        file: "drivers/vfio/pci/nvgrace-gpu/main.c",
        after: "\t{ PCI_DRIVER_OVERRIDE_DEVICE_VFIO(PCI_VENDOR_ID_NVIDIA, 0x2342) },",
        line: "\t{ PCI_DRIVER_OVERRIDE_DEVICE_VFIO(PCI_VENDOR_ID_NVIDIA, 0x2941) },",
    },
];

/// Options that only a kernel with group files has; without them VFIO speaks iommufd alone.
const GROUP_OPTIONS: [&str; 3] = ["CONFIG_VFIO_GROUP", "CONFIG_VFIO_CONTAINER", "CONFIG_VFIO_IOMMU_TYPE1"];

/// What is asked of the configuration tool.
pub(crate) fn config(kernel: Kernel) -> String {
    if kernel != Kernel::NoGroup {
        return FRAGMENT.to_owned();
    }
    let without = |line: &str| {
        let option = line.split('=').next().unwrap_or_default();
        if GROUP_OPTIONS.contains(&option) { format!("# {option} is not set\n") } else { format!("{line}\n") }
    };
    FRAGMENT.lines().map(without).collect()
}

/// Everything of ours that a kernel is made from.
pub(crate) fn ingredients(kernel: Kernel) -> Vec<String> {
    let drivers = DRIVERS.iter().flat_map(|(name, text)| [(*name).to_owned(), (*text).to_owned()]);
    let edits = EDITS.iter().flat_map(|edit| [edit.file, edit.after, edit.line].map(str::to_owned));
    std::iter::once(config(kernel)).chain(drivers).chain(edits).collect()
}

/// Puts our drivers into the kernel's source.
fn add_drivers(source: &Path) -> Result<(), ArtifactError> {
    let folder = source.join("drivers/lab");
    fs::create_dir_all(&folder).map_err(file_error("make folder", &folder))?;
    for (name, text) in DRIVERS {
        let path = folder.join(name);
        fs::write(&path, text).map_err(file_error("write", &path))?;
    }
    for edit in EDITS {
        let path = source.join(edit.file);
        let text = fs::read_to_string(&path).map_err(file_error("read", &path))?;
        let text = edited(&text, &edit).ok_or_else(|| ArtifactError::Unusable {
            what: path.display().to_string(),
            reason: format!("it has no line {:?}", edit.after),
        })?;
        fs::write(&path, text).map_err(file_error("write", &path))?;
    }
    Ok(())
}

fn edited(text: &str, edit: &Edit) -> Option<String> {
    let mut lines: Vec<&str> = text.lines().collect();
    let at = lines.iter().position(|line| *line == edit.after)?;
    lines.insert(at + 1, edit.line);
    Some(lines.join("\n") + "\n")
}

/// Lines of the fragment that the result does not honour.
fn unmet(fragment: &str, result: &str) -> Vec<String> {
    let lines: std::collections::BTreeSet<&str> = result.lines().collect();
    fragment
        .lines()
        .filter(|line| {
            if let Some(option) = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set")) {
                // Absent altogether is as good: its own conditions are not met.
                let set = format!("{option}=");
                return result.lines().any(|line| line.starts_with(&set));
            }
            line.starts_with("CONFIG_") && !lines.contains(line)
        })
        .map(str::to_owned)
        .collect()
}

/// Programs and libraries that the build runs on the host and links against, from the host's own release.
struct BuildTools {
    /// Where they were unpacked; none if the host has them installed.
    root: Option<PathBuf>,
}

impl BuildTools {
    const PACKAGES: [&'static [&'static str]; 10] = [
        &["flex"],
        &["libfl2"],
        &["bison"],
        &["m4"],
        &["libelf-dev"],
        &["libelf1t64", "libelf1"],
        &["zlib1g-dev"],
        &["openssl"],
        &["libssl-dev"],
        &["libssl3t64", "libssl3"],
    ];

    fn prepare(work: &Path, apt: &Apt, steps: &Steps) -> Result<Self, ArtifactError> {
        let Some(release) = &apt.host_release else {
            super::steps::require_build_libraries()?;
            return Ok(Self { root: None });
        };
        let debs = work.join("tool-debs");
        let packages: Vec<Package> =
            Self::PACKAGES.iter().map(|names| apt.download(names, release, &debs, steps)).collect::<Result<_, _>>()?;
        let root = work.join("tools");
        steps.unpack("Unpack build tools", packages.iter().map(|package| package.file.as_path()), &root)?;
        Ok(Self { root: Some(root) })
    }

    fn make(&self, source: &Path) -> Command {
        let mut command = Command::new("nice");
        command.arg("make").current_dir(source).env("LC_ALL", "C.UTF-8");
        command.args(["KBUILD_BUILD_USER=lab", "KBUILD_BUILD_HOST=lab"]);
        // Make's own settings of the caller are not meant for this build.
        for name in ["MAKEFLAGS", "MFLAGS", "MAKELEVEL", "CROSS_COMPILE", "ARCH", "KBUILD_OUTPUT"] {
            command.env_remove(name);
        }
        if let Some(root) = &self.root {
            let at = |inner: &str| root.join(inner).display().to_string();
            let libraries = at("usr/lib/x86_64-linux-gnu");
            let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".to_owned());
            command
                .env("PATH", format!("{}:{path}", at("usr/bin")))
                .env("LD_LIBRARY_PATH", &libraries)
                .env("BISON_PKGDATADIR", at("usr/share/bison"))
                .env("M4", at("usr/bin/m4"))
                .arg(format!("HOSTCFLAGS=-I{} -I{}", at("usr/include"), at("usr/include/x86_64-linux-gnu")))
                .arg(format!("HOSTLDFLAGS=-L{libraries}"));
        }
        command
    }
}

/// Builds ours, one after the other in the same tree, so that the second finds the first one's objects.
pub(crate) fn build(
    kernels: &[Kernel],
    cache: &Cache,
    work: &Path,
    apt: &Apt,
    steps: &Steps,
) -> Result<(), ArtifactError> {
    let tools = BuildTools::prepare(work, apt, steps)?;
    let package = apt.download(&[SOURCE], STABLE, &work.join("source-debs"), steps)?;
    let unpacked = work.join("source");
    steps.unpack("Unpack kernel source package", [package.file.as_path()], &unpacked)?;
    let archive = unpacked.join(format!("usr/src/{SOURCE}.tar.xz"));
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(&unpacked).arg("-xJf").arg(&archive);
    steps.run("Unpack kernel source", &mut tar, Duration::from_mins(5))?;
    let source = unpacked.join(SOURCE);
    add_drivers(&source)?;
    for kernel in kernels {
        build_one(*kernel, &source, &tools, &package, cache, work, steps)?;
    }
    Ok(())
}

fn build_one(
    kernel: Kernel,
    source: &Path,
    tools: &BuildTools,
    package: &Package,
    cache: &Cache,
    work: &Path,
    steps: &Steps,
) -> Result<(), ArtifactError> {
    let fragment = work.join(format!("{kernel}.config"));
    fs::write(&fragment, config(kernel)).map_err(file_error("write", &fragment))?;
    let mut configure = tools.make(source);
    configure.arg("allnoconfig").env("KCONFIG_ALLCONFIG", &fragment);
    steps.run(&format!("Configure the {kernel} kernel"), &mut configure, Duration::from_mins(3))?;
    let result = source.join(".config");
    let check = || -> Result<(), ArtifactError> {
        let text = fs::read_to_string(&result).map_err(file_error("read", &result))?;
        let unmet = unmet(&config(kernel), &text);
        if unmet.is_empty() { Ok(()) } else { Err(ArtifactError::Options(unmet)) }
    };
    check()?;
    let jobs = thread::available_parallelism().map_or(2, usize::from);
    let mut make = tools.make(source);
    make.arg(format!("-j{jobs}")).args(["bzImage", "modules"]);
    steps.run(&format!("Build the {kernel} kernel"), &mut make, Duration::from_mins(40))?;
    // The build may have brought the configuration up to date.
    check()?;

    let entry = work.join(format!("kernel-{kernel}"));
    let installed = work.join(format!("installed-{kernel}"));
    let mut install = tools.make(source);
    // Strips, signs and places them; the index is written below, without depmod.
    install.arg("modules_install").arg("INSTALL_MOD_STRIP=1").arg("DEPMOD=true");
    install.arg(format!("INSTALL_MOD_PATH={}", installed.display()));
    steps.run(&format!("Collect the {kernel} kernel's modules"), &mut install, Duration::from_mins(3))?;
    let release_file = source.join("include/config/kernel.release");
    let release = fs::read_to_string(&release_file).map_err(file_error("read", &release_file))?.trim().to_owned();
    fs::create_dir_all(&entry).map_err(file_error("make folder", &entry))?;
    let modules = entry.join("modules");
    let from = installed.join("lib/modules").join(&release);
    fs::rename(&from, &modules).map_err(file_error("move", &from))?;
    let link = modules.join("build");
    if link.is_symlink() {
        fs::remove_file(&link).map_err(file_error("remove", &link))?;
    }
    for (from, to) in [("arch/x86/boot/bzImage", "bzImage"), (".config", "config")] {
        let from = source.join(from);
        fs::copy(&from, entry.join(to)).map_err(file_error("copy", &from))?;
    }
    let found = modules::scan(&modules)?;
    let wanted: &[(Stage, &str)] = match kernel {
        Kernel::NoGroup => &[(Stage::Vfio, "vfio_pci")],
        _ => &[(Stage::Vfio, "vfio_iommu_type1"), (Stage::Vfio, "vfio_pci")],
    };
    let load = modules::load_order(kernel, &found, wanted)?;
    finish(kernel, &entry, release, package, &found, load, cache)
}

fn finish(
    kernel: Kernel,
    entry: &Path,
    release: String,
    package: &Package,
    found: &Modules,
    load: Vec<LoadedModule>,
    cache: &Cache,
) -> Result<(), ArtifactError> {
    modules::write_index(kernel, &entry.join("modules"), found)?;
    let files: Vec<String> = load
        .iter()
        .map(|module| Path::new("modules").join(&module.path).display().to_string())
        .chain(["bzImage", "config", "modules/modules.dep"].map(str::to_owned))
        .collect();
    let manifest = Manifest {
        version: release,
        packages: BTreeMap::from([(package.name.clone(), package.version.clone())]),
        files: BTreeMap::new(),
        applets: Vec::new(),
        load,
    };
    manifest.save(entry, &files.iter().map(String::as_str).collect::<Vec<_>>())?;
    let place = format!("kernel-{kernel}-{}-{}", kernel_recipe(kernel), file_name(&package.version));
    publish(entry, &cache.path().join(place))
}

/// Debian's cloud kernel: its image, and of its modules those that a guest may need.
pub(crate) fn fetch_stock(cache: &Cache, work: &Path, apt: &Apt, steps: &Steps) -> Result<(), ArtifactError> {
    const KERNEL: Kernel = Kernel::Stock;
    let depends = apt.depends("linux-image-cloud-amd64", STABLE)?;
    let name = depends
        .iter()
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| ArtifactError::NoPackage("linux-image-…-cloud-amd64".to_owned()))?;
    let package = apt.download(&[name], STABLE, &work.join("stock-debs"), steps)?;
    let root = work.join("stock-root");
    steps.unpack("Unpack Debian's kernel", [package.file.as_path()], &root)?;
    let unusable = |reason: &str| ArtifactError::Unusable { what: package.name.clone(), reason: reason.to_owned() };
    let all = ["usr/lib/modules", "lib/modules"].map(|folder| root.join(folder));
    let all = all.iter().find(|folder| folder.is_dir()).ok_or_else(|| unusable("it has no modules"))?;
    let all = fs::read_dir(all).map_err(file_error("read", all))?.flatten().next();
    let all = all.ok_or_else(|| unusable("it has no modules"))?;
    let release = all.file_name().to_string_lossy().into_owned();
    let all = all.path();

    let entry = work.join("kernel-stock");
    fs::create_dir_all(&entry).map_err(file_error("make folder", &entry))?;
    for (name, to) in [("vmlinuz", "bzImage"), ("config", "config")] {
        // Up to 6.12 in /boot, since 7.x beside the modules.
        let places = [root.join(format!("boot/{name}-{release}")), all.join(name)];
        let from = places.iter().find(|path| path.is_file()).ok_or_else(|| unusable(&format!("it has no {name}")))?;
        fs::copy(from, entry.join(to)).map_err(file_error("copy", from))?;
    }
    let packed: BTreeMap<String, PathBuf> =
        modules::files(&all)?.into_iter().filter_map(|path| Some((modules::name_of(&path)?, path))).collect();
    let wanted = [(Stage::Base, "virtio_net"), (Stage::Vfio, "vfio_iommu_type1"), (Stage::Vfio, "vfio_pci")];
    let mut open: Vec<String> =
        wanted.iter().map(|(_, name)| (*name).to_owned()).chain(["overlay".to_owned()]).collect();
    let mut found = Modules::new();
    let folder = entry.join("modules");
    while let Some(name) = open.pop() {
        if found.contains_key(&name) {
            continue;
        }
        let from = packed.get(&name).ok_or_else(|| ArtifactError::NoModule { kernel: KERNEL, module: name.clone() })?;
        let relative = from.strip_prefix(&all).unwrap_or(from).with_extension("");
        let plain = from.extension().is_some_and(|extension| extension == "ko");
        let path = if plain { relative.with_extension("ko") } else { relative };
        let to = folder.join(&path);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(file_error("make folder", parent))?;
        }
        if plain {
            fs::copy(from, &to).map_err(file_error("copy", from))?;
        } else {
            unxz(from, &to)?;
        }
        let info = modules::read_info(&to)?;
        open.extend(info.depends.iter().map(|name| name.replace('-', "_")));
        found.insert(name, modules::Module { path, info });
    }
    let load = modules::load_order(KERNEL, &found, &wanted)?;
    finish(KERNEL, &entry, release, &package, &found, load, cache)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_without_groups_asks_for_the_rest_unchanged() {
        let ours = config(Kernel::Iommufd);
        let without = config(Kernel::NoGroup);
        for option in GROUP_OPTIONS {
            assert!(ours.lines().any(|line| line.starts_with(&format!("{option}="))), "{option}");
            assert!(without.contains(&format!("# {option} is not set\n")), "{option}");
        }
        assert_eq!(ours.lines().count(), without.lines().count());
        assert_eq!(ours.lines().zip(without.lines()).filter(|(a, b)| a != b).count(), GROUP_OPTIONS.len());
    }

    #[test]
    fn a_line_of_the_source_is_followed_by_ours_or_missed() {
        let edit = Edit { file: "Makefile", after: "b", line: "new" };
        assert_eq!(edited("a\nb\nc\n", &edit).as_deref(), Some("a\nb\nnew\nc\n"));
        assert_eq!(edited("a\n bb\n", &edit), None);
    }

    #[test]
    fn options_that_did_not_take_effect_are_listed() {
        let fragment =
            "# a comment\nCONFIG_A=y\nCONFIG_B=m\nCONFIG_N=8\n# CONFIG_C is not set\n# CONFIG_D is not set\n";
        let cases: [(&str, &[&str]); 4] = [
            ("CONFIG_A=y\nCONFIG_B=m\nCONFIG_N=8\n# CONFIG_C is not set\n", &[]),
            ("CONFIG_A=y\nCONFIG_B=y\nCONFIG_N=8\n", &["CONFIG_B=m"]),
            ("CONFIG_A=y\nCONFIG_B=m\nCONFIG_N=8\nCONFIG_C=m\n", &["# CONFIG_C is not set"]),
            ("CONFIG_AA=y\n# CONFIG_A is not set\nCONFIG_B=m\n", &["CONFIG_A=y", "CONFIG_N=8"]),
        ];
        for (result, expected) in cases {
            assert_eq!(unmet(fragment, result), expected, "{result}");
        }
    }

    #[test]
    fn the_fragment_is_well_formed() {
        let mut options = std::collections::BTreeSet::new();
        for line in FRAGMENT.lines().filter(|line| !line.is_empty()) {
            let option = line.split_once('=').map(|(option, _)| option);
            let option = option.or_else(|| line.strip_prefix("# ")?.strip_suffix(" is not set"));
            if let Some(option) = option.filter(|option| option.starts_with("CONFIG_")) {
                assert!(options.insert(option), "{option} twice");
            } else {
                assert!(line.starts_with("# "), "{line}");
            }
        }
        assert!(options.contains("CONFIG_VFIO_DEVICE_CDEV"));
    }
}
