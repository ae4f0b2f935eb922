//! Fills the lab's cache, for every kernel or those named: `cargo run -p lab-vm --example artifacts -- [iommufd] [no-group] [stock]`.

use std::time::Instant;

use anyhow::Context as _;
use lab_vm::artifacts::{Artifacts, Cache, Kernel, Wanted};

fn main() -> anyhow::Result<()> {
    let names: Vec<String> = std::env::args().skip(1).collect();
    let kernels = names
        .iter()
        .map(|name| {
            let kernel = Kernel::ALL.into_iter().find(|kernel| kernel.name() == name);
            kernel.with_context(|| format!("No kernel {name}; there are iommufd, no-group and stock"))
        })
        .collect::<anyhow::Result<_>>()?;
    let wanted = if names.is_empty() { Wanted::everything() } else { Wanted { kernels } };
    let cache = Cache::from_env()?;
    for item in Artifacts::missing(&cache, &wanted) {
        println!(
            "missing: {}: {} MB to download, {} MB while it is made, {} MB kept, about {} min",
            item.name, item.download_mb, item.build_mb, item.disk_mb, item.minutes
        );
    }
    let start = Instant::now();
    let artifacts = Artifacts::ensure(&cache, &wanted)?;
    println!("QEMU {}, in {:.1?}", artifacts.qemu.version, start.elapsed());
    for kernel in wanted.kernels {
        if let Some(files) = artifacts.kernel(kernel) {
            println!("kernel {kernel}: {} ({} modules to load)", files.release, files.load.len());
        }
    }
    Ok(())
}
