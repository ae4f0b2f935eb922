//! What a bundle does not tell (docs/bundle.md says the same for people).
//!
//! First, by what is taken at all: of processes the name, of CDI files and containerd's configuration what `doctor` judges, of the
//! kernel's command line the words that concern the checks. Second, in every free text that remains: host name, UUIDs,
//! addresses, long numbers, tokens, and values of names that sound like secrets.

use std::sync::LazyLock;

use hw_probe::{Fault, Holder, Problem, SysRoot};
use regex_lite::{NoExpand, Regex};

use crate::checks::Facts;
use crate::node::{NodeFiles, text};
use crate::pod_resources::Get;

/// What stands in the manifest for people.
pub const WHAT: [&str; 9] = [
    "boot id",
    "host name, also inside of other texts",
    "UUIDs, IP and MAC addresses, numbers of 10 and more digits, words that look like tokens, and values of names that sound like secrets, in all free texts",
    "serial numbers and product data in configuration space",
    "the kernel's command line, but for the words about IOMMU, VFIO, lockdown, TEE and GPU drivers",
    "/proc/cpuinfo, but for vendor, address sizes and the flags that concern TEEs",
    "processes, but for the name of each that holds a device node (no pid, command line, control group or pod)",
    "content of CDI files, but for version, kind and names of devices; content of containerd's configuration, but for Kata's handlers and the CDI setting",
    "messages of parsers, which quote what they do not understand",
];

/// Longest free text that is kept, in characters.
const LONGEST: usize = 512;

/// A pattern, and what stands in its place. They are applied in this order.
static PATTERNS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let patterns = [
        (
            r#"(?i)([\w.-]*(?:password|passwd|secret|token|credential|authorization|api_?key|private_?key)[\w.-]*)(\s*[=:]\s*)(?:bearer\s+|basic\s+)?[^\s"',;}\])]+"#,
            "$1$2<secret>",
        ),
        (r"(?i)\b(bearer|basic)\s+[\w.+/=~-]{6,}", "$1 <secret>"),
        // Messages show the start of what they are about, so a UUID may be cut off.
        (r"(?i)[0-9a-f]{8}[-_][0-9a-f]{4}(?:[-_][0-9a-f]{1,12}){0,3}", "<uuid>"),
        (r"(?i)\b[0-9a-f]{2}(?:[:-][0-9a-f]{2}){5}\b", "<mac>"),
        (r"\b(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b", "<ip>"),
        (
            r"(?i)[0-9a-f]{0,4}:[0-9a-f:]*:[0-9a-f:]*:[0-9a-f:.]*[0-9a-f]|(?i)\b[0-9a-f]{1,4}::[0-9a-f:.]*|::[0-9a-f][0-9a-f:.]*",
            "<ip>",
        ),
        (r"\beyJ[\w-]+\.[\w-]+\.?[\w-]*", "<token>"),
        (r"\b[a-z0-9]{6}\.[a-z0-9]{16}\b", "<token>"),
        (r"\b[0-9]{10,}\b", "<number>"),
    ];
    // A pattern of ours that does not compile is found by the tests of this module.
    patterns.into_iter().filter_map(|(pattern, with)| Some((Regex::new(pattern).ok()?, with))).collect()
});

/// Words of this form are looked at as possible tokens.
static WORDS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"[A-Za-z0-9+_=-]{16,}").ok());

/// Takes out what does not belong into a bundle.
#[derive(Debug)]
pub struct Redactor {
    hosts: Vec<Regex>,
}

impl Redactor {
    /// One that knows the node's host name, long and short.
    pub fn of(root: &SysRoot) -> Self {
        let mut names = Vec::new();
        for path in ["proc/sys/kernel/hostname", "etc/hostname"] {
            let name = text(&root.join(path)).unwrap_or_default().trim().chars().take(LONGEST).collect::<String>();
            names.extend(name.split_once('.').map(|(short, _)| short.to_owned()));
            names.push(name);
        }
        names.retain(|name| !matches!(name.as_str(), "" | "localhost" | "(none)"));
        names.sort_by_key(|name| std::cmp::Reverse(name.len()));
        names.dedup();
        let pattern = |name: &String| Regex::new(&format!(r"(?i)\b{}\b", regex_lite::escape(name))).ok();
        Self { hosts: names.iter().filter_map(pattern).collect() }
    }

    /// A free text without what identifies or unlocks anything.
    pub fn text(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for host in &self.hosts {
            text = host.replace_all(&text, NoExpand("<host>")).into_owned();
        }
        for (pattern, with) in PATTERNS.iter() {
            text = pattern.replace_all(&text, *with).into_owned();
        }
        let Some(words) = WORDS.as_ref() else { return String::new() };
        let token = |found: &regex_lite::Captures| {
            let word = &found[0];
            if looks_like_a_token(word) { "<token>".to_owned() } else { word.to_owned() }
        };
        // Cut last, so that no half of a secret stays unrecognised.
        words.replace_all(&text, token).chars().take(LONGEST).collect()
    }

    /// The facts as a bundle may tell them.
    #[must_use]
    pub fn facts(&self, facts: Facts) -> Facts {
        let Facts { mut report, get, has_node_files, mut exchanged } = facts;
        report.host.boot_id = None;
        self.each(&mut report.host_details.command_line);
        self.one(&mut report.host_details.lockdown.evidence);
        for Holder { node: _, pid, comm, cgroup, pod_uid } in &mut report.holders.list {
            (*pid, *cgroup, *pod_uid) = (None, None, None);
            self.one(comm);
        }
        report.holders.list.sort_unstable();
        report.holders.list.dedup();
        self.node(&mut report.node);
        for device in &mut report.devices {
            self.maybe(&mut device.function.driver_override);
            for fault in &mut device.faults {
                if let Fault::ConfigUnreadable { cause } = fault {
                    self.one(cause);
                }
            }
        }
        for Problem { bdf: _, path, message } in &mut report.problems {
            self.one(path);
            self.one(message);
        }
        let get = match get {
            Get::Answers => Get::Answers,
            Get::Disabled { message } => Get::Disabled { message: self.text(&message) },
            Get::Fails { message } => Get::Fails { message: self.text(&message) },
            Get::NotAsked { cause } => Get::NotAsked { cause: self.text(&cause) },
        };
        exchanged.found = exchanged.found.map_err(|trouble| self.text(&trouble));
        Facts { report, get, has_node_files, exchanged }
    }

    fn node(&self, node: &mut NodeFiles) {
        self.maybe(&mut node.kubelet.plugin_socket.trouble);
        self.maybe(&mut node.kubelet.pod_resources_socket.trouble);
        for file in node.cdi.iter_mut().flat_map(|folder| &mut folder.files) {
            self.one(&mut file.file);
            self.maybe(&mut file.cdi_kind);
            self.maybe(&mut file.cdi_version);
            self.each(&mut file.cdi_devices);
            file.trouble = file.trouble.as_deref().map(|trouble| self.text(without_quotes(trouble)));
        }
        let kata = &mut node.kata;
        for list in [&mut kata.containerd_files, &mut kata.runtimes, &mut kata.gpu_configurations] {
            self.each(list);
        }
        for trouble in &mut kata.troubles {
            *trouble = self.text(without_quotes(trouble));
        }
    }

    fn one(&self, text: &mut String) {
        *text = self.text(text);
    }

    fn maybe(&self, text: &mut Option<String>) {
        *text = text.as_deref().map(|text| self.text(text));
    }

    fn each(&self, texts: &mut [String]) {
        for text in texts {
            self.one(text);
        }
    }
}

/// What a parser says of a file quotes the file.
fn without_quotes(trouble: &str) -> &str {
    ["Is no CDI file", "Is no TOML"]
        .iter()
        .find_map(|words| Some(&trouble[..trouble.find(words)? + words.len()]))
        .unwrap_or(trouble)
}

/// Letters and digits well mixed, and no hexadecimal number of ours. Words of names, as in configuration-qemu-nvidia-gpu-snp, have
/// few digits and one case.
fn looks_like_a_token(word: &str) -> bool {
    let count = |is: fn(&u8) -> bool| word.bytes().filter(is).count();
    let (digits, lower) = (count(u8::is_ascii_digit), count(u8::is_ascii_lowercase));
    let (upper, others) = (count(u8::is_ascii_uppercase), count(u8::is_ascii_punctuation));
    let hex = word.strip_prefix("0x").is_some_and(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
    let mixed = digits >= 4 && lower + upper >= 2;
    let cases = lower > 0 && upper > 0 && digits >= 2;
    let shouted = lower == 0 && others == 0 && upper > 0 && digits > 0;
    !hex && (mixed || cases || shouted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hw_probe::testing::FakeSysfs;

    fn redactor() -> Redactor {
        let fake = FakeSysfs::new();
        fake.file("proc/sys/kernel/hostname", "gpu-node-17.rack4.example.com\n");
        Redactor::of(&fake.root())
    }

    #[test]
    fn secrets_and_names_are_taken_out() {
        assert_eq!(PATTERNS.len(), 9);
        for (text, left) in [
            ("on gpu-node-17.rack4.example.com", "on <host>"),
            ("GPU-NODE-17: x", "<host>: x"),
            ("GPU-5a2b1c3d-1111-2222-3333-444455556666", "GPU-<uuid>"),
            ("kubepods-pod0f1e2d3c_4b5a_6978_8796_a5b4c3d2e1f0.slice", "kubepods-pod<uuid>.slice"),
            ("dial tcp 10.1.2.3:6443", "dial tcp <ip>:6443"),
            ("at fd00:1:2::3 and fe80::1", "at <ip> and <ip>"),
            ("via 2001:db8:0:1:2:3:4:5", "via <ip>"),
            ("link 52:54:00:12:34:56", "link <mac>"),
            ("serial 1652823054321", "serial <number>"),
            ("password=hunter2 token: abc", "password=<secret> token: <secret>"),
            ("Authorization: Bearer abcdef", "Authorization: <secret>"),
            ("bearer abc.def-ghi", "bearer <secret>"),
            ("jwt eyJhbGciOi.eyJzdWIi.SflKx", "jwt <token>"),
            ("join abcdef.0123456789abcdef", "join <token>"),
            ("key AKIAIOSFODNN7EXAMPLE", "key <token>"),
            ("Is not a NUMA node: \"0f1e2d3c-4b5a-6978-8796-a5b4", "Is not a NUMA node: \"<uuid>"),
            ("cri-containerd-0123456789abcdef0123456789abcdef", "<token>"),
        ] {
            assert_eq!(redactor().text(text), left, "{text}");
        }
        assert_eq!(redactor().text(&"x ".repeat(5000)).chars().count(), LONGEST);
    }

    #[test]
    fn what_diagnosis_needs_is_left() {
        for text in [
            "0000:41:00.0: BAR0 at 0x0000104002000000",
            "10000:e1:00.0",
            "/etc/containerd/conf.d/kata-deploy.toml",
            "kata-qemu-nvidia-gpu-snp",
            "/opt/kata/share/defaults/kata-containers/configuration-qemu-nvidia-gpu-tdx.toml",
            "Has version \"1.0.0\", which Kata's Go runtime does not know: it knows 0.3.0 to 0.6.0",
            "vfio-pci.ids=10de:2330,10de:22a3",
            "nvidia.com/pgpu",
            "qemu-system-x86",
            "sys/bus/pci/devices/0000:41:00.0/numa_node",
            "PodResources API Get method disabled",
            "modprobe.blacklist=nouveau,nvidia_drm",
            "nvgrace_gpu_vfio_pci",
            "There is no lockdown file; 0000:00:06.0: mapping a BAR is refused with EPERM: the kernel is locked down",
            "6.12.0-fake",
        ] {
            assert_eq!(redactor().text(text), text);
        }
    }

    #[test]
    fn a_node_without_a_name_of_its_own_has_none_to_take_out() {
        let fake = FakeSysfs::new();
        fake.file("proc/sys/kernel/hostname", "(none)\n");
        fake.file("etc/hostname", "localhost\n");
        assert_eq!(Redactor::of(&fake.root()).text("at localhost (none)"), "at localhost (none)");
    }
}
