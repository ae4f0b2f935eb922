//! Debian's package client with a configuration of its own. The host's is read for its mirror and proxies, never changed.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::steps::Steps;
use super::{ArtifactError, file_error};

/// The release that kernel source and busybox come from.
pub(crate) const STABLE: &str = "trixie";
/// Where its newer QEMU is.
pub(crate) const BACKPORTS: &str = "trixie-backports";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const DOWNLOAD: Duration = Duration::from_mins(15);

/// A downloaded package; apt has checked its hash against the signed lists.
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) file: PathBuf,
}

pub(crate) struct Apt {
    config: PathBuf,
    /// Release of the host, if it is Debian: what runs here and links against the host's libraries comes from it.
    pub(crate) host_release: Option<String>,
}

impl Apt {
    /// Makes the private configuration and fetches the lists.
    pub(crate) fn prepare(folder: &Path, steps: &Steps) -> Result<Self, ArtifactError> {
        let os_release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let host_release = debian_release(&os_release);
        let mirror = match std::env::var("CCNODE_LAB_DEBIAN_MIRROR").ok().filter(|mirror| !mirror.is_empty()) {
            Some(mirror) => mirror,
            None if host_release.is_some() => host_mirror(Path::new("/etc/apt"))
                .ok_or_else(|| ArtifactError::NoMirror("the host's apt sources name none".to_owned()))?,
            None => return Err(ArtifactError::NoMirror("this host is not Debian".to_owned())),
        };
        let keyring = std::env::var_os("CCNODE_LAB_DEBIAN_KEYRING").map_or_else(|| KEYRING.into(), PathBuf::from);
        if !keyring.is_file() {
            return Err(ArtifactError::NoKeyring(keyring));
        }
        for inner in ["etc/sources.list.d", "etc/preferences.d", "state/lists/partial", "cache/archives/partial"] {
            let path = folder.join(inner);
            fs::create_dir_all(&path).map_err(file_error("make folder", &path))?;
        }
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            fs::write(&path, text).map_err(file_error("write", &path))
        };
        // Nothing counts as installed: every package comes with all that it needs, down to libc.
        write("state/status", "")?;
        write("etc/sources.list", &sources(&mirror, &keyring, host_release.as_deref()))?;
        let proxies = Command::new("apt-config").arg("dump").output().map(|output| output.stdout).unwrap_or_default();
        write("apt.conf", &configuration(folder, &String::from_utf8_lossy(&proxies)))?;
        let apt = Self { config: folder.join("apt.conf"), host_release };
        let mut update = apt.command("apt-get");
        update.args(["-q", "update", "--error-on=any"]);
        steps.run("Fetch package lists", &mut update, DOWNLOAD)?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", &self.config).env("LC_ALL", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Downloads a package and everything it depends on.
    pub(crate) fn download_with_dependencies(
        &self,
        name: &str,
        release: &str,
        folder: &Path,
        steps: &Steps,
    ) -> Result<Vec<Package>, ArtifactError> {
        let partial = folder.join("partial");
        fs::create_dir_all(&partial).map_err(file_error("make folder", &partial))?;
        let mut command = self.command("apt-get");
        command.args(["-q", "install", "--download-only", "-y", "-t", release]);
        command.arg("-o").arg(format!("Dir::Cache::archives={}", folder.display())).arg(name);
        steps.run(&format!("Download {name} and what it needs"), &mut command, DOWNLOAD)?;
        let mut packages = packages(folder)?;
        packages.sort_by(|a, b| a.name.cmp(&b.name));
        if packages.iter().any(|package| package.name == name) {
            Ok(packages)
        } else {
            Err(ArtifactError::NoPackage(name.to_owned()))
        }
    }

    /// Downloads the first of several names that a release has: libraries were renamed from one release to the next.
    pub(crate) fn download(
        &self,
        names: &[&str],
        release: &str,
        folder: &Path,
        steps: &Steps,
    ) -> Result<Package, ArtifactError> {
        let name = names
            .iter()
            .find(|name| self.has(name, release))
            .ok_or_else(|| ArtifactError::NoPackage(format!("{} in {release}", names.join(" or "))))?;
        // A folder of its own tells the file's name.
        let folder = folder.join(name);
        fs::create_dir_all(&folder).map_err(file_error("make folder", &folder))?;
        let mut command = self.command("apt-get");
        command.args(["-q", "download", &format!("{name}/{release}")]).current_dir(&folder);
        steps.run(&format!("Download {name}"), &mut command, DOWNLOAD)?;
        packages(&folder)?.pop().ok_or_else(|| ArtifactError::NoPackage((*name).to_owned()))
    }

    fn has(&self, name: &str, release: &str) -> bool {
        let output = self.command("apt-cache").args(["madison", name]).output();
        // " name | version | mirror release/main amd64 Packages"
        let marker = format!(" {release}/");
        output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).lines().any(|line| line.contains(&marker)))
    }

    /// What a package of a release depends on, by name.
    pub(crate) fn depends(&self, name: &str, release: &str) -> Result<Vec<String>, ArtifactError> {
        let output = self
            .command("apt-cache")
            .args(["show", "--no-all-versions", &format!("{name}/{release}")])
            .output()
            .map_err(|source| ArtifactError::Spawn { program: "apt-cache".to_owned(), source })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find_map(|line| line.strip_prefix("Depends: "));
        let line = line.ok_or_else(|| ArtifactError::NoPackage(format!("{name} in {release}")))?;
        Ok(line.split(',').filter_map(|word| word.split_ascii_whitespace().next()).map(str::to_owned).collect())
    }
}

/// The packages in a folder.
fn packages(folder: &Path) -> Result<Vec<Package>, ArtifactError> {
    let mut packages = Vec::new();
    for entry in fs::read_dir(folder).map_err(file_error("read", folder))?.flatten() {
        let file = entry.path();
        if file.extension().is_none_or(|extension| extension != "deb") {
            continue;
        }
        let output = Command::new("dpkg-deb")
            .args(["--show", "--showformat=${Package} ${Version}"])
            .arg(&file)
            .output()
            .map_err(|source| ArtifactError::Spawn { program: "dpkg-deb".to_owned(), source })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some((name, version)) = text.split_once(' ') else {
            let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(ArtifactError::Unusable { what: file.display().to_string(), reason });
        };
        packages.push(Package { name: name.to_owned(), version: version.to_owned(), file });
    }
    Ok(packages)
}

/// Code name of the host's release, if the host is Debian itself.
fn debian_release(os_release: &str) -> Option<String> {
    let field = |name: &str| {
        let line = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
        Some(line.trim_matches('"').to_owned())
    };
    if field("ID")? != "debian" {
        return None;
    }
    field("VERSION_CODENAME").filter(|name| !name.is_empty())
}

fn sources(mirror: &str, keyring: &Path, host_release: Option<&str>) -> String {
    let updates = format!("{STABLE}-updates");
    let mut releases = vec![STABLE, &updates, BACKPORTS];
    releases.extend(host_release.filter(|release| *release != STABLE));
    let mut text = String::new();
    for release in releases {
        // Writing to a string does not fail.
        let _ = writeln!(text, "deb [signed-by={}] {mirror} {release} main", keyring.display());
    }
    text
}

fn configuration(folder: &Path, host: &str) -> String {
    let folder = folder.display();
    let mut text = format!(
        "Dir::Etc \"{folder}/etc\";\n\
         Dir::Etc::sourcelist \"{folder}/etc/sources.list\";\n\
         Dir::Etc::sourceparts \"{folder}/etc/sources.list.d\";\n\
         Dir::Etc::netrc \"/etc/apt/auth.conf\";\n\
         Dir::Etc::netrcparts \"/etc/apt/auth.conf.d\";\n\
         Dir::State \"{folder}/state\";\n\
         Dir::State::status \"{folder}/state/status\";\n\
         Dir::Cache \"{folder}/cache\";\n\
         Acquire::Languages \"none\";\n\
         APT::Architecture \"amd64\";\n\
         APT::Architectures {{ \"amd64\"; }};\n\
         APT::Install-Recommends \"false\";\n\
         APT::Sandbox::User \"root\";\n"
    );
    // How the host reaches the network. Nothing else of its settings: some of them run programs.
    for line in host.lines() {
        let network = ["Acquire::http::", "Acquire::https::", "Acquire::http ", "Acquire::https "];
        let proxy_program = line.contains("Proxy-Auto-Detect") || line.contains("ProxyAutoDetect");
        if network.iter().any(|prefix| line.starts_with(prefix)) && !proxy_program {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// The first Debian mirror that the host's apt uses, security archives aside.
fn host_mirror(etc: &Path) -> Option<String> {
    let mut files = vec![etc.join("sources.list")];
    let mut parts: Vec<_> =
        fs::read_dir(etc.join("sources.list.d")).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    parts.sort();
    files.extend(parts);
    files.iter().find_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        match file.extension()?.to_str()? {
            "list" => from_list(&text),
            "sources" => from_deb822(&text),
            _ => None,
        }
    })
}

/// Whether a source is Debian's main archive: suites by their names, component main.
fn is_debian(suites: &str, components: &str) -> bool {
    const NAMES: [&str; 9] =
        ["bullseye", "bookworm", "trixie", "forky", "sid", "stable", "testing", "unstable", "oldstable"];
    let suite = |word: &str| {
        let name = word.split('-').next().unwrap_or_default();
        NAMES.contains(&name) && !word.contains("security")
    };
    suites.split_ascii_whitespace().any(suite) && components.split_ascii_whitespace().any(|word| word == "main")
}

/// `deb [options] URI suite component…`
fn from_list(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let line = line.split('#').next().unwrap_or_default().trim();
        let rest = line.strip_prefix("deb ")?.trim_start();
        let rest = if rest.starts_with('[') { rest.split_once(']')?.1.trim_start() } else { rest };
        let (uri, rest) = rest.split_once(char::is_whitespace)?;
        let (suite, components) = rest.trim_start().split_once(char::is_whitespace)?;
        is_debian(suite, components).then(|| uri.to_owned())
    })
}

/// Paragraphs of `Field: value`, continued by indented lines.
fn from_deb822(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).find_map(|paragraph| {
        let field = |name: &str| {
            let mut value = String::new();
            let mut inside = false;
            for line in paragraph {
                if line.starts_with([' ', '\t']) {
                    if inside {
                        value.push(' ');
                        value.push_str(line.trim());
                    }
                    continue;
                }
                let (key, rest) = line.split_once(':').unwrap_or((line, ""));
                inside = key.trim().eq_ignore_ascii_case(name);
                if inside {
                    rest.trim().clone_into(&mut value);
                }
            }
            value
        };
        let on =
            !matches!(field("Enabled").to_ascii_lowercase().as_str(), "no" | "false" | "without" | "off" | "disable");
        let binary = field("Types").split_ascii_whitespace().any(|kind| kind == "deb");
        if !(on && binary && is_debian(&field("Suites"), &field("Components"))) {
            return None;
        }
        field("URIs").split_ascii_whitespace().next().map(str::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_found_in_either_form() {
        let list = [
            ("deb http://m.example/debian bookworm main contrib\n", Some("http://m.example/debian")),
            ("# deb http://no.example/debian bookworm main\ndeb-src http://no.example/ trixie main\n", None),
            ("deb [arch=amd64 signed-by=/k.gpg] http://m.example/d trixie-updates main", Some("http://m.example/d")),
            (
                "deb http://sec.example/debian-security trixie-security main\ndeb http://m.example/d sid main # x",
                Some("http://m.example/d"),
            ),
            ("deb https://other.example/apt cloud-sdk main\ndeb https://x.example noble main", None),
            ("deb\ndeb [\ndeb http://x\ndeb http://x trixie\n", None),
        ];
        for (text, expected) in list {
            assert_eq!(from_list(text).as_deref(), expected, "{text}");
        }
        let deb822 = [
            (
                "Types: deb\nURIs: http://m.example/debian\nSuites: trixie trixie-updates\nComponents: main\n",
                Some("http://m.example/debian"),
            ),
            (
                "Types: deb deb-src\n# comment\nURIs:\n http://a.example/d\n http://b.example/d\nSuites: bookworm\nComponents: contrib main\n",
                Some("http://a.example/d"),
            ),
            (
                "Types: deb\nEnabled: no\nURIs: http://a.example/d\nSuites: trixie\nComponents: main\n\ntypes: deb\nuris: http://b.example/d\nsuites: trixie\ncomponents: main",
                Some("http://b.example/d"),
            ),
            ("Types: deb-src\nURIs: http://a.example/d\nSuites: trixie\nComponents: main\n", None),
            ("Types: deb\nURIs: http://a.example/s\nSuites: trixie-security\nComponents: main\n", None),
            ("Types: deb\nURIs: http://a.example/n\nSuites: nodistro\nComponents: main\n", None),
            ("", None),
            (" \n:\nTypes\n", None),
        ];
        for (text, expected) in deb822 {
            assert_eq!(from_deb822(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn both_kinds_of_files_are_looked_at() {
        let etc = tempfile::tempdir().unwrap();
        assert_eq!(host_mirror(etc.path()), None);
        let parts = etc.path().join("sources.list.d");
        fs::create_dir(&parts).unwrap();
        fs::write(
            parts.join("x.sources.disabled"),
            "Types: deb\nURIs: http://no.example\nSuites: sid\nComponents: main\n",
        )
        .unwrap();
        fs::write(parts.join("z.sources"), "Types: deb\nURIs: http://z.example\nSuites: sid\nComponents: main\n")
            .unwrap();
        assert_eq!(host_mirror(etc.path()).as_deref(), Some("http://z.example"));
        fs::write(etc.path().join("sources.list"), "deb http://first.example trixie main\n").unwrap();
        assert_eq!(host_mirror(etc.path()).as_deref(), Some("http://first.example"));
    }

    #[test]
    fn only_debian_itself_has_a_release() {
        for (text, expected) in [
            ("ID=debian\nVERSION_CODENAME=bookworm\n", Some("bookworm")),
            ("ID=\"debian\"\nVERSION_CODENAME=\"trixie\"\n", Some("trixie")),
            ("ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n", None),
            ("ID=debian\n", None),
            ("", None),
        ] {
            assert_eq!(debian_release(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn the_hosts_network_settings_are_taken_and_its_hooks_are_not() {
        let host = "APT::Update::Post-Invoke:: \"rm -rf /\";\nAcquire::http::Proxy \"http://p.example:3128\";\n\
                    Acquire::http::Proxy-Auto-Detect \"/bin/prog\";\nDir::Cache \"/var/cache/apt\";\n";
        let text = configuration(Path::new("/private"), host);
        assert!(text.contains("Acquire::http::Proxy \"http://p.example:3128\";\n"));
        for absent in ["Post-Invoke", "/bin/prog", "/var/cache/apt"] {
            assert!(!text.contains(absent), "{absent}");
        }
    }

    #[test]
    fn the_hosts_release_is_added_once() {
        let count = |release| sources("http://m.example", Path::new("/k"), release).lines().count();
        assert_eq!(count(None), 3);
        assert_eq!(count(Some("trixie")), 3);
        assert_eq!(count(Some("bookworm")), 4);
    }
}
