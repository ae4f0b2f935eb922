//! The images in the places of NVIDIA's: what the GPU Operator's pods run, by the facts that its releases are compared with
//! (`deploy/gpu-operator`) and our values for it, from the images' root file systems, in containers of the lab's guest.
//!
//! `hack/test-images` builds the images and runs these, with `CCNODE_IMAGES` naming the folder of their root file systems.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use e2e::contract::{self, Facts, changed, golden};
use e2e::{CHANGE, PGPU, STEP, await_that, bound_to_vfio, gpu_bdfs, lab_is_here, registers_say, the_cdi_file_is};
use lab::node::{CC_MODE, NAMESPACE, NODE};
use lab::{Boot, Node};
use lab_vm::{Add, Output};
use serde_json::Value;

const CC_READY: &str = "/run/nvidia/validations/.cc-manager-ctr-ready";

/// The operator's flags for a mount.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    ReadWrite,
    ReadOnly,
}

use Access::{ReadOnly, ReadWrite};

/// An image of the folder `CCNODE_IMAGES`, laid into the guest.
struct Image {
    /// Its root file system in the guest.
    root: String,
    host: PathBuf,
    config: Value,
}

/// An image of this version; `flavour` is empty or `-shell-free`.
fn image(agent: &str, flavour: &str) -> Result<Image> {
    let folder = std::env::var_os("CCNODE_IMAGES").context("CCNODE_IMAGES is not set: hack/test-images runs this")?;
    let name = format!("{agent}-{}{flavour}", env!("CARGO_PKG_VERSION"));
    let host = PathBuf::from(folder).join(&name);
    let text = std::fs::read_to_string(host.with_file_name(format!("{name}.json")))?;
    let mut inspected: Value = serde_json::from_str(&text)?;
    let config = inspected["OCIv1"]["config"].take();
    ensure!(config.is_object(), "{name}: no configuration");
    Ok(Image { root: format!("/images/{name}"), host, config })
}

impl Image {
    fn add(&self) -> Add {
        Add { host: self.host.clone(), guest: self.root.clone().into() }
    }

    fn words(&self, name: &str) -> Vec<String> {
        let words = self.config[name].as_array().into_iter().flatten();
        words.filter_map(|word| word.as_str().map(ToOwned::to_owned)).collect()
    }
}

/// A container of a pod.
struct Container<'a> {
    name: &'a str,
    image: &'a Image,
    /// `command` and `args` of the pod; the image's entry point where there are none.
    argv: Vec<String>,
    env: Vec<(String, String)>,
    /// Host path, place, access.
    mounts: Vec<(String, String, Access)>,
    read_only_root: bool,
}

/// The operator's facts, of v26.7 and of v26.3.
fn facts() -> Result<[Facts; 2]> {
    let later = golden(include_str!("../../deploy/gpu-operator/contract-v26.7.txt"))?;
    let older = changed(later.clone(), include_str!("../../deploy/gpu-operator/contract-v26.3.txt"))?;
    Ok([later, older])
}

/// The folders of the operator's assets, and the containers in them.
const CC_MANAGER: [&str; 2] = ["cc-manager", "container nvidia-cc-manager"];
const VFIO_MANAGER: [&str; 2] = ["vfio-manager", "container nvidia-vfio-manager"];
const DRIVER_MANAGER: [&str; 2] = ["vfio-manager", "init k8s-driver-manager"];
const PLUGIN: [&str; 2] = ["kata-device-plugin", "container nvidia-kata-sandbox-device-plugin-ctr"];

/// What facts tell of a container of the operator's.
fn told(facts: &Facts, [folder, name]: [&str; 2]) -> Result<contract::Container> {
    contract::container(facts, &format!("assets/state-{folder}/0500_daemonset.yaml"), name)
}

/// What the operator makes of a part of our values file.
fn values(part: &str) -> Result<Value> {
    let values: Value = serde_saphyr::from_str(include_str!("../../deploy/gpu-operator/values.yaml"))?;
    Ok(values[part].clone())
}

impl<'a> Container<'a> {
    /// As the operator runs it with this image, by its facts.
    fn of_operator(facts: &Facts, container: [&'a str; 2], image: &'a Image) -> Result<Self> {
        let contract::Container { command, args, env, env_of_fields, mounts, .. } = told(facts, container)?;
        let account = facts[&format!("assets/state-{}/0500_daemonset.yaml", container[0])]
            .iter()
            .find_map(|fact| fact.strip_prefix("service account: "))
            .context("no service account")?;
        let text = |value: Value| value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned);
        let mut env: Vec<(String, String)> = env.into_iter().map(|(name, value)| (name, text(value))).collect();
        for (name, field) in env_of_fields {
            let value = match field.as_str() {
                "spec.nodeName" => NODE,
                "metadata.namespace" => NAMESPACE,
                "spec.serviceAccountName" => account.trim_matches('"'),
                _ => anyhow::bail!("{name} is of field {field}"),
            };
            env.push((name, value.to_owned()));
        }
        let mounts = mounts
            .into_iter()
            .map(|(host, place, is_read_only)| (host, place, if is_read_only { ReadOnly } else { ReadWrite }));
        // Every pod has its token.
        let token = (TOKEN.to_owned(), TOKEN.to_owned(), ReadOnly);
        Ok(Self {
            name: container[1].rsplit(' ').next().unwrap_or_default(),
            image,
            argv: [command, args].concat(),
            env,
            mounts: mounts.chain([token]).collect(),
            read_only_root: false,
        })
    }

    /// The same with another value of a variable.
    fn with(mut self, name: &str, value: &str) -> Self {
        self.env.retain(|(own, _)| own != name);
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }
}

impl Container<'_> {
    fn script(&self) -> Result<String> {
        let Self { name: _, image, argv, env: _, mounts, read_only_root } = self;
        let root = &image.root;
        // What a runtime does for a privileged container: namespaces of its own, the image as root, the host's device nodes as they
        // are at this moment.
        let mut script = format!(
            "#!/bin/sh\n[ \"$1\" = inside ] || exec unshare -m -p -f \"$0\" inside\nset -e\nmount --bind {root} {root}\n\
             mkdir -p {root}/proc {root}/dev\nmount -t proc proc {root}/proc\nmount -t tmpfs tmpfs {root}/dev\n\
             (cd /dev && find . -type d ! -name . | (cd {root}/dev && xargs mkdir -p) && find . -type c | while read -r node; do \
             cp -a $node {root}/dev/$node; done)\n"
        );
        for (host, place, access) in mounts {
            writeln!(script, "mkdir -p {host} {root}{place}\nmount --rbind {host} {root}{place}")?;
            if *access == ReadOnly {
                writeln!(script, "mount -o remount,ro,bind {root}{place}")?;
            }
        }
        if *read_only_root {
            writeln!(script, "mount -o remount,ro,bind {root}")?;
        }
        for line in image.words("Env") {
            writeln!(script, "export '{line}'")?;
        }
        let entry = if argv.is_empty() { image.words("Entrypoint") } else { Vec::new() };
        ensure!(!entry.is_empty() || !argv.is_empty(), "nothing to run");
        let quoted: Vec<String> = entry.iter().chain(argv).map(|word| format!("'{word}'")).collect();
        writeln!(script, "exec chroot {root} {}", quoted.join(" "))?;
        Ok(script)
    }

    fn path(&self) -> String {
        format!("/run/lab-{}", self.name)
    }

    /// Starts it; it is then known by its path.
    fn start(&self, node: &mut Node) -> Result<String> {
        let path = self.path();
        node.guest.put_file(self.script()?.as_bytes(), &path, 0o755)?;
        // Nothing of the guest's own for a test's sake.
        let common = [("CCNODE_RETRY_MIN", "500ms"), ("CCNODE_RESYNC", "10s")];
        let own = self.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        node.start_agent(&[&path], &common.into_iter().chain(own).collect::<Vec<_>>())?;
        Ok(path)
    }

    /// Runs it to its end, as an init container.
    fn run(&self, node: &mut Node) -> Result<i32> {
        let path = self.start(node)?;
        Ok(node.agent(&path)?.process.wait(CHANGE).with_context(|| node.logs())?.code())
    }
}

/// The first process of a container, as the host sees it.
fn first_process(node: &Node, path: &str) -> Result<i32> {
    let parent = node.agent(path)?.process.pid();
    let script = format!("grep -l '^PPid:[[:space:]]*{parent}$' /proc/[0-9]*/status");
    let text = node.look(&["sh", "-c", &script])?.text();
    let pid = text.split('/').nth(2).with_context(|| format!("{path} has no process\n{}", node.logs()))?;
    Ok(pid.parse()?)
}

/// A preStop hook, or another command: runs in the container, with this of its environment.
fn hook<W: AsRef<str>>(node: &Node, path: &str, argv: &[W], env: &str) -> Result<Output> {
    let target = first_process(node, path)?.to_string();
    let mut words = vec!["env"];
    words.extend(env.split_whitespace());
    words.extend(["nsenter", "-m", "-p", "-r", "-t", &target]);
    words.extend(argv.iter().map(AsRef::as_ref));
    Ok(node.guest.run(&words, CHANGE)?)
}

/// The end of a pod: its first process is asked to end, and does so well with exit code 0 within the 30 seconds that it has.
fn ends_when_asked(node: &Node, path: &str) -> Result<()> {
    let begun = Instant::now();
    node.look(&["kill", "-TERM", &first_process(node, path)?.to_string()])?;
    let status = node.agent(path)?.process.wait(Duration::from_secs(30)).with_context(|| node.logs())?;
    ensure!(status.success(), "{path} ended with {status}\n{}", node.logs());
    eprintln!("{path} ended {:.1} s after SIGTERM", begun.elapsed().as_secs_f64());
    Ok(())
}

/// What the validator looks at, and what it then writes (operator-contract sections 3 and 9).
fn the_validator_is_content(node: &Node) -> Result<()> {
    for bdf in gpu_bdfs(node)? {
        let driver = format!("basename $(readlink /sys/bus/pci/devices/{bdf}/driver)");
        let driver = node.look(&["sh", "-c", &driver])?.text();
        ensure!(["vfio-pci", "nvgrace_gpu_vfio_pci"].contains(&driver.trim()), "{bdf} is on {driver}");
    }
    let script = format!(
        "test -f {CC_READY} && test ! -s {CC_READY} && echo vm-passthrough > /run/nvidia/validations/workload-type && \
         touch /run/nvidia/validations/vfio-pci-ready"
    );
    node.look(&["sh", "-c", &script])?;
    Ok(())
}

/// A node whose VFIO modules are not loaded: the host's modprobe does that.
fn node(topology: &str, images: &[&Image], labels: &[(&str, &str)]) -> Result<Node> {
    let mut boot = Boot { without_vfio_modules: true, ..Boot::new(topology)? };
    boot.adds.extend(images.iter().map(|image| image.add()));
    // Of three images, beside the guest's own programs.
    boot.memory_mib = Some(1024);
    Node::start(boot, labels)
}

const DEPLOY_VFIO: &str = "nvidia.com/gpu.deploy.vfio-manager";
const DEPLOY_PLUGIN: &str = "nvidia.com/gpu.deploy.kata-sandbox-device-plugin";

const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Uncompressed, with all that the operator's pods call.
const SIZES: [(&str, u64); 3] =
    [("cc-manager", 10_000_000), ("vfio-manager", 12_000_000), ("device-plugin", 10_000_000)];

/// Bytes of all files below a folder.
fn bytes_below(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.path().symlink_metadata()?;
        sum += if metadata.is_dir() { bytes_below(&entry.path())? } else { metadata.len() };
    }
    Ok(sum)
}

#[test]
#[ignore = "needs the built images: hack/test-images runs it"]
fn images_are_small_and_tell_nothing_of_the_machine_that_built_them() -> Result<()> {
    for (agent, most) in SIZES {
        for flavour in ["", "-shell-free"] {
            let image = image(agent, flavour)?;
            let (size, name) = (bytes_below(&image.host)?, format!("{agent}{flavour}"));
            ensure!(size < most, "{name} has {size} bytes, and may have {most}");
            let program = std::fs::read(image.host.join("usr/bin").join(agent))?;
            for path in ["/src/crates", "/root/", "/target/", "/usr/local/cargo"] {
                let found = program.windows(path.len()).any(|window| window == path.as_bytes());
                // What the program itself looks for on a node is below other folders.
                ensure!(!found, "{name}: {path} is in the program");
            }
            // A program that needs an interpreter says so in a segment of this kind.
            ensure!(!segments(&program)?.contains(&3), "{name} is linked dynamically");
            for link in ["ccnode", "kubectl-ccnode"] {
                assert_eq!(std::fs::read_link(image.host.join("usr/bin").join(link))?, Path::new(agent), "{name}");
            }
            assert_eq!(image.words("Entrypoint"), [format!("/usr/bin/{agent}")], "{name}");
            assert_eq!(image.config["User"], "0:0", "{name}");
            let labels = &image.config["Labels"];
            let has_busybox = agent == "vfio-manager" && flavour.is_empty();
            let licences = if has_busybox { "Apache-2.0 AND GPL-2.0-only" } else { "Apache-2.0" };
            for (label, value) in [("version", env!("CARGO_PKG_VERSION")), ("licenses", licences)] {
                assert_eq!(labels[format!("org.opencontainers.image.{label}")], value, "{name}");
            }
            for label in ["title", "description", "revision", "created"] {
                let value = labels[format!("org.opencontainers.image.{label}")].as_str().unwrap_or_default();
                ensure!(!value.is_empty() && value != "unknown", "{name}: label {label} is {value:?}");
            }
        }
    }
    Ok(())
}

/// A document of the image, unpacked.
fn document(image: &Image, name: &str) -> Result<Vec<u8>> {
    unpacked(&image.host.join("usr/share/doc/ccnode").join(name))
}

fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let output = std::process::Command::new("gzip").args(["-dc"]).arg(path).output()?;
    ensure!(output.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

#[test]
#[ignore = "needs the built images: hack/test-images runs it"]
fn images_carry_the_list_of_their_crates_and_the_licences() -> Result<()> {
    let lock = include_str!("../../Cargo.lock");
    for agent in SIZES.map(|(agent, _)| agent) {
        for flavour in ["", "-shell-free"] {
            let image = image(agent, flavour)?;
            let list = document(&image, "ccnode.cdx.json.gz")?;
            let text = String::from_utf8(list)?;
            ensure!(
                !text.contains("file:///src") && !text.contains("file:///root"),
                "{agent}: paths of the machine that built it"
            );
            let list: Value = serde_json::from_str(&text)?;
            assert_eq!(list["bomFormat"], "CycloneDX", "{agent}");
            let components = list["components"].as_array().context("no components")?;
            ensure!(components.len() > 100, "{agent}: {} crates", components.len());
            for component in components {
                let (name, version) = (&component["name"], &component["version"]);
                ensure!(lock.contains(&format!("name = {name}\nversion = {version}\n")), "{agent}: {name} {version}");
            }
            let licences = String::from_utf8(document(&image, "THIRD-PARTY-LICENSES.txt.gz")?)?;
            for words in ["Permission is hereby granted", "Apache License", "\nrustls ", "\ntokio "] {
                ensure!(licences.contains(words), "{agent}: {words:?} is not in the licences");
            }
        }
    }
    Ok(())
}

/// The operator's command lines need a shell, which is others' work, under another licence than ours.
#[test]
#[ignore = "needs the built images: hack/test-images runs it"]
fn an_image_with_busybox_carries_its_licence_and_tells_its_version() -> Result<()> {
    for (agent, _) in SIZES {
        for flavour in ["", "-shell-free"] {
            let image = image(agent, flavour)?;
            let (program, about) = (image.host.join("bin/busybox"), image.host.join("usr/share/doc/busybox"));
            assert_eq!(program.exists(), agent == "vfio-manager" && flavour.is_empty(), "{agent}{flavour}");
            assert_eq!(about.exists(), program.exists(), "{agent}{flavour}");
            if !program.exists() {
                continue;
            }
            let licence = String::from_utf8(unpacked(&about.join("LICENSE.gz"))?)?;
            ensure!(licence.contains("GNU GENERAL PUBLIC LICENSE") && licence.contains("Version 2, June 1991"));
            let list: Value = serde_json::from_slice(&unpacked(&about.join("busybox.cdx.json.gz"))?)?;
            let [component] = &list["components"].as_array().context("no components")?[..] else {
                anyhow::bail!("{list:#}")
            };
            assert_eq!(component["licenses"][0]["license"]["id"], "GPL-2.0-only", "{component:#}");
            let version = component["version"].as_str().context("no version")?;
            // Debian's, of which the base image is made here, is another one than the default's name says.
            ensure!(version.starts_with("1."), "{version}");
        }
    }
    Ok(())
}

/// The kinds of an ELF program's segments.
fn segments(program: &[u8]) -> Result<Vec<u32>> {
    let number = |at: usize, bytes: usize| -> Result<usize> {
        let slice = program.get(at..at + bytes).context("cut short")?;
        Ok(slice.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    };
    ensure!(program.starts_with(b"\x7fELF\x02\x01"), "no 64-bit program");
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    (0..count).map(|index| Ok(u32::try_from(number(table + index * size, 4)?)?)).collect()
}

/// The values file's four images: a node from its boot to a change of modes, and to the end of every pod.
#[test]
#[ignore = "needs the built images: hack/test-images runs it"]
fn the_operators_pods_run_from_the_images() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let [cc, vfio, plugin] = ["cc-manager", "vfio-manager", "device-plugin"].map(|agent| image(agent, ""));
    let (cc, vfio, plugin) = (cc?, vfio?, plugin?);
    let labels = [(CC_MODE, "on"), ("nvidia.com/gpu.present", "true"), (DEPLOY_VFIO, "true"), (DEPLOY_PLUGIN, "true")];
    let mut node = node("h100x2", &[&cc, &vfio, &plugin], &labels)?;
    node.start_kubelet()?;

    let [facts, _] = facts()?;
    let driver_manager = Container::of_operator(&facts, DRIVER_MANAGER, &vfio)?;
    assert_eq!(driver_manager.run(&mut node)?, 0, "{}", node.logs());
    let mut of_vfio = Container::of_operator(&facts, VFIO_MANAGER, &vfio)?;
    let args: Vec<String> = serde_json::from_value(values("vfioManager")?["args"].take())?;
    of_vfio.argv = [told(&facts, VFIO_MANAGER)?.command, args].concat();
    let of_vfio_path = of_vfio.start(&mut node)?;
    // What the operator adds where the values have a default mode, as its own have.
    let of_cc = Container::of_operator(&facts, CC_MANAGER, &cc)?.with("DEFAULT_CC_MODE", "on");
    let of_cc_path = of_cc.start(&mut node)?;
    node.await_state("on", "true", CHANGE).with_context(|| node.logs())?;
    registers_say(&node, "on")?;
    await_that("the readiness file", &node, || Ok(node.guest.get_file(CC_READY).is_ok()))?;
    bound_to_vfio(&node)?;
    the_validator_is_content(&node)?;

    let mut of_plugin = Container::of_operator(&facts, PLUGIN, &plugin)?;
    // The host's sysfs is a privileged container's own.
    of_plugin.mounts.push(("/sys".to_owned(), "/sys".to_owned(), ReadWrite));
    let of_plugin_path = of_plugin.start(&mut node)?;
    let count = node.gpus().len();
    node.await_allocatable(PGPU, count, CHANGE).with_context(|| node.logs())?;
    the_cdi_file_is(&node, |bdf| {
        let cdev = node.look(&["ls", &format!("/sys/bus/pci/devices/{bdf}/vfio-dev")])?.text();
        Ok(vec![format!("/dev/vfio/devices/{}", cdev.trim())])
    })?;
    node.create_pod("work", PGPU, count)?;
    node.await_pod("work", "Running", STEP).with_context(|| node.logs())?;
    node.api.delete("pods", "default", "work", Some(0))?;

    // A change pauses both; the DaemonSet controller ends their pods, and makes them anew afterwards.
    node.ask_for("off")?;
    for (label, path) in [(DEPLOY_VFIO, &of_vfio_path), (DEPLOY_PLUGIN, &of_plugin_path)] {
        let is_paused = || Ok(node.api.labels(NODE).get(label).is_some_and(|value| value != "true"));
        await_that(label, &node, is_paused)?;
        ends_when_asked(&node, path)?;
    }
    node.await_state("off", "false", CHANGE).with_context(|| node.logs())?;
    registers_say(&node, "off")?;
    for label in [DEPLOY_VFIO, DEPLOY_PLUGIN] {
        await_that(label, &node, || Ok(node.api.labels(NODE).get(label).is_some_and(|value| value == "true")))?;
    }
    assert_eq!(driver_manager.run(&mut node)?, 0, "{}", node.logs());
    of_vfio.start(&mut node)?;
    of_plugin.start(&mut node)?;
    the_validator_is_content(&node)?;
    node.await_allocatable(PGPU, count, CHANGE).with_context(|| node.logs())?;

    // Every image has the command line for people.
    for path in [&of_vfio_path, &of_cc_path, &of_plugin_path] {
        for argv in [&["/usr/bin/ccnode", "probe"][..], &["/usr/bin/kubectl-ccnode", "--version"]] {
            let output = hook(&node, path, argv, "")?;
            ensure!(output.success() && !output.stdout.is_empty(), "{path}: {argv:?}: {}", output.error_text());
        }
    }

    // Hooks, then signals, in an order of the kubelet's choice.
    for _ in 0..2 {
        let output = hook(&node, &of_cc_path, &told(&facts, CC_MANAGER)?.pre_stop, "")?;
        ensure!(output.success(), "{}", output.error_text());
        ensure!(node.guest.get_file(CC_READY).is_err(), "the readiness file is still there");
    }
    let output = hook(&node, &of_vfio_path, &told(&facts, VFIO_MANAGER)?.pre_stop, "HOST_ROOT=/host")?;
    ensure!(output.success() && output.text().contains("left as they are"), "{}{}", output.text(), output.error_text());
    for path in [&of_cc_path, &of_vfio_path, &of_plugin_path] {
        ends_when_asked(&node, path)?;
    }
    bound_to_vfio(&node)?;
    Ok(())
}

/// The three images alone, without `vfioManager.args`: the operator's own command lines, of v26.7 and of v26.3.
#[test]
#[ignore = "needs the built images: hack/test-images runs it"]
fn the_operators_own_command_lines_of_vfio_manager_do_what_they_say() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let vfio = image("vfio-manager", "")?;
    let mut node = node("h100x2", &[&vfio], &[])?;
    let [later, older] = facts()?;
    // As the operator sets it where the host's root is another folder: it does not exist in the container.
    let of_vfio = Container::of_operator(&later, VFIO_MANAGER, &vfio)?.with("HOST_ROOT", "/custom/root");
    let path = of_vfio.start(&mut node)?;
    await_that("bound", &node, || Ok(bound_to_vfio(&node).is_ok()))?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(node.agent(&path)?.is_running(), "{}", node.logs());
    // v26.3's hook is one word with blanks in it, which no image can have as a program: nothing is unbound.
    let broken = hook(&node, &path, &told(&older, VFIO_MANAGER)?.pre_stop, "HOST_ROOT=/custom/root")?;
    ensure!(!broken.success(), "{}", broken.text());
    bound_to_vfio(&node)?;
    let begun = Instant::now();
    let output = hook(&node, &path, &told(&later, VFIO_MANAGER)?.pre_stop, "HOST_ROOT=/custom/root")?;
    ensure!(output.success() && output.text().contains("Given back: 2"), "{}{}", output.text(), output.error_text());
    ensure!(begun.elapsed() < Duration::from_secs(25), "the hook took {:?}", begun.elapsed());
    Ok(())
}

/// Our own chart's flavour: nothing to run but the agent and ccnode, and a root that nobody writes to.
#[test]
#[ignore = "needs the built images: hack/test-images runs it"]
fn the_shell_free_images_run_on_a_read_only_root() -> Result<()> {
    if !lab_is_here()? {
        return Ok(());
    }
    let (cc, vfio, plugin) = (
        image("cc-manager", "-shell-free")?,
        image("vfio-manager", "-shell-free")?,
        image("device-plugin", "-shell-free")?,
    );
    for image in [&cc, &vfio, &plugin] {
        ensure!(!image.host.join("bin").exists(), "{} has a folder bin", image.root);
    }
    let mut node = node("h100x2", &[&cc, &vfio, &plugin], &[(CC_MODE, "on")])?;
    node.start_kubelet()?;
    let on_read_only_root = |name, image, argv: &[&str], env: &[(&str, &str)], mounts: &[(&str, &str, Access)]| {
        let state = ("/run/nvidia/ccnode", "/run/nvidia/ccnode", ReadWrite);
        let mounts = mounts.iter().chain([&state]);
        Container {
            name,
            image,
            argv: argv.iter().map(ToString::to_string).collect(),
            env: env.iter().map(|(name, value)| (ToString::to_string(name), ToString::to_string(value))).collect(),
            mounts: mounts.map(|(host, place, access)| (host.to_string(), place.to_string(), *access)).collect(),
            read_only_root: true,
        }
    };
    let of_vfio = on_read_only_root(
        "vfio-manager",
        &vfio,
        &["vfio-manager", "run"],
        &[("VFIO_MANAGER_LOCK", "/tmp/vfio-manager.lock"), ("HOST_ROOT", "/host")],
        &[
            ("/sys", "/sys", ReadWrite),
            ("/run/lab-tmp", "/tmp", ReadWrite),
            ("/lib/modules", "/lib/modules", ReadOnly),
            ("/", "/host", ReadOnly),
        ],
    );
    let of_cc = on_read_only_root(
        "cc-manager",
        &cc,
        &["cc-manager"],
        &[("CC_READINESS_FILE", ""), ("EVICT_OPERATOR_COMPONENTS", "false")],
        &[("/sys", "/sys", ReadWrite), (TOKEN, TOKEN, ReadOnly)],
    );
    let of_plugin = on_read_only_root(
        "device-plugin",
        &plugin,
        &["device-plugin", "--cc-gate=require"],
        &[],
        &[
            ("/sys", "/sys", ReadOnly),
            ("/var/lib/kubelet/device-plugins", "/var/lib/kubelet/device-plugins", ReadWrite),
            ("/var/run/cdi", "/var/run/cdi", ReadWrite),
        ],
    );
    let mut paths = Vec::new();
    for container in [&of_vfio, &of_cc, &of_plugin] {
        paths.push(container.start(&mut node)?);
    }
    node.await_state("on", "true", CHANGE).with_context(|| node.logs())?;
    let count = node.gpus().len();
    node.await_allocatable(PGPU, count, CHANGE).with_context(|| node.logs())?;
    for path in &paths {
        let output = hook(&node, path, &["/bin/sh", "-c", "true"], "")?;
        ensure!(!output.success(), "{path} has a shell");
        ends_when_asked(&node, path)?;
    }
    Ok(())
}
