//! Requests to the device's security processor (FSP) and its replies, as dwords: MCTP packet, NVDM header, PRC command
//! (gpu-cc-protocol sections 4.2 to 4.6).

use crate::error::Fault;
use crate::knob::Knob;

/// MCTP header of a message of one packet: start and end of message, everything else 0.
const MCTP_SINGLE: u32 = START_OF_MESSAGE | END_OF_MESSAGE;
const START_OF_MESSAGE: u32 = 1 << 31;
const END_OF_MESSAGE: u32 = 1 << 30;

/// NVDM type of a PRC command.
const NVDM_PRC: u32 = 0x13;
/// NVDM type of a reply.
const NVDM_REPLY: u32 = 0x15;

/// PRC command: read a knob.
const KNOB_READ: u32 = 0x0c;
/// PRC command: write a knob.
const KNOB_WRITE: u32 = 0x0d;
/// The persistent value of a knob, rather than the one of this boot.
const PERSISTENT: u32 = 2 << 8;

/// Error code: no such knob.
const UNKNOWN_KNOB: u32 = 0x1e3;

/// Dwords before the payload of a reply.
const REPLY_HEADER: usize = 5;

/// NVDM header: vendor-defined PCI message (0x7e) of NVIDIA (0x10de).
const fn nvdm(kind: u32) -> u32 {
    kind << 24 | 0x10de << 8 | 0x7e
}

/// Bit 7 of the NVDM header says whether an integrity check follows; it is not looked at.
const NVDM_INTEGRITY: u32 = 1 << 7;

/// A request about a knob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// What is its value?
    Read(Knob),
    /// Let its value be this.
    Write(Knob, u16),
}

impl Request {
    const fn knob(self) -> Knob {
        match self {
            Self::Read(knob) | Self::Write(knob, _) => knob,
        }
    }

    /// The dwords to send.
    pub(crate) fn dwords(self) -> Vec<u32> {
        let command = |sub| u32::from(self.knob().0) << 16 | PERSISTENT | sub;
        match self {
            Self::Read(_) => vec![MCTP_SINGLE, nvdm(NVDM_PRC), command(KNOB_READ)],
            Self::Write(_, value) => vec![MCTP_SINGLE, nvdm(NVDM_PRC), command(KNOB_WRITE), u32::from(value)],
        }
    }

    /// What a reply says to this request: the knob's value for a read, nothing for a write. A reply of any other shape is
    /// an error, never a value.
    pub(crate) fn reply(self, dwords: &[u32]) -> Result<Option<u16>, Fault> {
        let wrong = |reason| Err(Fault::FspProtocol { reason, dwords: dwords.to_vec() });
        let Some((&[packet, header, _task, answered, error], payload)) = dwords.split_first_chunk::<REPLY_HEADER>()
        else {
            return wrong("it is shorter than a reply's header");
        };
        if packet & MCTP_SINGLE != MCTP_SINGLE {
            return wrong("it is not a message of one packet");
        }
        if header & !NVDM_INTEGRITY != nvdm(NVDM_REPLY) {
            return wrong("it is not of the type reply");
        }
        if answered != NVDM_PRC {
            return wrong("it answers another kind of command");
        }
        match error {
            0 => {}
            UNKNOWN_KNOB => return Err(Fault::KnobUnsupported { knob: self.knob() }),
            error => return Err(Fault::FspError { error, knob: self.knob(), dwords: dwords.to_vec() }),
        }
        match (self, payload) {
            // The high half may hold garbage (section 4.4).
            (Self::Read(_), &[value]) => Ok(Some((value & 0xffff) as u16)),
            (Self::Write(..), []) => Ok(None),
            (Self::Read(_), _) => wrong("a reply to a knob read has exactly one value"),
            (Self::Write(..), _) => wrong("a reply to a knob write has no value"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_the_words_of_section_6_4() {
        let head = [0xc000_0000, 0x1310_de7e];
        let table: [(Request, &[u32]); 10] = [
            (Request::Read(Knob::CCM), &[0x0008_020c]),
            (Request::Write(Knob::CCM, 1), &[0x0008_020d, 1]),
            (Request::Write(Knob::CCM, 0), &[0x0008_020d, 0]),
            (Request::Read(Knob::CCD), &[0x0006_020c]),
            (Request::Read(Knob::BAR0_DECOUPLER), &[0x000a_020c]),
            (Request::Write(Knob::BAR0_DECOUPLER, 2), &[0x000a_020d, 2]),
            (Request::Read(Knob::PPCIE), &[0x002d_020c]),
            (Request::Write(Knob::K34, 0), &[0x0022_020d, 0]),
            (Request::Read(Knob(44)), &[0x002c_020c]),
            (Request::Write(Knob(0xffff), 0xffff), &[0xffff_020d, 0xffff]),
        ];
        for (request, tail) in table {
            assert_eq!(request.dwords(), [&head, tail].concat(), "{request:?}");
        }
    }

    /// The value believed, or the error's code.
    type Expected = Result<Option<u16>, &'static str>;

    #[test]
    fn replies_are_believed_only_in_their_own_shape() {
        let read = Request::Read(Knob::CCM);
        let write = Request::Write(Knob::CCM, 1);
        let table: [(Request, &[u32], Expected); 15] = [
            (read, &[0xc000_0000, 0x1510_de7e, 3, 0x13, 0, 0xdead_0001], Ok(Some(1))),
            (read, &[0xc700_0000, 0x1510_defe, 9, 0x13, 0, 0], Ok(Some(0))),
            (write, &[0xc000_0000, 0x1510_de7e, 3, 0x13, 0], Ok(None)),
            (read, &[0xc000_0000, 0x1510_de7e, 3, 0x13, 0x202], Err("FspError")),
            (read, &[0xc000_0000, 0x1510_de7e, 3, 0x13, 0x1e3], Err("KnobUnsupported")),
            (write, &[0xc000_0000, 0x1510_de7e, 3, 0x13, 0x1e3, 0], Err("KnobUnsupported")),
            (read, &[], Err("FspProtocol")),
            (read, &[0xc000_0000, 0x1510_de7e, 3, 0x13], Err("FspProtocol")),
            (read, &[0xc000_0000, 0x1510_de7e, 3, 0x13, 0], Err("FspProtocol")),
            (read, &[0xc000_0000, 0x1510_de7e, 3, 0x13, 0, 1, 1], Err("FspProtocol")),
            (write, &[0xc000_0000, 0x1510_de7e, 3, 0x13, 0, 1], Err("FspProtocol")),
            (read, &[0xc000_0000, 0x1310_de7e, 3, 0x13, 0, 1], Err("FspProtocol")),
            (read, &[0xc000_0000, 0x1510_de7e, 3, 0x14, 0, 1], Err("FspProtocol")),
            (read, &[0x8000_0000, 0x1510_de7e, 3, 0x13, 0, 1], Err("FspProtocol")),
            (read, &[u32::MAX; 6], Err("FspProtocol")),
        ];
        for (request, dwords, expected) in table {
            let found = request.reply(dwords).map_err(|fault| fault.code());
            assert_eq!(found, expected, "{dwords:x?}");
        }
    }

    proptest! {
        #[test]
        fn no_reply_of_a_wrong_shape_is_believed(dwords in prop::collection::vec(any::<u32>(), 0..12), write: bool) {
            let request = if write { Request::Write(Knob::CCM, 1) } else { Request::Read(Knob::CCM) };
            if let Ok(value) = request.reply(&dwords) {
                prop_assert_eq!(dwords.len(), if write { 5 } else { 6 });
                prop_assert_eq!(value.is_none(), write);
                prop_assert_eq!((dwords[1] | 0x80, dwords[3], dwords[4]), (0x1510_defe, 0x13, 0));
            }
        }

        #[test]
        fn near_misses_are_not_believed(at in 0_usize..5, bit in 0_u32..32) {
            let mut dwords = vec![0xc000_0000, 0x1510_de7e, 3, 0x13, 0, 7];
            dwords[at] ^= 1 << bit;
            let ignored = at == 2 || (at == 0 && bit < 30) || (at == 1 && bit == 7);
            let found = Request::Read(Knob::CCM).reply(&dwords);
            prop_assert_eq!(found.is_ok(), ignored);
        }
    }
}
