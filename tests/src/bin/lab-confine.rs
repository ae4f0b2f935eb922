//! Runs a program inside the guest as a container without privileges would: nothing of the file system but what is named,
//! on a read-only root without devices; no capability, now or ever; no way to gain any; and a filter of system calls that is
//! narrower than the default one of container runtimes (`RuntimeDefault`).
//!
//! The filter allows what the device plugin was seen to call, and what the C library falls back to. Each of these calls is
//! allowed by the default profiles of containerd, CRI-O and Docker, too, for a container without capabilities. As there, clone3
//! is answered by ENOSYS, and everything else by EPERM.

#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use caps::CapSet;
use nix::errno::Errno;
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::personality::{self, Persona};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

const ROOT: &str = "/run/confined";

/// What the device plugin may call.
const CALLS: [libc::c_long; 85] = [
    // Files and folders.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_stat,
    libc::SYS_fstat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    // Events and sockets.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_shutdown,
    // Memory, threads and signals.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_clone,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
];

/// The same of the process: its start, its end, and what it is.
const PROCESS: [libc::c_long; 18] = [
    libc::SYS_execve,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_arch_prctl,
    libc::SYS_set_tid_address,
    libc::SYS_prlimit64,
    libc::SYS_prctl,
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_tgkill,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_nanosleep,
    libc::SYS_getgid,
    libc::SYS_getegid,
];

/// `lab-confine ro:PATH rw:PATH... -- PROGRAM ARGUMENTS`
fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let mut parts = words.splitn(2, |word| word == "--");
    let (Some(places), Some([program, arguments @ ..])) = (parts.next(), parts.next()) else {
        bail!("lab-confine ro:PATH rw:PATH... -- PROGRAM ARGUMENTS")
    };
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    fs::create_dir_all(ROOT)?;
    mount(Some("tmpfs"), ROOT, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("tmpfs")?;
    for place in places {
        let (mode, path) = place.split_once(':').context("A place is ro:PATH or rw:PATH")?;
        let target = format!("{ROOT}{path}");
        if Path::new(path).is_dir() {
            fs::create_dir_all(&target)?;
        } else {
            fs::create_dir_all(Path::new(&target).parent().context("A file has a folder")?)?;
            fs::write(&target, "")?;
        }
        mount(Some(path), target.as_str(), none, MsFlags::MS_BIND | MsFlags::MS_REC, none).context(path.to_owned())?;
        if mode == "ro" {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
            mount(none, target.as_str(), none, flags, none).context(path.to_owned())?;
        }
    }
    mount(none, ROOT, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, Some("mode=755")).context("read-only root")?;
    nix::unistd::chroot(ROOT)?;
    env::set_current_dir("/")?;
    nix::sys::prctl::set_no_new_privs()?;
    // The bounding set first: to take from it needs a capability.
    for set in [CapSet::Bounding, CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).with_context(|| format!("{set:?}"))?;
    }
    filter_calls()?;
    Err(Command::new(program).args(arguments).exec().into())
}

/// Allows the calls of the two lists, and proves by one that is harmless, and in none, that the others are refused.
fn filter_calls() -> Result<()> {
    let before = personality::get().context("Personality cannot be read")?;
    let change = || personality::set(before | Persona::ADDR_NO_RANDOMIZE);
    change().context("Anybody may change the personality, and we may not")?;
    personality::set(before)?;

    let refuse = |errno: Errno| SeccompAction::Errno(errno as u32);
    let filter = |calls: &[libc::c_long], others: SeccompAction, these: SeccompAction| -> Result<BpfProgram> {
        let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
        Ok(SeccompFilter::new(rules, others, these, TargetArch::x86_64)?.try_into()?)
    };
    // A call passes when both filters allow it; of clone3 it is the first one that tells the error.
    let allowed: Vec<libc::c_long> = CALLS.into_iter().chain(PROCESS).chain([libc::SYS_clone3]).collect();
    let no_clone3 = filter(&[libc::SYS_clone3], SeccompAction::Allow, refuse(Errno::ENOSYS))?;
    let no_others = filter(&allowed, refuse(Errno::EPERM), SeccompAction::Allow)?;
    seccompiler::apply_filter(&no_clone3).context("Filter of clone3")?;
    seccompiler::apply_filter(&no_others).context("Filter of all others")?;

    match change() {
        Err(Errno::EPERM) => eprintln!("lab-confine: a call that is in no list is refused"),
        other => bail!("A call that is in no list ended with {other:?}"),
    }
    Ok(())
}
