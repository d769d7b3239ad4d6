#!/bin/bash
# Installs everything that building, testing and running needs from Debian 12's archive, and nothing from elsewhere. Safe to run again: it
# leaves at once when nothing is missing. With --fuzz, also what tests/fuzz/run.sh needs.
set -euo pipefail

packages=(
  # Build.
  bazel-bootstrap g++ python3 git ca-certificates
  libabsl-dev libbenchmark-dev libcpp-httplib-dev libgmock-dev libgoogle-glog-dev libgrpc++-dev libgtest-dev libhwy-dev libpng-dev
  libprotobuf-dev libsentencepiece-dev libssl-dev libtorch-dev libturbojpeg0-dev nlohmann-json3-dev prometheus-cpp-dev
  protobuf-compiler protobuf-compiler-grpc zlib1g-dev
  # Fast matrix products under libtorch; without it the reference BLAS is used.
  libopenblas0-pthread
  # Export of models.
  python3-numpy python3-torch
  # Tests and style; the virtual environment is for the stock client of tests/interop.
  clang-format curl python3-venv
)

if [ "${1:-}" = --fuzz ]; then
  packages+=(clang libclang-rt-14-dev)
fi

fail() {
  echo "install_deps: $*" >&2
  exit 1
}

# dpkg-query leaves out packages it has never heard of; a package that is only half there has another status.
installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null | sort -u || true)
missing=()
for package in "${packages[@]}"; do
  grep -qx "installed $package" <<<"$installed" || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  echo "install_deps: all ${#packages[@]} packages are installed"
  exit 0
fi

release=$(. /etc/os-release 2>/dev/null && echo "${ID:-unknown} ${VERSION_ID:-}") || release=unknown
[ "$release" = "debian 12" ] ||
  fail "this is '$release', but packages are known for 'debian 12' only; missing here: ${missing[*]}"
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || fail "missing: ${missing[*]}; installing them needs root: run deploy/install_deps.sh as root once"
  exec sudo -- "$(readlink -f "$0")" "$@"
fi
# Java, which Bazel runs on, refuses to be configured without /proc.
if [ ! -e /proc/self/exe ]; then
  mount -t proc proc /proc 2>/dev/null || fail "/proc is not mounted, which Java needs: mount -t proc proc /proc"
fi

export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
echo "install_deps: installing ${#missing[@]} packages: ${missing[*]}"
apt-get update -q || fail "apt-get update failed: check the network and /etc/apt/sources.list"
unavailable=()
for package in "${missing[@]}"; do
  candidate=$(apt-cache policy "$package" | sed -n 's/^  Candidate: //p')
  [ -n "$candidate" ] && [ "$candidate" != "(none)" ] || unavailable+=("$package")
done
[ ${#unavailable[@]} -eq 0 ] ||
  fail "apt does not offer: ${unavailable[*]}; /etc/apt/sources.list must name Debian 12 (bookworm) main"
apt-get install -q -y --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" || fail "apt-get install failed; its messages are above"
echo "install_deps: done"
