#!/bin/bash
# Makes a virtual environment with the stock client of requirements.txt, in a cache outside the repository, and prints the path of its
# interpreter. One that is there already is used again, without the network. Where PyPI cannot be reached within a few minutes, says so and
# fails: who calls goes on without.
set -uo pipefail
here=$(dirname "$(readlink -f "$0")")

key=$( (cat "$here/requirements.txt"; python3 --version) | sha256sum | cut -c1-12)
version=$(sed -n 's/^tritonclient==//p' "$here/requirements.txt")
venv=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/codistill/tritonclient-$version-$key

fail() {
  echo "tritonclient is not available: $*" >&2
  exit 1
}

mkdir -p "$(dirname "$venv")" || fail "cannot make $(dirname "$venv")"
exec 9>"$venv.lock" && flock -w 300 9 || fail "another installation does not end"
# Only a whole one has the mark.
if [ ! -e "$venv/complete" ]; then
  rm -rf "$venv"
  python3 -m venv "$venv" >&2 || fail "python3 -m venv failed (package python3-venv)"
  timeout 240 "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --no-deps --only-binary :all: \
    --timeout 15 --retries 1 -r "$here/requirements.txt" >&2 || fail "pip install failed: is PyPI out of reach?"
  "$venv/bin/python" -c 'import tritonclient.grpc' >&2 || fail "it cannot be imported"
  touch "$venv/complete"
fi
echo "$venv/bin/python"
