//! Talks to one GPU or NVSwitch: ownership, BAR0, firmware messages, confidential-computing knobs, reset, boot wait.
