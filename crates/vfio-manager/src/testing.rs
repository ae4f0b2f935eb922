//! A small kernel for the tests: a fake tree in which writes have the effects that they have on a real one.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gpu_firmware::{Places, group_is_free};
use hw_probe::Inventory;
use hw_probe::testing::FakeSysfs;

use crate::executor::{Executor, SysfsWrite};
use crate::manager::Manager;

pub(crate) struct Kernel {
    pub(crate) fake: Arc<FakeSysfs>,
    /// Every write, in the order in which they came.
    pub(crate) writes: Arc<Mutex<Vec<String>>>,
    /// Groups that a virtual machine holds.
    pub(crate) held: Arc<Mutex<BTreeSet<u32>>>,
}

impl Kernel {
    /// One with vfio-pci.
    pub(crate) fn new() -> Self {
        let fake = FakeSysfs::new();
        fake.load_driver("vfio-pci");
        Self::over(fake)
    }

    pub(crate) fn over(fake: FakeSysfs) -> Self {
        // What the lock directory is checked for: nobody else may write there.
        std::fs::create_dir_all(fake.path().join("run")).unwrap();
        Self { fake: Arc::new(fake), writes: Arc::default(), held: Arc::default() }
    }

    pub(crate) fn write(&self) -> SysfsWrite {
        let (fake, writes) = (Arc::clone(&self.fake), Arc::clone(&self.writes));
        Arc::new(move |path, value| {
            let value = value.trim();
            let relative = path.strip_prefix(fake.path()).map_err(io::Error::other)?;
            // One at a time: a tree of files has none of the kernel's own locks.
            let mut writes = writes.lock().unwrap();
            writes.push(format!("{} = {value}", relative.display()));
            let parent = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
            match path.file_name().unwrap_or_default().to_str() {
                Some("driver_override") => {
                    fake.get(parent.as_str()).driver_override(value);
                    Ok(())
                }
                Some("unbind") => fake.unbind(value),
                Some("bind") => fake.bind(value, &parent),
                Some("drivers_probe") => {
                    fake.drivers_probe(value);
                    Ok(())
                }
                _ => Err(io::Error::other("no such file in this kernel")),
            }
        })
    }

    pub(crate) fn executor(&self) -> Executor {
        let places = Places::at(self.fake.root(), "vfio-manager");
        let (lock, write) = (Duration::from_millis(50), Duration::from_millis(200));
        let (held, asked) = (Arc::clone(&self.held), places.clone());
        let executor = Executor::new(places, PathBuf::from("/nonexistent"), lock, write).with_kernel(self.write());
        executor.with_groups(Arc::new(move |group| {
            if held.lock().unwrap().contains(&group) { Ok(false) } else { group_is_free(group, &asked) }
        }))
    }

    /// A manager of this node, with that executor.
    pub(crate) fn manager(&self, executor: Executor) -> Manager {
        let places = Places::at(self.fake.root(), "vfio-manager");
        let host_root = self.fake.path().to_owned();
        let state_dir = agent_core::state::state_dir(&host_root);
        Manager::over(places, host_root, state_dir, executor, Duration::from_millis(50))
    }

    pub(crate) fn inventory(&self) -> Arc<Inventory> {
        Arc::new(Inventory::scan(&self.fake.root()))
    }

    /// The driver of the function at this address.
    pub(crate) fn driver(&self, bdf: &str) -> Option<String> {
        self.inventory().get(bdf.parse().unwrap()).and_then(|function| function.driver.clone())
    }
}
