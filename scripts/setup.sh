# Sourced by poc.sh and check.sh: picks or makes a virtual environment and installs memfit into it.
# The environment that is active is used; without one, .venv beside this repository is made.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*" >&2; }

if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        say "making .venv"
        "${PYTHON:-python3}" -m venv .venv || {
            echo "python3 -m venv failed: on Debian and Ubuntu, apt-get install python3-venv" >&2
            exit 2
        }
    fi
    VIRTUAL_ENV="$PWD/.venv"
    export VIRTUAL_ENV
fi
export PATH="$VIRTUAL_ENV/bin:$PATH"

python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "memfit needs Python 3.11 or later; this is $(python --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
    exit 2
}

# install EXTRAS: prints what is downloaded, nothing else. Already there: a few seconds.
install() {
    say "installing memfit[$1] (the first time takes minutes: torch is large)"
    python -m pip install --disable-pip-version-check -e ".[$1]" |
        awk '/^ *Downloading/ { sub(/-(py|cp)[0-9].*/, "", $2); print "   " $2 " " $3 " " $4; fflush() }
             /^Installing collected/ { print "   unpacking"; fflush() }' >&2
}
