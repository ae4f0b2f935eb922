//! Which resource names the kubelet takes from a device plugin.

/// Longest DNS subdomain.
const MAX_SUBDOMAIN: usize = 253;
/// Longest name after the slash.
const MAX_NAME: usize = 63;
/// What a quota puts before a resource name; the kubelet checks the name with it.
const QUOTA_PREFIX: &str = "requests.";

/// Says whether `name` is an extended resource: it has a domain, that domain is not Kubernetes' own, and the name is
/// still a qualified name with a quota's prefix before it.
pub(crate) fn is_extended_resource(name: &str) -> bool {
    let native = !name.contains('/') || name.contains("kubernetes.io/");
    !native && !name.starts_with(QUOTA_PREFIX) && is_qualified(&format!("{QUOTA_PREFIX}{name}"))
}

fn is_qualified(name: &str) -> bool {
    let mut parts = name.split('/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(domain), Some(rest), None) => is_subdomain(domain) && is_name(rest),
        _ => false,
    }
}

fn is_subdomain(domain: &str) -> bool {
    let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    domain.len() <= MAX_SUBDOMAIN
        && domain.split('.').all(|label| {
            label.starts_with(lower) && label.ends_with(lower) && label.chars().all(|c| lower(c) || c == '-')
        })
}

fn is_name(name: &str) -> bool {
    let edge = |c: char| c.is_ascii_alphanumeric();
    name.len() <= MAX_NAME
        && name.starts_with(edge)
        && name.ends_with(edge)
        && name.chars().all(|c| edge(c) || matches!(c, '-' | '_' | '.'))
}

#[cfg(test)]
mod tests {
    use super::is_extended_resource;

    #[test]
    fn extended_resource_names() {
        let long = |n: usize| format!("example.com/{}", "a".repeat(n));
        let cases = [
            ("nvidia.com/pgpu", true),
            ("nvidia.com/GH100_H100_PCIE", true),
            ("x/y", true),
            ("noslash", false),
            ("", false),
            ("/", false),
            ("nvidia.com/", false),
            ("/pgpu", false),
            ("nvidia.com/a/b", false),
            ("kubernetes.io/gpu", false),
            ("sub.kubernetes.io/gpu", false),
            ("requests.nvidia.com/gpu", false),
            ("Nvidia.com/gpu", false),
            ("nvidia..com/gpu", false),
            ("nvidia.com-/gpu", false),
            ("nvidia.com/_gpu", false),
            ("nvidia.com/gpu.", false),
            ("nvidia.com/gp u", false),
            ("nvidia.com/gpü", false),
        ];
        for (name, expected) in cases {
            assert_eq!(is_extended_resource(name), expected, "{name:?}");
        }
        assert!(is_extended_resource(&long(63)));
        assert!(!is_extended_resource(&long(64)));
        assert!(!is_extended_resource(&format!("{}/a", "a".repeat(245))));
        assert!(is_extended_resource(&format!("{}/a", "a".repeat(244))));
    }
}
