//! The Dockerfiles, as far as they can be judged without building them; `hack/test-images` builds them.

#![allow(clippy::unwrap_used, reason = "what a test cannot set up, it fails by")]

use std::collections::BTreeSet;

const DOCKERFILES: [(&str, &str); 3] = [
    ("cc-manager", include_str!("../../../Dockerfile.cc-manager")),
    ("vfio-manager", include_str!("../../../Dockerfile.vfio-manager")),
    ("device-plugin", include_str!("../../../Dockerfile.device-plugin")),
];

/// The lines of a file that are no comments.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[test]
fn bases_are_arguments_with_pinned_public_defaults() {
    for (agent, text) in DOCKERFILES {
        for line in lines(text).filter_map(|line| line.strip_prefix("FROM ")) {
            let image = line.split_whitespace().find(|word| !word.starts_with("--")).unwrap();
            assert!(["${RUST_IMAGE}", "${SHELL_IMAGE}", "scratch", "shell-free"].contains(&image), "{agent}: {line}");
        }
        for line in lines(text).filter_map(|line| line.strip_prefix("ARG ")).filter(|line| line.contains("_IMAGE")) {
            let (_, image) = line.split_once('=').unwrap();
            let (name, tag) = image.split_once(':').unwrap();
            assert!(!name.contains(['.', '/']), "{agent}: {image} names a registry");
            assert!(tag.matches('.').count() == 2, "{agent}: {image} is not pinned");
        }
    }
}

#[test]
fn images_are_built_with_the_projects_toolchain() {
    let toolchain = include_str!("../../../rust-toolchain.toml");
    let version = toolchain.lines().find_map(|line| line.strip_prefix("channel = \"")).unwrap().trim_end_matches('"');
    for (agent, text) in DOCKERFILES {
        assert!(lines(text).any(|line| line.starts_with(&format!("ARG RUST_IMAGE=rust:{version}-"))), "{agent}");
        assert!(lines(text).any(|line| line.contains(&format!("RUSTUP_TOOLCHAIN={version} "))), "{agent}");
    }
}

/// Apart from the agent's name they are one file, but for the last stage and the busybox in it.
#[test]
fn the_three_files_say_the_same() {
    let common = |agent: &str, text: &'static str| -> BTreeSet<String> {
        let differs = ["SHELL_IMAGE", "image.description", "/out/contract/", "/bin/busybox", "GPL-2.0-only"];
        let same = lines(text).filter(|line| !differs.iter().any(|word| line.contains(word)));
        same.map(|line| line.replace(agent, "AGENT").replace(" /busybox", "")).collect()
    };
    let [first, rest @ ..] = DOCKERFILES.map(|(agent, text)| common(agent, text));
    assert!(first.len() > 20 && first.contains("ENTRYPOINT [\"/usr/bin/AGENT\"]"), "{first:?}");
    for other in rest {
        assert_eq!(first, other);
    }
}

/// The GPU Operator's pods of vfio-manager start a shell; nothing else does.
#[test]
fn a_shell_is_in_one_image_and_never_in_the_shell_free_one() {
    for (agent, text) in DOCKERFILES {
        let (shell_free, last) = text.split_once("\nFROM shell-free\n").unwrap();
        assert_eq!(lines(last).any(|line| line.contains("busybox")), agent == "vfio-manager", "{agent}");
        let of_scratch = shell_free.split("FROM scratch AS shell-free").nth(1).unwrap();
        assert_eq!(lines(of_scratch).filter(|line| line.starts_with("COPY ")).count(), 1, "{agent}");
        assert!(!of_scratch.contains("busybox") && !of_scratch.contains("contract"), "{agent}");
    }
}
