//! What is known of the mode of each device, from where, and since when.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;

use agent_core::hostfile::HostDir;
use agent_core::state::{DevicesFile, state_dir};
use agent_core::text::chain;
use gpu_firmware::{
    Access, Device, Effective, Error, Fault, Holder, KnobState, Mode, Observed, OwnedDevice, Ownership, Places, Support,
};
use hw_probe::{Bdf, Holders, PciFunction, SysRoot};
use jiff::Timestamp;
use serde::Serialize;

use super::peek;

/// Where a fact comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The device table: a model that cannot be anything else.
    Model,
    /// The device's status register, read from a device that nobody uses.
    Register,
    /// The device itself, under ownership.
    Device,
    /// The last verified record of this boot: it was so then.
    Record,
}

/// A fact, or why it is not known.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fact<T> {
    /// The fact; none when it is not known.
    pub value: Option<T>,
    /// Where it comes from.
    pub source: Option<Source>,
    /// When it was so.
    pub at: Option<Timestamp>,
    /// Why it is not known.
    pub reason: Option<String>,
}

impl<T> Fact<T> {
    fn known(value: T, source: Source, at: Timestamp) -> Self {
        Self { value: Some(value), source: Some(source), at: Some(at), reason: None }
    }

    /// A fact that never changes.
    fn always(value: T) -> Self {
        Self { value: Some(value), source: Some(Source::Model), at: None, reason: None }
    }

    fn unknown(reason: impl Into<String>) -> Self {
        Self { value: None, source: None, at: None, reason: Some(reason.into()) }
    }
}

/// The word for knobs that are the complete vector of no mode.
pub const INCOMPLETE: &str = "incomplete";

/// What is known of one device.
#[derive(Clone, Debug)]
pub struct Look {
    /// The device.
    pub function: PciFunction,
    /// The mode it booted with.
    pub active: Fact<Effective>,
    /// The mode that its knobs ask for at the next reset, or [`INCOMPLETE`].
    pub configured: Fact<&'static str>,
    /// The knobs that have to do with modes.
    pub knobs: Fact<Vec<KnobState>>,
    /// The knobs that say whether the host may change those; 0 forbids it.
    pub permissions: Fact<Vec<KnobState>>,
    /// Why it could not be owned or read.
    pub error: Option<Error>,
}

impl Look {
    /// The knobs as far as they are known: as they were read, or those that the configured mode is made of.
    pub fn known_knobs(&self) -> Vec<KnobState> {
        if let Some(knobs) = &self.knobs.value {
            return knobs.clone();
        }
        let mode = self.configured.value.and_then(|mode| mode.parse::<Mode>().ok());
        let Some((mode, support)) = mode.zip(Support::of(&self.function).ok()) else { return Vec::new() };
        let vector = gpu_firmware::vector(support.chip, mode);
        vector.into_iter().map(|(knob, value)| KnobState { knob, value: Some(value) }).collect()
    }
}

/// The records of this boot, or why there are none.
#[derive(Debug)]
pub struct Records(Result<DevicesFile, String>);

impl Records {
    /// Reads `devices.json`.
    pub fn read(root: &Path, boot_id: Option<&str>) -> Self {
        let Some(boot_id) = boot_id else { return Self(Err("the kernel's boot id cannot be read".into())) };
        let file = HostDir::open_existing(state_dir(root)).map_err(Into::into).and_then(|dir| match dir {
            Some(dir) => DevicesFile::load(&dir, boot_id),
            None => Ok(None),
        });
        Self(match file {
            Ok(Some(DevicesFile { transition: Some(under_way), .. })) => Err(format!(
                "a change to {} was begun at {} and has not ended",
                under_way.target,
                clock(under_way.started_at)
            )),
            Ok(Some(file)) => Ok(file),
            Ok(None) => Err("there is no record of this boot".into()),
            Err(error) => Err(format!("the records cannot be read: {}", chain(&error))),
        })
    }

    /// What the record says was verified: active mode, configured mode, and when.
    fn verified(&self, function: &PciFunction) -> Result<(Effective, Mode, Timestamp), String> {
        let file = self.0.as_ref().map_err(Clone::clone)?;
        let record = file.record(function).ok_or("there is no record of this device")?;
        let (Some(active), Some(configured), Some(at)) =
            (&record.active_mode, &record.configured_mode, record.verified_at)
        else {
            return Err(match &record.error {
                Some(error) => format!("the last change failed: {}", error.message),
                None => "it was not verified in this boot".into(),
            });
        };
        let unknown = |text: &str| format!("the record has a mode {text:?}, which this version does not know");
        let words = [Effective::Off, Effective::On, Effective::Devtools, Effective::Ppcie];
        let word = words.into_iter().find(|word| word.as_str() == active).ok_or_else(|| unknown(active))?;
        Ok((word, configured.parse().map_err(|_| unknown(configured))?, at))
    }
}

/// A time for people: UTC, to the second.
pub fn clock(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

const NEEDS_OWNERSHIP: &str = "it is read under ownership alone (--own)";

/// Who is seen to have the device, without opening anything.
fn user(function: &PciFunction, holders: &Holders) -> Option<Error> {
    let in_use = |driver, group, holders| Error::new(function.bdf, Fault::InUse { driver, group, holders });
    let (driver, group) = (function.driver.clone()?, function.iommu_group);
    if !function.is_vfio_bound() {
        return Some(in_use(Some(driver), None, Vec::new()));
    }
    let group_node = group.map(|group| format!("/dev/vfio/{group}"));
    let cdev_node = function.vfio_cdev.as_ref().map(|cdev| format!("/dev/vfio/devices/{}", cdev.name));
    let is_its = |node: &String| Some(node) == group_node.as_ref() || Some(node) == cdev_node.as_ref();
    let its: Vec<_> = holders.list.iter().filter(|holder| is_its(&holder.node)).collect();
    if its.is_empty() {
        return None;
    }
    // A bundle names processes without their ids.
    let named = |holder: &&hw_probe::Holder| Some(Holder { pid: holder.pid?, comm: holder.comm.clone() });
    Some(in_use(None, group, its.iter().filter_map(named).collect()))
}

/// How far a look without side effects goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// The records and sysfs: no device is touched.
    Records,
    /// Also the status register of a device that nobody uses.
    Registers,
}

/// Looks at a device without side effects.
pub fn passively(root: &SysRoot, function: &PciFunction, holders: &Holders, records: &Records, sight: Sight) -> Look {
    let function = function.clone();
    let model = function.model.as_ref();
    if model.is_some_and(|model| !model.cc_query && !model.ppcie) && !function.is_virtual_function {
        let none = || Fact::unknown("this model has no such knobs");
        let (active, configured) = (Fact::always(Effective::Off), Fact::always(Mode::Off.as_str()));
        return Look { function, active, configured, knobs: none(), permissions: none(), error: None };
    }
    let support = match Support::of(&function) {
        Ok(support) => support,
        Err(fault) => return unreadable(function.clone(), Error::new(function.bdf, fault)),
    };
    let error = user(&function, holders);
    let record = records.verified(&function);
    let configured = match &record {
        Ok((_, mode, at)) => Fact::known(mode.as_str(), Source::Record, *at),
        Err(reason) => Fact::unknown(format!("{NEEDS_OWNERSHIP}, and {reason}")),
    };
    let read = match (&error, sight) {
        (Some(error), _) => Err(error.fault.to_string()),
        (None, Sight::Records) => Err("its register was not read".into()),
        (None, Sight::Registers) => peek::active(root, &function, holders, support.chip),
    };
    let active = match (read, record) {
        (Ok(active), _) => Fact::known(active, Source::Register, Timestamp::now()),
        (Err(_), Ok((active, _, at))) => Fact::known(active, Source::Record, at),
        (Err(reason), Err(also)) => Fact::unknown(format!("{reason}, and {also}")),
    };
    let knobs = Fact::unknown(NEEDS_OWNERSHIP);
    Look { function, active, configured, knobs, permissions: Fact::unknown(NEEDS_OWNERSHIP), error }
}

/// A device that could not be owned or read.
fn unreadable(function: PciFunction, error: Error) -> Look {
    let reason = error.fault.to_string();
    Look {
        function,
        active: Fact::unknown(&*reason),
        configured: Fact::unknown(&*reason),
        knobs: Fact::unknown(&*reason),
        permissions: Fact::unknown(&*reason),
        error: Some(error),
    }
}

/// Owns the devices and asks them, also whether they can be brought to `target`. One that cannot be had keeps what is known
/// of it, with the error, and hinders no other. Nothing is reset: no VFIO device is opened, which would do so and activate
/// staged knobs.
pub fn owning(places: Places, looks: Vec<Look>, target: Option<Mode>) -> Vec<Look> {
    let places = &places.with_access(Access::Sysfs);
    // A group has one owner, so its devices are owned together.
    let mut parties: BTreeMap<(Option<u32>, Option<Bdf>), Vec<PciFunction>> = BTreeMap::new();
    for look in &looks {
        let function = &look.function;
        if Support::of(function).is_ok() {
            let alone = function.iommu_group.is_none().then_some(function.bdf);
            parties.entry((function.iommu_group, alone)).or_default().push(function.clone());
        }
    }
    let mut found: BTreeMap<Bdf, Answer> = BTreeMap::new();
    let mut owned = Vec::new();
    for functions in parties.into_values() {
        match Ownership::take(&functions, places) {
            Ok(ownership) => owned.push(ownership),
            Err(refused) => {
                // The whole party is not ours; those without an error of their own suffer from the first one's.
                for function in &functions {
                    let own = refused.0.iter().find(|error| error.bdf == function.bdf).or(refused.0.first());
                    if let Some(error) = own {
                        found.insert(function.bdf, Answer::Nothing(error.clone()));
                    }
                }
            }
        }
    }
    let devices = owned.iter().flat_map(Ownership::devices);
    thread::scope(|scope| {
        let threads: Vec<_> = devices
            .map(|device| (device.bdf(), scope.spawn(move || ask(device, target).unwrap_or_else(Answer::Nothing))))
            .collect();
        for (bdf, thread) in threads {
            let interrupted = || Fault::Interrupted { what: "its thread panicked".into() };
            let answer = thread.join().unwrap_or_else(|_| Answer::Nothing(Error::new(bdf, interrupted())));
            found.insert(bdf, answer);
        }
    });
    looks.into_iter().map(|look| with_answer(look, &mut found)).collect()
}

/// What came of asking a device.
enum Answer {
    /// Everything, and why it cannot be brought to the target, if it cannot.
    All(Observed, Vec<KnobState>, Option<Error>),
    Nothing(Error),
}

fn ask(device: &OwnedDevice, target: Option<Mode>) -> Result<Answer, Error> {
    let mut opened = Device::open(device)?;
    let (observed, permissions) = (opened.observe()?, opened.permissions()?);
    // A mode that the model has not is the plan's to refuse.
    let target = target.filter(|target| opened.support().target(*target).is_ok());
    let cannot = target.and_then(|target| opened.can_be(target).err());
    Ok(Answer::All(observed, permissions, cannot))
}

fn with_answer(look: Look, found: &mut BTreeMap<Bdf, Answer>) -> Look {
    match found.remove(&look.function.bdf) {
        Some(Answer::All(observed, permissions, error)) => {
            let (at, source) = (Timestamp::now(), Source::Device);
            let configured = observed.configured.map_or(INCOMPLETE, Mode::as_str);
            Look {
                function: look.function,
                active: Fact::known(observed.effective, source, at),
                configured: Fact::known(configured, source, at),
                knobs: Fact::known(observed.knobs, source, at),
                permissions: Fact::known(permissions, source, at),
                error,
            }
        }
        Some(Answer::Nothing(error)) => {
            let reason = error.fault.to_string();
            let (knobs, permissions) = (Fact::unknown(&*reason), Fact::unknown(&*reason));
            Look { knobs, permissions, error: Some(error), ..look }
        }
        None => look,
    }
}
