//! Whose devices a resource of the kubelet's is, by its name.
//!
//! NVIDIA's plugins and ours offer GPUs and NVSwitches as `nvidia.com/...`, under names that an administrator may choose. So
//! does NVIDIA's Network Operator with network cards, whose pods and plugins are no business of ours.

const DOMAIN: &str = "nvidia.com/";

/// Words for network cards, as they stand in the names of the Network Operator's documentation. No GPU is called so.
const NETWORK: [&str; 5] = ["hostdev", "rdma", "sriov", "mlnx", "roce"];

/// Whether its devices may be GPUs or NVSwitches: all of NVIDIA's but what is a network card by its name.
pub fn may_be_gpus(resource: &str) -> bool {
    let name = resource.strip_prefix(DOMAIN).map(str::to_lowercase);
    name.is_some_and(|name| !name.is_empty() && !NETWORK.iter().any(|word| name.contains(word)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_cards_of_the_same_vendor_are_told_from_gpus() {
        for (resource, may_be) in [
            ("nvidia.com/pgpu", true),
            ("nvidia.com/gpu.shared", true),
            ("nvidia.com/mig-1g.10gb", true),
            ("nvidia.com/nvswitch", true),
            ("nvidia.com/GH100_H100_SXM5_80GB", true),
            ("nvidia.com/our-gpus", true),
            ("nvidia.com/nice", true),
            ("nvidia.com/hostdev", false),
            ("nvidia.com/rdma_shared_device_a", false),
            ("nvidia.com/sriov_rdma_vf", false),
            ("nvidia.com/RoCE-rail1", false),
            ("nvidia.com/mlnxnics", false),
            ("nvidia.com/rail1_RDMA", false),
            ("example.com/gpu", false),
            ("nvidia.com/", false),
            ("nvidia.com", false),
            ("", false),
        ] {
            assert_eq!(may_be_gpus(resource), may_be, "{resource}");
        }
    }
}
