# Shared by the scripts of this folder; sourced, not run.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROOT

say() { printf '%s\n' "$*" >&2; }
die() { say "$0: $*"; exit 1; }

# Programs of the system that building and the lab need, with the Debian package of each.
SYSTEM_TOOLS="gcc:gcc make:make bc:bc xz:xz-utils perl:perl strip:binutils zstd:zstd flock:util-linux apt-get:apt dpkg:dpkg"

# Names the packages of SYSTEM_TOOLS that are missing, on one line.
missing_packages() {
  local pair packages=""
  for pair in $SYSTEM_TOOLS; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || packages="$packages ${pair#*:}"
  done
  # The C library's headers come with no program of their own.
  [ -e /usr/include/stdio.h ] || packages="$packages libc6-dev"
  # What the lab's kernel and QEMU are checked against; Ubuntu has it as a package.
  [ -e "${CCNODE_LAB_DEBIAN_KEYRING:-/usr/share/keyrings/debian-archive-keyring.gpg}" ] || packages="$packages debian-archive-keyring"
  # On Debian the lab takes what else a kernel build needs from the archive, without installing it.
  if ! is_debian; then
    for pair in flex:flex bison:bison m4:m4 openssl:openssl; do
      command -v "${pair%%:*}" >/dev/null 2>&1 || packages="$packages ${pair#*:}"
    done
    for pair in libelf.h:libelf-dev zlib.h:zlib1g-dev openssl/ssl.h:libssl-dev; do
      [ -e "/usr/include/${pair%%:*}" ] || packages="$packages ${pair#*:}"
    done
  fi
  printf '%s' "${packages# }"
}

is_debian() { grep -qs '^ID=debian$' /etc/os-release; }

# The lab's kernel and QEMU are Debian's; another distribution has no mirror of them in its own package sources.
ensure_debian_mirror() {
  [ -n "${CCNODE_LAB_DEBIAN_MIRROR:-}" ] && return 0
  is_debian && return 0
  die "this is not Debian: set CCNODE_LAB_DEBIAN_MIRROR to the URL of a Debian package mirror near you (the part before /dists), then run this again"
}

# Installs them as root, else says the one line that root has to run.
ensure_system_packages() {
  local packages
  packages=$(missing_packages)
  [ -z "$packages" ] && return 0
  if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
    say "installing: $packages"
    # shellcheck disable=SC2086
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages; } >/dev/null \
      || die "apt-get could not install: $packages"
  else
    die "these system packages are missing; run: sudo apt-get install -y --no-install-recommends $packages"
  fi
}

ensure_rust() {
  command -v cargo >/dev/null 2>&1 || die "cargo is missing; install Rust $(sed -n 's/^channel = "\(.*\)"/\1/p' "$ROOT/rust-toolchain.toml") with rustup, then run this again"
}

ensure_nextest() {
  cargo nextest --version >/dev/null 2>&1 && return 0
  say "installing cargo-nextest (a few minutes, once)"
  cargo install --quiet --locked cargo-nextest || die "cargo-nextest could not be installed"
}

PARTS=()
# part NAME COMMAND...: runs it, prints how long it took, and keeps that for parts_table.
part() {
  local name=$1 start=$SECONDS
  shift
  say "==> $name"
  "$@" || die "$name failed"
  PARTS+=("$(printf '%5d s  %s' $((SECONDS - start)) "$name")")
  say "    $((SECONDS - start)) s"
}

parts_table() {
  say "Time of each part:"
  printf '%s\n' "${PARTS[@]}" >&2
}
