# Shared by the scripts of this folder; sourced, not run.
# shellcheck shell=bash

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROOT

say() { printf '%s\n' "$*" >&2; }
die() { say "$0: $*"; exit 1; }

# Programs of the system that building and the lab need, with the Debian package of each. crun starts containers in its guests.
SYSTEM_TOOLS="gcc:gcc make:make bc:bc xz:xz-utils perl:perl strip:binutils zstd:zstd flock:util-linux apt-get:apt dpkg:dpkg crun:crun"

# Names the packages of SYSTEM_TOOLS that are missing, on one line.
missing_packages() {
  local pair packages=""
  for pair in $SYSTEM_TOOLS; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || packages="$packages ${pair#*:}"
  done
  # The C library's headers come with no program of their own.
  [ -e /usr/include/stdio.h ] || packages="$packages libc6-dev"
  # Where Rust is missing, and the release has rustup, that brings it.
  if ! has_rust && has_rustup_package; then packages="$packages rustup"; fi
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

os_release() { sed -n "s/^$1=\"\{0,1\}\([^\"]*\)\"\{0,1\}$/\1/p" /etc/os-release 2>/dev/null; }

is_debian() { [ "$(os_release ID)" = debian ]; }

# The toolchain of rust-toolchain.toml.
rust_channel() { sed -n 's/^channel = "\(.*\)"/\1/p' "$ROOT/rust-toolchain.toml"; }

# rustup, which fetches the toolchain that is wanted, or a cargo that is new enough without it.
has_rust() {
  command -v rustup >/dev/null 2>&1 && return 0
  local have
  have=$(cargo --version 2>/dev/null | cut -d' ' -f2)
  [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$(rust_channel)" "$have" | sort -V | head -n1)" = "$(rust_channel)" ]
}

# Debian has a package rustup since 13 (and in testing, which has no number), Ubuntu since 24.04.
has_rustup_package() {
  local version
  version=$(os_release VERSION_ID)
  case "$(os_release ID)" in
    debian) [ "${version:-999}" -ge 13 ] ;;
    ubuntu) [ "${version%%.*}" -ge 24 ] ;;
    *) false ;;
  esac
}

# Whether rustup still has to fetch the toolchain.
lacks_toolchain() {
  if command -v rustup >/dev/null 2>&1; then
    ! rustup toolchain list 2>/dev/null | grep -q "^$(rust_channel)-"
  else
    ! has_rust
  fi
}

# Everything that cannot be mended here is said at once, before anybody is asked or anything is fetched.
refuse_early() {
  local packages
  [ "$(uname -m)" = x86_64 ] || die "the lab needs an x86-64 machine, and this is $(uname -m)"
  command -v apt-get >/dev/null 2>&1 || die "this needs Debian or Ubuntu: there is no apt-get here"
  # The lab's kernel and QEMU are Debian's; another distribution has no mirror of them in its own package sources.
  is_debian || [ -n "${CCNODE_LAB_DEBIAN_MIRROR:-}" ] \
    || die "this is not Debian: set CCNODE_LAB_DEBIAN_MIRROR to the URL of a Debian package mirror near you (the part before /dists), then run this again"
  if ! has_rust && ! has_rustup_package; then
    die "Rust $(rust_channel) is missing, and this release has no package rustup: install rustup from https://rustup.rs, then run this again"
  fi
  packages=$(missing_packages)
  [ -z "$packages" ] || [ "$(id -u)" -eq 0 ] \
    || die "these system packages are missing; run: sudo apt-get install -y --no-install-recommends $packages"
}

# Installs them as root; refuse_early has sent everybody else away.
ensure_system_packages() {
  local packages
  packages=$(missing_packages)
  [ -z "$packages" ] && return 0
  say "installing: $packages"
  # shellcheck disable=SC2086
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $packages; } >/dev/null \
    || die "apt-get could not install: $packages"
}

ensure_rust() {
  lacks_toolchain || return 0
  say "installing Rust $(rust_channel)"
  rustup toolchain install "$(rust_channel)" --profile minimal --component clippy --component rustfmt >/dev/null \
    || die "rustup could not install Rust $(rust_channel)"
}

ensure_nextest() {
  cargo nextest --version >/dev/null 2>&1 && return 0
  say "installing cargo-nextest (a few minutes, once)"
  cargo install --quiet --locked cargo-nextest || die "cargo-nextest could not be installed"
}

PARTS=()
# Where cargo puts the programs: the target is named in .cargo/config.toml.
programs_folder() { printf '%s/%s/debug' "$(realpath "${CARGO_TARGET_DIR:-target}")" "$(rustc -vV | sed -n 's/^host: //p')"; }

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
