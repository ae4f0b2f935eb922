//! Just enough of ELF to read a kernel module's `.modinfo`: what it is called, needs and stands for.

/// Facts that a module states about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ModuleInfo {
    /// Modules that must be loaded before it, by name.
    pub(crate) depends: Vec<String>,
    /// Device patterns it serves.
    pub(crate) aliases: Vec<String>,
    /// Kernel release, compiler options and so on, which the loader compares.
    pub(crate) vermagic: String,
}

/// Reads `.modinfo` of a 64-bit little-endian module; `None` if the bytes are no such file.
pub(crate) fn module_info(bytes: &[u8]) -> Option<ModuleInfo> {
    let section = section(bytes, b".modinfo")?;
    let mut info = ModuleInfo::default();
    for entry in section.split(|&byte| byte == 0) {
        let entry = String::from_utf8_lossy(entry);
        let Some((key, value)) = entry.split_once('=') else { continue };
        match key {
            "depends" => info.depends = value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
            "alias" => info.aliases.push(value.to_owned()),
            "vermagic" => value.clone_into(&mut info.vermagic),
            _ => {}
        }
    }
    Some(info)
}

fn section<'a>(bytes: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    // Class 2: 64 bits. Data 1: little endian.
    if bytes.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let table = usize::try_from(number(bytes, 0x28, 8)?).ok()?;
    let entry_size = usize::try_from(number(bytes, 0x3a, 2)?).ok()?;
    let count = usize::try_from(number(bytes, 0x3c, 2)?).ok()?;
    let names_index = usize::try_from(number(bytes, 0x3e, 2)?).ok()?;
    let header = |index: usize| table.checked_add(index.checked_mul(entry_size)?);
    let content = |index: usize| {
        let header = header(index)?;
        let start = usize::try_from(number(bytes, header.checked_add(0x18)?, 8)?).ok()?;
        let size = usize::try_from(number(bytes, header.checked_add(0x20)?, 8)?).ok()?;
        bytes.get(start..start.checked_add(size)?)
    };
    let names = content(names_index)?;
    (0..count).find_map(|index| {
        let name = usize::try_from(number(bytes, header(index)?, 4)?).ok()?;
        let name = names.get(name..)?.split(|&byte| byte == 0).next()?;
        if name == wanted { content(index) } else { None }
    })
}

fn number(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(size)?)?;
    Some(field.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A file with two sections: the names, and `.modinfo`.
    pub(crate) fn module(modinfo: &[u8]) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let mut bytes = b"\x7fELF\x02\x01".to_vec();
        bytes.resize(0x40, 0);
        let (names_at, info_at) = (bytes.len(), bytes.len() + names.len());
        bytes.extend_from_slice(names);
        bytes.extend_from_slice(modinfo);
        let table = bytes.len();
        for (name, at, size) in [(1u32, info_at, modinfo.len()), (10, names_at, names.len())] {
            let mut header = [0; 0x40];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        bytes[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        bytes[0x3a..0x3c].copy_from_slice(&0x40u16.to_le_bytes());
        bytes[0x3c..0x3e].copy_from_slice(&2u16.to_le_bytes());
        bytes[0x3e..0x40].copy_from_slice(&1u16.to_le_bytes());
        bytes
    }

    #[test]
    fn a_module_tells_what_it_needs_and_serves() {
        let bytes =
            module(b"license=GPL\0alias=vfio_pci:v*\0alias=x\0depends=vfio-pci-core,irqbypass\0vermagic=6.12.1 SMP \0");
        let info = module_info(&bytes).unwrap();
        assert_eq!(info.depends, ["vfio-pci-core", "irqbypass"]);
        assert_eq!(info.aliases, ["vfio_pci:v*", "x"]);
        assert_eq!(info.vermagic, "6.12.1 SMP ");
        assert_eq!(module_info(&module(b"depends=\0")).unwrap().depends, [""; 0]);
    }

    #[test]
    fn no_byte_string_upsets_the_reader() {
        let good = module(b"depends=a\0");
        for cut in 0..good.len() {
            // Any answer will do, as long as there is one.
            let _ = module_info(&good[..cut]);
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] = 0xff;
            let _ = module_info(&bad);
        }
        assert_eq!(module_info(b"\x7fELF\x01\x01"), None);
        assert_eq!(module_info(b""), None);
    }
}
