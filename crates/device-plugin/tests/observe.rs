//! Only observing: what would be offered is told, and nothing is offered.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test that calls them")]

mod common;

use std::time::Duration;

use agent_core::hostfile::HostDir;
use agent_core::metrics::Metrics;
use agent_core::readiness::Registry;
use agent_core::shutdown::Shutdown;
use agent_core::state::{UNITS_DIR, UnitsFile};
use common::{PATIENCE, config};
use device_plugin::controller::{Config, Looks, run};
use device_plugin::features::FeatureFile;
use device_plugin::units::IdScheme;
use hw_probe::Inventory;
use hw_probe::testing::FakeSysfs;
use lab_kube::kubelet::{self, Kubelet};
use tokio::time::{Instant, sleep};

#[tokio::test]
async fn units_are_told_and_neither_kubelet_nor_kata_hear_of_them() {
    let fake = FakeSysfs::new();
    fake.gpu("0000:41:00.0", 0x2330).group(5).driver("vfio-pci").cdev(0);
    fake.gpu("0000:c1:00.0", 0x2330).group(6).driver("nvidia");
    let plugins = fake.path().join("plugins");
    let kubelet = kubelet::Config {
        root: fake.path().into(),
        register_node: false,
        ..kubelet::Config::new("node", plugins.clone(), fake.path().join("pod-resources/kubelet.sock"))
    };
    let kubelet = Kubelet::start(kubelet, None).await.unwrap();
    let features = fake.path().join("features.d/ccnode");
    let looks = Looks { only_observe: true, features_file: FeatureFile::new(features.clone()), ..Looks::default() };
    let config = Config { looks, ..config(&fake, fake.path().join("state"), plugins.clone(), IdScheme::Pci) };
    let cdi = config.cdi_dir.clone();
    let (shutdown, metrics, readiness) = (Shutdown::manual(), Metrics::new(), Registry::default());
    let (stop, counted, ready) = (shutdown.clone(), metrics.clone(), readiness.clone());
    let task = tokio::spawn(async move { run(config, stop, ready, &counted).await });
    let boot_id = Inventory::scan(&fake.root()).host.boot_id.unwrap();
    let told = || {
        let folder = HostDir::open_existing(plugins.join(UNITS_DIR)).ok()??;
        let file = UnitsFile::load(&folder, &boot_id).ok()??;
        Some(file.units.iter().map(|unit| (unit.id.clone(), unit.healthy)).collect::<Vec<_>>())
    };
    let wanted = Some(vec![("0000:41:00.0".to_owned(), true)]);
    let deadline = Instant::now() + PATIENCE;
    while told().map(|units| units.into_iter().filter(|(_, healthy)| *healthy).collect()) != wanted {
        assert!(Instant::now() < deadline, "{:?}", told());
        sleep(Duration::from_millis(10)).await;
    }
    assert!(readiness.is_ready(), "observing, it does its work");
    let page = metrics.encode().unwrap();
    assert!(page.contains("ccnode_plugin_units{"), "{page}");
    assert!(!page.contains("ccnode_plugin_registered{"), "what is not to be registered is not missed: {page}");
    shutdown.trigger();
    task.await.unwrap().unwrap();
    // It has ended: whatever it would have done is done.
    assert_eq!(kubelet.dump()["resources"].as_object().map_or(0, serde_json::Map::len), 0, "{:#}", kubelet.dump());
    let sockets = std::fs::read_dir(&plugins).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let strange: Vec<String> = sockets.filter(|name| !["kubelet.sock", "ccnode"].contains(&&**name)).collect();
    assert!(strange.iter().all(|name| name.contains("checkpoint")), "{strange:?}");
    for path in [cdi, features, fake.path().join("state")] {
        let is_empty = std::fs::read_dir(&path).map_or(true, |mut entries| entries.next().is_none());
        assert!(is_empty && !path.is_file(), "{} was written to", path.display());
    }
}
