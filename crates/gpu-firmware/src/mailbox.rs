//! What the two ways to speak with the FSP have in common: one request at a time, and no reply believed that may be
//! another request's.

use crate::access::{Bar0, is_pri_error};
use crate::chip::Mailbox;
use crate::clock::Clock;
use crate::emem::Emem;
use crate::error::Fault;
use crate::mnoc::Mnoc;

/// What is known of the mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing: somebody else may have used it.
    Unknown,
    /// Every request of ours was answered.
    Settled,
    /// A request of ours was not answered, or wrongly: another answer may still come.
    Unsettled,
}

/// A way to move messages.
pub(crate) trait Link: Send + std::fmt::Debug {
    /// Before the first request, and after one that went wrong: waits for what may still come, so that it does not come
    /// after the next request.
    fn attach(&self, bar0: &dyn Bar0, clock: &dyn Clock, state: State) -> Result<(), Fault>;

    /// Drops what waits, and sends a request.
    fn send(&self, bar0: &dyn Bar0, clock: &dyn Clock, request: &[u32]) -> Result<(), Fault>;

    /// Waits for the reply.
    fn receive(&self, bar0: &dyn Bar0, clock: &dyn Clock) -> Result<Vec<u32>, Fault>;
}

/// The FSP of one device, from one reset to the next.
#[derive(Debug)]
pub(crate) struct Fsp {
    link: Box<dyn Link>,
    state: State,
}

impl Fsp {
    pub(crate) fn new(mailbox: Mailbox) -> Self {
        let link: Box<dyn Link> = match mailbox {
            Mailbox::Emem(channel) => Box::new(Emem::new(channel)),
            Mailbox::Mnoc => Box::new(Mnoc),
        };
        Self { link, state: State::Unknown }
    }

    /// Sends a request and returns what comes back, as it is: the caller judges its content.
    pub(crate) fn exchange(&mut self, bar0: &dyn Bar0, clock: &dyn Clock, request: &[u32]) -> Result<Vec<u32>, Fault> {
        if self.state != State::Settled {
            self.link.attach(bar0, clock, self.state)?;
        }
        self.state = State::Unsettled;
        self.link.send(bar0, clock, request)?;
        let reply = self.link.receive(bar0, clock)?;
        self.state = State::Settled;
        Ok(reply)
    }

    /// Tells that the last reply was not one to the request, so that another may still come.
    pub(crate) const fn distrust(&mut self) {
        self.state = State::Unsettled;
    }
}

/// The reply, unless the device itself does not answer any more. `register` is where it was read.
pub(crate) fn judge(register: u32, reply: Vec<u32>) -> Result<Vec<u32>, Fault> {
    if reply.iter().all(|dword| *dword == u32::MAX) {
        return Err(Fault::Bar0Dead { register });
    }
    match reply.first() {
        Some(first) if reply.iter().all(|dword| is_pri_error(*dword)) => {
            Err(Fault::PriError { register, value: *first })
        }
        _ => Ok(reply),
    }
}
