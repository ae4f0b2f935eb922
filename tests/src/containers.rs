//! Containers of rendered manifests on a node of the lab, started as a kubelet and a container runtime start them: by an OCI
//! runtime (crun), with the manifest's command, environment, mounts and security context.
//!
//! Device cgroup, capabilities, seccomp profile, read-only root, masked paths, namespaces and memory limits are what CRI runtimes
//! make of a manifest. What the guest's kernel lacks is left out: SELinux, AppArmor, a CPU controller; and a pod has no network
//! but its loopback, or the node's where it asks the API server.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use lab::node::NODE;
use lab::{Boot, Node};
use lab_vm::Add;
use serde_json::{Value, json};

use crate::STEP;
use crate::rendered::Container;

/// Names beside the agent's own in its image, as `hack/build-program` makes them for every flavour.
const NAMES: [(&str, &[&str]); 3] = [
    ("cc-manager", &["usr/bin/ccnode", "usr/bin/kubectl-ccnode", "usr/bin/k8s-cc-manager"]),
    ("vfio-manager", &["usr/bin/ccnode", "usr/bin/vfio-manage", "usr/bin/driver-manager", "usr/sbin/chroot"]),
    ("device-plugin", &["usr/bin/ccnode", "usr/bin/nvidia-sandbox-device-plugin"]),
];

/// Where a pod finds its service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The runtimes' profile for `RuntimeDefault`, in the form that Docker gave it: of Debian's golang-github-containers-common
/// 0.50.1 (Apache-2.0), which CRI-O and podman use; containerd's is made by the same rules.
const SECCOMP: &str = include_str!("../data/seccomp.json");

/// What a container has that drops nothing.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Puts the runtime and the images' programs into a guest.
pub fn install(boot: &mut Boot) -> Result<()> {
    let path = env::var_os("PATH").unwrap_or_default();
    let crun = env::split_paths(&path).map(|folder| folder.join("crun")).find(|file| file.is_file());
    let crun = crun.context("crun is not installed; run: apt-get install crun")?;
    let output = Command::new("ldd").arg(&crun).output().context("ldd cannot be run")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    boot.adds.extend(libraries.map(|host| Add { guest: host.clone(), host }));
    boot.adds.push(Add { host: crun, guest: "/usr/bin/crun".into() });
    let folder = lab::programs::built()?;
    for (agent, _) in NAMES {
        let guest = root(agent).join("usr/bin").join(agent);
        boot.programs.push(Add { host: folder.join(format!("image-{agent}")), guest });
    }
    Ok(())
}

fn root(image: &str) -> PathBuf {
    Path::new("/images").join(image)
}

/// The image's name without registry and tag.
fn image_of(container: &Container) -> Result<&str> {
    let image = container.manifest["image"].as_str().context("a container without image")?;
    let name = image.rsplit('/').next().unwrap_or(image);
    Ok(name.split([':', '@']).next().unwrap_or(name))
}

/// Who a pod is for the API server.
#[derive(Clone, Debug)]
pub struct Account {
    /// Folder in the guest with its token.
    folder: String,
}

impl Account {
    /// The service account of a rendering, with the rights that this gives it.
    pub fn of(node: &Node, rendering: &crate::rendered::Rendering, name: &str) -> Result<Self> {
        let namespace = rendering.object("ServiceAccount", name)?["metadata"]["namespace"].clone();
        let namespace = namespace.as_str().context("a service account without namespace")?;
        let user = format!("system:serviceaccount:{namespace}:{name}");
        let token = node.api.add_identity(&user, &["system:serviceaccounts"], rendering.rules(name)?);
        let files = node.api.service_account_files(&token, namespace);
        let folder = format!("/run/accounts/{name}");
        for (file, content) in [("ca.crt", files.ca_crt), ("token", files.token), ("namespace", files.namespace)] {
            // The kubelet gives the token to the pod's user.
            node.guest.put_file(content.as_bytes(), &format!("{folder}/{file}"), 0o644)?;
        }
        Ok(Self { folder })
    }
}

/// A manifest's environment, with what the kubelet adds for a pod that has a service account.
fn environment(node: &Node, container: &Container) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::from([(
        "PATH".to_owned(),
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
    )]);
    found.insert("HOSTNAME".to_owned(), "pod".to_owned());
    found.insert("KUBERNETES_SERVICE_HOST".to_owned(), "10.0.2.2".to_owned());
    found.insert("KUBERNETES_SERVICE_PORT".to_owned(), node.api.address().port().to_string());
    for item in container.manifest["env"].as_array().into_iter().flatten() {
        let name = item["name"].as_str().context("a variable without name")?;
        let value = match (item["value"].as_str(), item["valueFrom"]["fieldRef"]["fieldPath"].as_str()) {
            (Some(value), None) => value,
            (None, Some("spec.nodeName")) => NODE,
            // A variable without value is an empty one.
            (None, None) if item["valueFrom"].is_null() => "",
            _ => bail!("{item} is no variable that is known here"),
        };
        found.insert(name.to_owned(), value.to_owned());
    }
    Ok(found)
}

/// `$(NAME)` in commands becomes the variable's value.
fn expanded(word: &str, environment: &BTreeMap<String, String>) -> String {
    environment.iter().fold(word.to_owned(), |word, (name, value)| word.replace(&format!("$({name})"), value))
}

fn words(value: &Value) -> impl Iterator<Item = &str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str)
}

/// Capabilities of a container, with their prefix.
fn capabilities(context: &Value) -> BTreeSet<String> {
    let all = || caps::all().into_iter().map(|capability| capability.to_string());
    if context["privileged"] == true {
        return all().collect();
    }
    let long = |name: &str| format!("CAP_{name}");
    let mut held: BTreeSet<String> = DEFAULT_CAPABILITIES.into_iter().map(long).collect();
    for name in words(&context["capabilities"]["drop"]) {
        held.retain(|held| name != "ALL" && *held != long(name));
    }
    held.extend(words(&context["capabilities"]["add"]).map(long));
    held
}

/// The runtimes' seccomp profile for a container with these capabilities.
fn seccomp(capabilities: &BTreeSet<String>) -> Result<Value> {
    let profile: Value = serde_json::from_str(SECCOMP)?;
    let mut calls = Vec::new();
    for rule in profile["syscalls"].as_array().context("a profile without system calls")? {
        let has = |list: &Value| words(list).any(|name| capabilities.contains(name));
        let (includes, excludes) = (&rule["includes"], &rule["excludes"]);
        let is_other_machine = !includes["arches"].is_null() && !words(&includes["arches"]).any(|name| name == "amd64");
        let lacks = words(&includes["caps"]).next().is_some() && !has(&includes["caps"]);
        if is_other_machine || lacks || has(&excludes["caps"]) {
            continue;
        }
        let mut call = json!({"names": rule["names"], "action": rule["action"]});
        if !rule["errnoRet"].is_null() {
            call["errnoRet"] = rule["errnoRet"].clone();
        }
        if rule["args"].as_array().is_some_and(|args| !args.is_empty()) {
            call["args"] = rule["args"].clone();
        }
        calls.push(call);
    }
    Ok(json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": calls,
    }))
}

/// What a container with this security context is held to: its capabilities, and the filter of its system calls.
pub fn confinement(context: &Value) -> Result<(BTreeSet<String>, Value)> {
    let held = capabilities(context);
    let filter = seccomp(&held)?;
    Ok((held, filter))
}

/// Bytes of a quantity such as 64Mi.
fn bytes(quantity: &str) -> Result<u64> {
    let (number, unit) = quantity.split_at(quantity.find(|c: char| !c.is_ascii_digit()).unwrap_or(quantity.len()));
    let factor = match unit {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => bail!("{quantity} is no quantity that is known here"),
    };
    Ok(number.parse::<u64>()? * factor)
}

/// The mounts of a container, the runtime's own and the pod's; folders of the host that are to be made are made.
fn mounts(node: &Node, container: &Container, account: Option<&Account>, is_privileged: bool) -> Result<Vec<Value>> {
    let access = if is_privileged { "rw" } else { "ro" };
    let mut found = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}),
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", access]}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", access]}),
    ];
    let bind = |source: &str, place: &str, propagation: &str, is_read_only: bool| {
        let access = if is_read_only { "ro" } else { "rw" };
        json!({"destination": place, "type": "bind", "source": source, "options": ["rbind", propagation, access]})
    };
    for mount in container.manifest["volumeMounts"].as_array().into_iter().flatten() {
        let mut volumes = container.pod["volumes"].as_array().into_iter().flatten();
        let volume = volumes.find(|volume| volume["name"] == mount["name"]).context("a mount without volume")?;
        let place = mount["mountPath"].as_str().context("a mount without place")?;
        let propagation = match mount["mountPropagation"].as_str() {
            None | Some("None") => "rprivate",
            Some("HostToContainer") => "rslave",
            Some("Bidirectional") => "rshared",
            Some(other) => bail!("{other} is no propagation"),
        };
        let host = match volume["hostPath"]["path"].as_str() {
            Some(host) => {
                match volume["hostPath"]["type"].as_str() {
                    Some("DirectoryOrCreate") => node.look(&["mkdir", "-p", host])?,
                    Some("Directory") => node.look(&["test", "-d", host])?,
                    other => bail!("{other:?} is no kind of folder that is known here"),
                };
                host.to_owned()
            }
            None if volume["emptyDir"].is_object() => {
                let host = format!(
                    "/run/volumes/{}-{}",
                    container.manifest["name"].as_str().unwrap_or_default(),
                    mount["name"].as_str().unwrap_or_default()
                );
                node.look(&["sh", "-c", &format!("mkdir -p {host} && chmod 777 {host}")])?;
                host
            }
            None => bail!("{volume} is no volume that is known here"),
        };
        found.retain(|own| own["destination"] != place);
        found.push(bind(&host, place, propagation, mount["readOnly"] == true));
    }
    if container.pod["automountServiceAccountToken"] == true {
        let account = account.context("a pod with a token, and nobody says whose")?;
        found.push(bind(&account.folder, SERVICE_ACCOUNT, "rprivate", true));
    }
    // What is above comes first.
    found.sort_by_key(|mount| mount["destination"].as_str().map_or(0, |place| place.matches('/').count()));
    Ok(found)
}

/// The node's devices, all of which a privileged container has.
fn devices(node: &Node) -> Result<Vec<Value>> {
    let script = r"cd /dev && find . \( -type c -o -type b \) ! -path './pts/*' -exec stat -c '%n %F %t %T %a' {} +";
    let text = node.guest.shell(script, STEP)?.text();
    let device = |line: &str| {
        let is_block = line.contains(" block special file ");
        let line = line.replace(" block special file ", " ").replace(" character special file ", " ");
        let parts: Vec<&str> = line.split(' ').collect();
        let [name, major, minor, mode] = parts[..] else { bail!("{line} is no device") };
        Ok(json!({
            "path": Path::new("/dev").join(name.trim_start_matches("./")),
            "type": if is_block { "b" } else { "c" },
            "major": i64::from_str_radix(major, 16)?,
            "minor": i64::from_str_radix(minor, 16)?,
            "fileMode": u32::from_str_radix(mode, 8)?,
            "uid": 0,
            "gid": 0,
        }))
    };
    let devices: Vec<Value> = text.lines().map(device).collect::<Result<_>>()?;
    ensure!(devices.iter().any(|device| device["path"] == "/dev/null"), "no devices: {text}");
    // These the runtime makes itself.
    let own =
        ["/dev/console", "/dev/ptmx", "/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero"];
    Ok(devices.into_iter().filter(|device| !device["path"].as_str().is_some_and(|path| own.contains(&path))).collect())
}

/// What a runtime is told to make of a container.
pub fn config(node: &Node, container: &Container, account: Option<&Account>) -> Result<Value> {
    let Container { argv, env: _, manifest, pod } = container;
    let context = &manifest["securityContext"];
    let is_privileged = context["privileged"] == true;
    let of_either = |name: &str| if context[name].is_null() { &pod["securityContext"][name] } else { &context[name] };
    let user = of_either("runAsUser").as_u64().unwrap_or(0);
    ensure!(of_either("runAsNonRoot") != true || user != 0, "root, who is not to be");
    let held = capabilities(context);
    // Who is not root has them within reach only.
    let effective = if user == 0 { held.clone() } else { BTreeSet::new() };
    let environment = environment(node, container)?;
    let lines: Vec<String> = environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let argv: Vec<String> = argv.iter().map(|word| expanded(word, &environment)).collect();
    let has_token = pod["automountServiceAccountToken"] == true;
    let mut namespaces = vec!["mount", "ipc", "uts", "cgroup"];
    namespaces.extend((pod["hostPID"] != true).then_some("pid"));
    namespaces.extend((!has_token).then_some("network"));
    let namespaces: Vec<Value> = namespaces.into_iter().map(|kind| json!({"type": kind})).collect();
    let mut linux = json!({
        "namespaces": namespaces,
        "cgroupsPath": format!("/pods/{}", manifest["name"].as_str().context("a container without name")?),
        "resources": {"devices": [{"allow": is_privileged, "access": "rwm"}]},
    });
    if let Some(limit) = manifest["resources"]["limits"]["memory"].as_str() {
        linux["resources"]["memory"] = json!({"limit": bytes(limit)?});
    }
    if is_privileged {
        linux["devices"] = devices(node)?.into();
    } else {
        linux["maskedPaths"] = json!(MASKED);
        linux["readonlyPaths"] = json!(READ_ONLY);
        match of_either("seccompProfile")["type"].as_str() {
            Some("RuntimeDefault") => linux["seccomp"] = seccomp(&held)?,
            other => bail!("seccomp profile {other:?}"),
        }
    }
    Ok(json!({
        "ociVersion": "1.0.2",
        "hostname": "pod",
        "process": {
            "terminal": false,
            "user": {"uid": user, "gid": user},
            "args": argv,
            "env": lines,
            "cwd": "/",
            "capabilities": {"bounding": held, "effective": effective, "permitted": effective},
            "noNewPrivileges": context["allowPrivilegeEscalation"] == false,
        },
        "root": {"path": "root", "readonly": context["readOnlyRootFilesystem"] == true},
        "mounts": mounts(node, container, account, is_privileged)?,
        "linux": linux,
    }))
}

/// A container on a node, under a name of its own.
#[derive(Clone, Debug)]
pub struct Running {
    /// Its name in the runtime.
    name: String,
}

impl Running {
    /// The name by which [`Node::agent`] knows it.
    pub fn path(&self) -> String {
        format!("/run/pods/{}/start", self.name)
    }

    /// Starts a container of this image with this configuration.
    pub fn start(node: &mut Node, name: &str, container: &Container, config: &Value) -> Result<Self> {
        let running = Self { name: name.to_owned() };
        let image = image_of(container)?;
        let (_, names) =
            NAMES.iter().find(|(agent, _)| *agent == image).with_context(|| format!("no image {image}"))?;
        let (bundle, rootfs) = (format!("/run/pods/{name}"), format!("/run/pods/{name}/root"));
        // A layer of its own over the image, as a runtime makes it.
        let mut script = format!(
            "set -e; mkdir -p {bundle}/root {bundle}/layer; mount -t tmpfs tmpfs {bundle}/layer; mkdir {bundle}/layer/upper {bundle}/layer/work; \
             mount -t overlay overlay -o lowerdir={},upperdir={bundle}/layer/upper,workdir={bundle}/layer/work {rootfs}; \
             mkdir -p {rootfs}/run {rootfs}/tmp {rootfs}/usr/sbin; chmod 1777 {rootfs}/tmp",
            root(image).display()
        );
        let links = names.iter().map(|link| format!("; ln -sfn /usr/bin/{image} {rootfs}/{link}"));
        script.extend(links);
        let output = node.guest.shell(&script, STEP)?;
        ensure!(output.success(), "{}{}", output.text(), output.error_text());
        node.guest.put_file(config.to_string().as_bytes(), &format!("{bundle}/config.json"), 0o600)?;
        // The guest's root is the first one there is, which no other can take the place of.
        let start = format!("#!/bin/sh\nexec crun --cgroup-manager=cgroupfs run --no-pivot --bundle {bundle} {name}\n");
        node.guest.put_file(start.as_bytes(), &running.path(), 0o755)?;
        node.start_agent(&[&running.path()], &[])?;
        Ok(running)
    }

    /// Its first process, in the guest's own numbers.
    pub fn pid(&self, node: &Node) -> Result<u64> {
        let state = node.look_json(&["crun", "state", &self.name])?;
        state["pid"].as_u64().with_context(|| format!("{} has no process: {state}\n{}", self.name, node.logs()))
    }

    /// A line of `/proc/PID/status`.
    pub fn status(&self, node: &Node, field: &str) -> Result<String> {
        let text = String::from_utf8(node.guest.get_file(&format!("/proc/{}/status", self.pid(node)?))?)?;
        let found = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        Ok(found.with_context(|| format!("no {field} in {text}"))?.trim().to_owned())
    }

    /// Asks as the kubelet does for a probe of the manifest; an error says what was answered.
    pub fn probe(&self, node: &Node, container: &Container, probe: &str) -> Result<()> {
        let get = &container.manifest[probe]["httpGet"];
        let mut ports = container.manifest["ports"].as_array().into_iter().flatten();
        let port = ports.find(|port| port["name"] == get["port"]).context("a probe of a port without name")?;
        let path = get["path"].as_str().with_context(|| format!("there is no {probe}"))?;
        let address = format!("http://127.0.0.1:{}{path}", port["containerPort"]);
        let pid = self.pid(node)?.to_string();
        let output = node.guest.run(&["nsenter", "-t", &pid, "-n", "wget", "-q", "-O", "-", &address], STEP)?;
        ensure!(output.success(), "{} of {}: {}{}", path, self.name, output.text(), output.error_text());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_the_runtimes_less_what_is_dropped_and_what_is_added() {
        let of = |context: Value| capabilities(&context);
        assert_eq!(of(json!({})).len(), 14);
        assert!(of(json!({"privileged": true})).contains("CAP_SYS_ADMIN"));
        assert!(!of(json!({"capabilities": {"drop": ["KILL"]}})).contains("CAP_KILL"));
        let added = of(json!({"capabilities": {"drop": ["ALL"], "add": ["SYS_CHROOT"]}}));
        assert_eq!(added.into_iter().collect::<Vec<_>>(), ["CAP_SYS_CHROOT"]);
    }

    #[test]
    fn the_profile_allows_a_call_to_those_who_have_its_capability() {
        let allowed = |name: &str, held: &[&str]| {
            let held = held.iter().map(|name| (*name).to_owned()).collect();
            let profile = seccomp(&held).unwrap();
            let calls = profile["syscalls"].as_array().unwrap();
            calls.iter().any(|call| call["action"] == "SCMP_ACT_ALLOW" && words(&call["names"]).any(|own| own == name))
        };
        for (name, capability) in
            [("finit_module", "CAP_SYS_MODULE"), ("chroot", "CAP_SYS_CHROOT"), ("bpf", "CAP_SYS_ADMIN")]
        {
            assert!(!allowed(name, &[]), "{name}");
            assert!(allowed(name, &[capability]), "{name}");
        }
        assert!(allowed("openat2", &[]));
        assert!(!allowed("s390_runtime_instr", &[]));
    }

    #[test]
    fn quantities_and_variables_are_read_as_the_kubelet_reads_them() {
        assert_eq!(bytes("64Mi").unwrap(), 64 << 20);
        assert!(bytes("64M").is_err());
        let environment = BTreeMap::from([("NODE_NAME".to_owned(), "n1".to_owned())]);
        assert_eq!(expanded("$(NODE_NAME)/$(OTHER)", &environment), "n1/$(OTHER)");
    }
}
