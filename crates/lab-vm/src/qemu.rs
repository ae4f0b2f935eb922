//! QEMU's command line, and its control connection (QMP).

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::topology::{Device, Place, Topology};
use crate::wire::PORT_NAME;

/// Everything that the command line depends on.
pub(crate) struct Machine<'a> {
    pub(crate) topology: &'a Topology,
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a Path,
    pub(crate) memory_mib: u64,
    /// Added to the kernel's command line.
    pub(crate) append: &'a str,
    pub(crate) console: &'a Path,
    /// Sockets that we listen on and QEMU connects to.
    pub(crate) agent: &'a Path,
    pub(crate) qmp: &'a Path,
    /// The virtual devices' sockets, in the topology's order.
    pub(crate) devices: &'a [&'a Path],
}

/// A bus of one machine with several host bridges: `0..=255`, of which the first ones are for `pcie.0`.
const FIRST_PXB_BUS: u32 = 32;

/// The arguments of virtual-gpu-rig section 4, for any topology.
pub(crate) fn arguments(machine: &Machine<'_>) -> Vec<OsString> {
    let Machine { topology, kernel, initrd, memory_mib, append, console, agent, qmp, devices } = machine;
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
    let numa = topology.numa_nodes();
    let cpus = topology.vm.cpus;

    add(&["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", &cpus.to_string()]);
    add(&["-m", &memory_mib.to_string()]);
    // Nothing on the bus that we did not put there.
    add(&["-nodefaults", "-display", "none"]);
    // With panic=-1 below: a kernel panic ends the run instead of hanging it.
    add(&["-no-reboot"]);
    // Nobody cleans up after a lab that was killed.
    add(&["-run-with", "exit-with-parent=on"]);
    // Without caching mode QEMU gives up while booting: it could not follow the guest's DMA mappings.
    if topology.vm.iommu {
        add(&["-device", "intel-iommu,intremap=on,caching-mode=on"]);
    }
    // Native PCIe hotplug. With ACPI's, root ports never show an active link, and bus resets fail for it.
    add(&["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]);

    for node in 0..numa {
        // Memory split evenly, rounded down; the rest goes to the first node. CPUs round robin.
        let part = memory_mib / u64::from(numa);
        let size = if node == 0 { memory_mib - part * (u64::from(numa) - 1) } else { part };
        let cpus: String =
            (0..cpus).filter(|cpu| cpu % numa == node).map(|cpu| format!(",cpus={cpu}")).collect::<Vec<_>>().concat();
        add(&["-object", &format!("memory-backend-ram,id=mem{node},size={size}M")]);
        add(&["-numa", &format!("node,nodeid={node},memdev=mem{node}{cpus}")]);
        let bus = FIRST_PXB_BUS + node * ((256 - FIRST_PXB_BUS) / numa);
        add(&["-device", &format!("pxb-pcie,id=numa{node},bus=pcie.0,bus_nr={bus},numa_node={node}")]);
    }

    let mut chassis = 0;
    let mut port = |driver: &str, id: &str, bus: &str, more: &str| {
        chassis += 1;
        format!("{driver},id={id},bus={bus},chassis={chassis},slot={chassis}{more}")
    };
    let host_bridge = |numa: Option<u32>| numa.map_or("pcie.0".to_owned(), |node| format!("numa{node}"));
    for switch in &topology.switches {
        let name = &switch.name;
        add(&["-device", &port("pcie-root-port", &format!("rp-{name}"), &host_bridge(switch.numa), "")]);
        add(&["-device", &format!("x3130-upstream,id=up-{name},bus=rp-{name}")]);
    }
    for (index, (device, socket)) in topology.devices.iter().zip(*devices).enumerate() {
        let bus = bus(topology, device);
        match &device.place {
            Place::RootPort { numa } => add(&["-device", &port("pcie-root-port", &bus, &host_bridge(*numa), "")]),
            Place::Switch { name: switch } => {
                let below = |other: &&Device| other.place == device.place;
                let nth = topology.devices[..index].iter().filter(below).count();
                let shared = topology.switches.iter().any(|known| known.name == *switch && known.shared_group);
                // These ports have no access control (ACS): as functions of one slot all behind them are one group;
                // in slots of their own the groups are apart.
                let address = match (shared, nth) {
                    (true, 0) => ",addr=0.0,multifunction=on".to_owned(),
                    (true, nth) => format!(",addr=0.{nth:x}"),
                    (false, nth) => format!(",addr={nth:x}.0"),
                };
                add(&["-device", &port("xio3130-downstream", &bus, &format!("up-{switch}"), &address)]);
            }
            Place::Function { .. } => {}
        }
        if !device.absent {
            add(&["-device", &options(topology, device, socket).to_string()]);
        }
    }

    // Where there are several host bridges, QEMU may put a virtio device on one where it cannot be: hence the bus.
    add(&["-device", "virtio-serial-pci,bus=pcie.0", "-device"]);
    add(&[&format!("virtserialport,chardev=agent,name={PORT_NAME}")]);
    // The host's 127.0.0.1 is the guest's 10.0.2.2. No boot ROM: the kernel is given.
    add(&["-netdev", "user,id=net0", "-device", "virtio-net-pci,bus=pcie.0,netdev=net0,romfile="]);
    add(&["-serial", "chardev:console", "-mon", "chardev=qmp,mode=control"]);
    for (kind, path) in [("file,id=console", console), ("socket,id=agent", agent), ("socket,id=qmp", qmp)] {
        arguments.push("-chardev".into());
        arguments.push(with_path(kind, path));
    }
    arguments.push("-kernel".into());
    arguments.push((*kernel).into());
    arguments.push("-initrd".into());
    arguments.push((*initrd).into());
    arguments.push("-append".into());
    let own = &topology.vm.command_line;
    let iommu = if topology.vm.iommu { "intel_iommu=on " } else { "" };
    // The kernel counts ticks by its clock to see whether the timer works, and panics if too few came: on a busy machine an
    // emulated one is late and not broken.
    let line = format!("console=ttyS0 panic=-1 loglevel=4 no_timer_check {iommu}{own} {append}");
    arguments.push(line.trim_end().into());
    arguments
}

/// The port that a device is plugged into.
fn bus(topology: &Topology, device: &Device) -> String {
    let name = &device.spec.name;
    match &device.place {
        Place::RootPort { .. } => format!("rp-{name}"),
        Place::Switch { .. } => format!("dp-{name}"),
        Place::Function { of, .. } => match topology.devices.iter().find(|other| other.spec.name == *of) {
            Some(Device { place: Place::Switch { .. }, .. }) => format!("dp-{of}"),
            _ => format!("rp-{of}"),
        },
    }
}

/// What QEMU is told of a device when it is plugged in.
pub(crate) fn options(topology: &Topology, device: &Device, socket: &Path) -> Value {
    // A reply later than x-msg-timeout costs the device for good, and the default is 5 s.
    let mut options = json!({
        "driver": "vfio-user-pci",
        "id": device.spec.name,
        "bus": bus(topology, device),
        "x-msg-timeout": 30000,
        "socket": { "type": "unix", "path": socket.to_string_lossy() },
    });
    if let Place::Function { number, .. } = device.place {
        options["addr"] = format!("0.{number:x}").into();
    } else if topology.shares_slot(device) {
        options["addr"] = "0.0".into();
        options["multifunction"] = true.into();
    }
    options
}

/// `kind,path=…`, with commas doubled as QEMU's option syntax wants it.
fn with_path(kind: &str, path: &Path) -> OsString {
    let mut text = format!("{kind},path=").into_bytes();
    for &byte in path.as_os_str().as_bytes() {
        text.push(byte);
        if byte == b',' {
            text.push(byte);
        }
    }
    OsString::from_vec(text)
}

/// The control connection.
pub(crate) struct Qmp {
    reader: BufReader<UnixStream>,
    partial: Vec<u8>,
    events: Vec<Value>,
}

/// QEMU answers at once; a longer silence means it hangs.
const ANSWER: Duration = Duration::from_secs(10);

impl Qmp {
    /// Takes QEMU's greeting and leaves negotiation behind.
    pub(crate) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(ANSWER))?;
        let mut qmp = Self { reader: BufReader::new(stream), partial: Vec::new(), events: Vec::new() };
        let greeting = qmp.message(Instant::now() + ANSWER)?;
        if greeting.get("QMP").is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("Not QEMU's greeting: {greeting}")));
        }
        qmp.execute(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(qmp)
    }

    /// Sends a command, and returns what it returns.
    pub(crate) fn execute(&mut self, command: &Value) -> io::Result<Value> {
        let mut line = command.to_string().into_bytes();
        line.push(b'\n');
        self.reader.get_mut().write_all(&line)?;
        let deadline = Instant::now() + ANSWER;
        loop {
            let mut message = self.message(deadline)?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                return Err(io::Error::other(error["desc"].as_str().unwrap_or("No description").to_owned()));
            }
            self.events.push(message);
        }
    }

    /// Waits for an event by name; events before it are kept for later.
    pub(crate) fn wait_event(&mut self, name: &str, timeout: Duration) -> io::Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at));
            }
            let message = self.message(deadline)?;
            self.events.push(message);
        }
    }

    fn message(&mut self, deadline: Instant) -> io::Result<Value> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "QEMU does not answer in time"));
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            match self.reader.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "QEMU has closed the connection")),
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    return serde_json::from_slice(&line).map_err(io::Error::from);
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Finds a device by its id in the answer to `query-pci`: its address in the guest, `0000:bb:dd.f`.
pub(crate) fn find_address(answer: &Value, id: &str) -> Option<String> {
    let buses = answer.as_array()?;
    buses.iter().find_map(|bus| in_bus(bus, id))
}

fn in_bus(bus: &Value, id: &str) -> Option<String> {
    bus.get("devices")?.as_array()?.iter().find_map(|device| {
        if device["qdev_id"] == id {
            let number = |field: &str| device[field].as_u64();
            return Some(format!("0000:{:02x}:{:02x}.{:x}", number("bus")?, number("slot")?, number("function")?));
        }
        in_bus(device.get("pci_bridge")?, id)
    })
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn line(text: &str) -> Vec<String> {
        let topology = Topology::parse("t", text).unwrap();
        let sockets: Vec<_> = topology.devices.iter().map(|device| format!("/run/{}.sock", device.spec.name)).collect();
        let sockets: Vec<&Path> = sockets.iter().map(Path::new).collect();
        let machine = Machine {
            topology: &topology,
            kernel: Path::new("/k"),
            initrd: Path::new("/i"),
            memory_mib: 1001,
            append: "lab.modules=none",
            console: Path::new("/run/a,b/console"),
            agent: Path::new("/run/agent"),
            qmp: Path::new("/run/qmp"),
            devices: &sockets,
        };
        arguments(&machine).into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    fn devices(words: &[String]) -> Vec<&str> {
        let pairs = words.windows(2).filter(|pair| pair[0] == "-device");
        pairs.map(|pair| pair[1].as_str()).filter(|word| !word.contains("virt") && !word.contains("iommu")).collect()
    }

    #[test]
    fn a_device_gets_a_port_and_its_socket() {
        let words = line("[[device]]\nname = 'a'\nmodel = 'h100'\n");
        let expected = r#"{"bus":"rp-a","driver":"vfio-user-pci","id":"a","socket":{"path":"/run/a.sock","type":"unix"},"x-msg-timeout":30000}"#;
        assert_eq!(devices(&words), ["pcie-root-port,id=rp-a,bus=pcie.0,chassis=1,slot=1", expected]);
        let joined = words.join(" ");
        for part in [
            "-m 1001 ",
            "-device intel-iommu,intremap=on,caching-mode=on ",
            "-global ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off ",
            "-chardev file,id=console,path=/run/a,,b/console ",
            "-device virtserialport,chardev=agent,name=ccnode.lab.0 ",
            "-no-reboot ",
        ] {
            assert!(joined.contains(part), "{part}: {joined}");
        }
        assert!(
            joined
                .ends_with("-append console=ttyS0 panic=-1 loglevel=4 no_timer_check intel_iommu=on  lab.modules=none"),
            "{joined}"
        );
        assert!(!joined.contains("-numa"));
    }

    #[test]
    fn numa_nodes_have_memory_cpus_and_a_host_bridge_each() {
        let device = |name: &str, more: &str| format!("[[device]]\nname = '{name}'\nmodel = 'h100'\n{more}\n");
        let words = line(
            &("[vm]\ncpus = 3\n".to_owned() + &device("a", "numa = 0") + &device("b", "numa = 1") + &device("c", "")),
        );
        let ports: Vec<_> =
            devices(&words).into_iter().filter(|word| !word.starts_with('{')).map(str::to_owned).collect();
        assert_eq!(
            ports,
            [
                "pxb-pcie,id=numa0,bus=pcie.0,bus_nr=32,numa_node=0",
                "pxb-pcie,id=numa1,bus=pcie.0,bus_nr=144,numa_node=1",
                "pcie-root-port,id=rp-a,bus=numa0,chassis=1,slot=1",
                "pcie-root-port,id=rp-b,bus=numa1,chassis=2,slot=2",
                "pcie-root-port,id=rp-c,bus=pcie.0,chassis=3,slot=3",
            ]
        );
        let joined = words.join(" ");
        assert!(
            joined.contains("memory-backend-ram,id=mem0,size=501M -numa node,nodeid=0,memdev=mem0,cpus=0,cpus=2 "),
            "{joined}"
        );
        assert!(
            joined.contains("memory-backend-ram,id=mem1,size=500M -numa node,nodeid=1,memdev=mem1,cpus=1 "),
            "{joined}"
        );
    }

    #[test]
    fn switch_ports_share_a_slot_only_when_asked_to() {
        let device = |name: &str| format!("[[device]]\nname = '{name}'\nmodel = 'h100'\nswitch = 's'\n");
        for (shared, first, second) in
            [(true, "addr=0.0,multifunction=on", "addr=0.1"), (false, "addr=0.0", "addr=1.0")]
        {
            let words =
                line(&(format!("[[switch]]\nname = 's'\nshared_group = {shared}\n") + &device("a") + &device("b")));
            let ports: Vec<_> =
                devices(&words).into_iter().filter(|word| !word.starts_with('{')).map(str::to_owned).collect();
            assert_eq!(
                ports,
                [
                    "pcie-root-port,id=rp-s,bus=pcie.0,chassis=1,slot=1".to_owned(),
                    "x3130-upstream,id=up-s,bus=rp-s".to_owned(),
                    format!("xio3130-downstream,id=dp-a,bus=up-s,chassis=2,slot=2,{first}"),
                    format!("xio3130-downstream,id=dp-b,bus=up-s,chassis=3,slot=3,{second}"),
                ]
            );
        }
    }

    #[test]
    fn functions_of_a_slot_sit_on_one_port() {
        let words = line(
            "[[device]]\nname = 'g'\nmodel = 'rtx-pro-6000'\n\
             [[device]]\nname = 'a'\nmodel = 'rtx-pro-6000-audio'\nfunction_of = 'g'\n",
        );
        let found = devices(&words);
        assert_eq!(found[0], "pcie-root-port,id=rp-g,bus=pcie.0,chassis=1,slot=1");
        let [gpu, audio]: [Value; 2] = [found[1], found[2]].map(|word| serde_json::from_str(word).unwrap());
        assert_eq!([&gpu["bus"], &gpu["addr"], &gpu["multifunction"]], [&json!("rp-g"), &json!("0.0"), &json!(true)]);
        assert_eq!(
            [&audio["bus"], &audio["addr"], &audio["multifunction"]],
            [&json!("rp-g"), &json!("0.1"), &Value::Null]
        );
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn an_absent_device_has_its_port_all_the_same() {
        let words = line("[[device]]\nname = 'a'\nmodel = 'h100'\nabsent = true\n");
        assert_eq!(devices(&words), ["pcie-root-port,id=rp-a,bus=pcie.0,chassis=1,slot=1"]);
    }

    #[test]
    fn a_machine_can_be_without_an_iommu() {
        let joined = line("[vm]\niommu = false\n").join(" ");
        assert!(!joined.contains("iommu"), "{joined}");
    }

    #[test]
    fn addresses_are_found_behind_bridges() {
        let answer = json!([{ "bus": 0, "devices": [
            { "qdev_id": "", "bus": 0, "slot": 0, "function": 0 },
            { "qdev_id": "rp-a", "bus": 0, "slot": 2, "function": 0, "pci_bridge": { "bus": {}, "devices": [
                { "qdev_id": "a", "bus": 33, "slot": 0, "function": 1 },
            ] } },
        ] }]);
        assert_eq!(find_address(&answer, "a").as_deref(), Some("0000:21:00.1"));
        assert_eq!(find_address(&answer, "b"), None);
        assert_eq!(find_address(&json!({}), "a"), None);
        assert_eq!(find_address(&json!([{ "devices": [{ "qdev_id": "a", "bus": "x" }] }]), "a"), None);
    }

    #[test]
    fn the_control_connection_answers_and_keeps_events() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let qemu = thread::spawn(move || {
            theirs.write_all(b"{\"QMP\": {}}\r\n").unwrap();
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            for answer in [
                "{\"return\": {}}\n",
                "{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"a\"}}\n{\"return\": {\"x\": 1}}\n",
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"Device 'b' not found\"}}\n",
            ] {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                theirs.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut qmp = Qmp::new(ours).unwrap();
        assert_eq!(qmp.execute(&json!({ "execute": "query" })).unwrap(), json!({ "x": 1 }));
        assert_eq!(qmp.execute(&json!({ "execute": "device_del" })).unwrap_err().to_string(), "Device 'b' not found");
        qemu.join().unwrap();
        assert_eq!(qmp.wait_event("DEVICE_DELETED", Duration::ZERO).unwrap()["data"]["device"], "a");
        let gone = qmp.wait_event("DEVICE_DELETED", Duration::from_secs(5)).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::UnexpectedEof);
    }
}
