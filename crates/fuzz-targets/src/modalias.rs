//! A device's modalias and a kernel's `modules.alias`.

use vfio_manager::modalias::{GENERIC, VfioAliases};

/// The first line is the device's modalias, the others are `modules.alias`. What is chosen stands there, fits and is a
/// module's name.
pub fn modalias(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (device, list) = text.split_once('\n').unwrap_or((&text, ""));
    // With the last line's end, which is part of it: what is added below must not change that line.
    let list = format!("{list}\n");
    let aliases = VfioAliases::parse(&list);
    let found = aliases.module_for(device);
    assert_eq!(aliases.choose(Some(device)), found.unwrap_or(GENERIC));
    assert_eq!(aliases.choose(None), GENERIC);
    let fits = |line: &&str| {
        let pattern = line.strip_prefix("alias vfio_pci:").and_then(|line| line.split(' ').next());
        let wanted = device.split_once(':').map(|(_, fields)| fields.trim_end().to_ascii_lowercase());
        pattern.zip(wanted).is_some_and(|(pattern, wanted)| glob(&pattern.to_ascii_lowercase(), &wanted))
    };
    if let Some(module) = found {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        assert!(module.starts_with(|c: char| c.is_ascii_alphanumeric()) && module.chars().all(plain), "{module:?}");
        let says = |line: &&str| line.split(' ').nth(2) == Some(module);
        assert!(list.lines().any(|line| fits(&line) && says(&line)), "{module} fits no line");
    }
    // A line for every device leaves none without.
    let every = format!("{list}alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n");
    let with_every = VfioAliases::parse(&every);
    match (with_every.module_for(device), found) {
        (now, Some(before)) => assert_eq!(now, Some(before), "a wider line goes before a narrower one"),
        (Some(now), None) => assert_eq!(now, "vfio_pci"),
        (None, None) => {
            let fields = "v00000000d00000000sv00000000sd00000000bc00sc00i00";
            let shape =
                |text: &str| text.trim_end().len() == fields.len() && glob("v*d*sv*sd*bc*sc*i*", text.trim_end());
            let digits = |text: &str| {
                let cut = |range: std::ops::Range<usize>| {
                    text.get(range).is_some_and(|part| part.bytes().all(|byte| byte.is_ascii_hexdigit()))
                };
                [1..9, 10..18, 20..28, 30..38, 40..42, 44..46, 47..49].into_iter().all(cut)
            };
            let whole = device.split_once(':').is_some_and(|(_, text)| shape(text) && digits(text) && names(text));
            assert!(!whole, "{device:?} is a whole modalias and gets no module");
        }
    }
}

/// Whether the names of the fields are where they belong.
fn names(text: &str) -> bool {
    [(0, "v"), (9, "d"), (18, "sv"), (28, "sd"), (38, "bc"), (42, "sc"), (46, "i")]
        .into_iter()
        .all(|(at, name)| text.get(at..).is_some_and(|rest| rest.starts_with(name)))
}

/// As fnmatch(3) with `*` alone, which is how modprobe reads the list.
fn glob(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}
