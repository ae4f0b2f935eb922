//! Keeps `devices.json` true when devices are changed behind cc-manager's back.
//!
//! The file is cc-manager's. Where there is none of this boot, none is made. Where there is one, its records of the devices to
//! be changed are emptied before the first write, so that a killed process leaves no lie, and afterwards say what was verified.
//! Nothing changed here is `usable`: which mode is wanted, and so what may be offered, is cc-manager's to say. It finds the
//! records when it next looks, and leaves alone what is as it wants it.

use std::path::Path;

use agent_core::hostfile::HostDir;
use agent_core::state::{DeviceRecord, DevicesFile, ErrorRecord, Origin, StateError, state_dir};
use gpu_firmware::{DeviceOutcome, Fault};
use hw_probe::Bdf;

/// Says of these devices that nothing is known.
pub(super) fn forget(root: &Path, boot_id: Option<&str>, bdfs: &[Bdf]) -> Result<(), StateError> {
    change(root, boot_id, |record| {
        if bdfs.contains(&record.bdf) {
            empty(record);
            record.error = None;
        }
    })
}

/// Says what became of these devices.
pub(super) fn tell(root: &Path, boot_id: Option<&str>, outcomes: &[DeviceOutcome]) -> Result<(), StateError> {
    change(root, boot_id, |record| {
        let Some(outcome) = outcomes.iter().find(|outcome| outcome.bdf == record.bdf) else { return };
        empty(record);
        match &outcome.result {
            Ok(done) => {
                record.configured_mode = Some(done.mode.to_string());
                record.active_mode = Some(done.effective.to_string());
                record.verified_at = jiff::Timestamp::try_from(done.verified_at).ok();
                record.error = None;
            }
            Err(error) if matches!(*error.fault, Fault::Stopped { .. }) => {}
            Err(error) => {
                record.error = Some(ErrorRecord { code: error.code().to_owned(), message: error.line() });
            }
        }
    })
}

fn empty(record: &mut DeviceRecord) {
    record.configured_mode = None;
    record.active_mode = None;
    record.verified_at = None;
    record.usable = false;
}

fn change(root: &Path, boot_id: Option<&str>, edit: impl Fn(&mut DeviceRecord)) -> Result<(), StateError> {
    // Without a boot id nobody believes the file.
    let Some(boot_id) = boot_id else { return Ok(()) };
    let Some(dir) = HostDir::open_existing(state_dir(root))? else { return Ok(()) };
    let Some(mut file) = DevicesFile::load(&dir, boot_id)? else { return Ok(()) };
    let before = file.devices.clone();
    file.devices.iter_mut().for_each(edit);
    if file.devices == before {
        return Ok(());
    }
    file.origin = Origin::now(boot_id, file.origin.node_uid);
    file.store(&dir)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use agent_core::state::{DEVICES_FILE, Identity, Transition};
    use gpu_firmware::{DeviceDone, Effective, Error, Mode};

    use super::*;

    fn record(bdf: &str) -> DeviceRecord {
        DeviceRecord {
            bdf: bdf.parse().unwrap(),
            identity: Identity::default(),
            configured_mode: Some("on".into()),
            active_mode: Some("on".into()),
            verified_at: Some(jiff::Timestamp::UNIX_EPOCH),
            usable: true,
            error: None,
        }
    }

    const A: &str = "0000:41:00.0";
    const B: &str = "0000:42:00.0";
    const C: &str = "0000:43:00.0";

    #[test]
    fn a_record_is_emptied_first_and_true_afterwards() {
        let root = tempfile::tempdir().unwrap();
        let dir = HostDir::open(state_dir(root.path())).unwrap();
        let under_way = Transition { target: "on".into(), step: "x".into(), started_at: jiff::Timestamp::UNIX_EPOCH };
        let origin = Origin::now("boot", Some("uid".into()));
        let devices = [A, B, C].map(record).to_vec();
        DevicesFile { origin, transition: Some(under_way.clone()), devices }.store(&dir).unwrap();
        let load = || DevicesFile::load(&dir, "boot").unwrap().unwrap();
        let bdfs: Vec<Bdf> = [A, B].iter().map(|bdf| bdf.parse().unwrap()).collect();

        forget(root.path(), Some("boot"), &bdfs).unwrap();
        let file = load();
        for record in &file.devices[..2] {
            assert_eq!((&record.configured_mode, &record.active_mode, record.verified_at), (&None, &None, None));
            assert!(!record.usable);
        }
        assert_eq!(file.devices[2], record(C), "others stay as they are");
        assert_eq!((file.transition, file.origin.node_uid.as_deref()), (Some(under_way), Some("uid")));

        let done = DeviceDone {
            mode: Mode::Off,
            effective: Effective::Off,
            knobs: Vec::new(),
            written: Vec::new(),
            was_reset: true,
            verified_at: SystemTime::UNIX_EPOCH,
            took: Duration::ZERO,
        };
        let failed = Error::new(bdfs[1], Fault::NoBar0);
        let outcomes = [
            DeviceOutcome { bdf: bdfs[0], result: Ok(done) },
            DeviceOutcome { bdf: bdfs[1], result: Err(failed) },
            DeviceOutcome { bdf: C.parse().unwrap(), result: Err(Error::new(bdfs[1], Fault::Stopped { undone: 2 })) },
        ];
        tell(root.path(), Some("boot"), &outcomes).unwrap();
        let [a, b, c] = load().devices.try_into().unwrap();
        assert_eq!((a.configured_mode.as_deref(), a.active_mode.as_deref()), (Some("off"), Some("off")));
        assert_eq!((a.verified_at, a.usable), (Some(jiff::Timestamp::UNIX_EPOCH), false));
        assert_eq!((b.verified_at, b.error.unwrap().code.as_str()), (None, "NoBar0"));
        assert_eq!((c.verified_at, c.usable, c.error), (None, false, None));
    }

    #[test]
    fn no_file_is_made_and_none_of_another_boot_is_touched() {
        let root = tempfile::tempdir().unwrap();
        forget(root.path(), Some("boot"), &[A.parse().unwrap()]).unwrap();
        assert!(!root.path().join("run").exists());
        let dir = HostDir::open(state_dir(root.path())).unwrap();
        DevicesFile { origin: Origin::now("another", None), transition: None, devices: vec![record(A)] }
            .store(&dir)
            .unwrap();
        let bytes = || dir.read(DEVICES_FILE, 1 << 20).unwrap();
        let before = bytes();
        for boot in [Some("boot"), None] {
            forget(root.path(), boot, &[A.parse().unwrap()]).unwrap();
        }
        assert_eq!(bytes(), before);
    }
}
