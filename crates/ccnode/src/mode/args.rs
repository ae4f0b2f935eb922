//! The command line of `ccnode mode`.

use std::path::PathBuf;

use clap::Subcommand;
use gpu_firmware::{Access, Mode};
use hw_probe::Bdf;

/// The commands of `ccnode mode`.
#[derive(Debug, Subcommand)]
pub enum ModeCommand {
    /// Show the mode that each GPU and NVSwitch booted with, the mode it is set to, and how that is known.
    ///
    /// Without --own nothing is touched: no device is opened, woken or reset, so this is safe while virtual machines run. What
    /// cannot be known in this way is told from the last verified record of this boot, or not at all.
    ///
    /// Ends with 0, with 1 when a device that was to be owned could not be read, with 2 when nothing could be looked at.
    Get(GetArgs),
    /// Show what `mode set` would do, device by device: every knob in its order, the reset, and the reason for each.
    ///
    /// Nothing is touched without --own. Ends with 0 when `mode set` could begin, as far as can be told; with 1 when a device is in
    /// its way; with 2 when there is no plan to be made.
    Plan(PlanArgs),
    /// Bring the GPUs and NVSwitches of this node to a mode: own all, stage all, reset in parallel, verify.
    ///
    /// The plan is shown first, and a terminal is asked. Ends with 0 only when every device was verified; with 1 when it was
    /// begun and a device was not; with 2 when nothing was begun.
    Set(SetArgs),
}

/// What all three commands ask of the node.
#[derive(Debug, clap::Args)]
pub struct NodeArgs {
    /// Only this device, by its PCI address; can be given several times.
    #[arg(long = "device", value_name = "BDF")]
    pub devices: Vec<Bdf>,
    /// Print JSON (schema 1, see docs/mode.md).
    #[arg(long, env = "CCNODE_JSON")]
    pub json: bool,
    /// Use sys, proc, dev and run below this directory: a host's root mounted into a container, or a recorded tree.
    #[arg(long, value_name = "DIR", env = "CCNODE_ROOT", default_value = "/")]
    pub root: PathBuf,
}

/// Flags of `ccnode mode get`.
#[derive(Debug, clap::Args)]
pub struct GetArgs {
    /// Devices, output and root.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Take ownership of the devices and ask their firmware: active mode, knobs, permissions. No device is reset: one that is in
    /// use is left alone and named, and so is one that cannot be asked without a reset (kernel lockdown, no VFIO group files).
    #[arg(long)]
    pub own: bool,
}

/// Flags of `ccnode mode plan`.
#[derive(Debug, clap::Args)]
pub struct PlanArgs {
    /// The mode of the node: on, off, devtools or ppcie.
    #[arg(value_name = "MODE")]
    pub target: Mode,
    /// Devices, output and root.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Take ownership of the devices and read their knobs, so that the plan is exact. No device is reset, as for `mode get`.
    #[arg(long)]
    pub own: bool,
}

/// Flags of `ccnode mode set`.
#[derive(Debug, clap::Args)]
pub struct SetArgs {
    /// The mode of the node: on, off, devtools or ppcie.
    #[arg(value_name = "MODE")]
    pub target: Mode,
    /// Devices, output and root.
    #[command(flatten)]
    pub node: NodeArgs,
    /// Do not ask.
    #[arg(long, short)]
    pub yes: bool,
    /// The way to the devices: auto, sysfs or vfio. Opening a VFIO device resets it, and so does closing it; auto does so only
    /// where the kernel is locked down or has no VFIO group files.
    #[arg(long, value_name = "WAY", default_value_t = Access::Auto)]
    pub access: Access,
    /// Do it although cc-manager seems to manage this node, which will bring its devices back to what the node's label says.
    #[arg(long)]
    pub standalone: bool,
}
