# Sourced by deploy/quickstart.sh and tests/run.sh: makes .venv and installs the package into it.
# A stamp with the hash of pyproject.toml and constraints.txt makes the second run start at once.

fail() {
    echo "error: $*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the first Python >= 3.11; PYTHON=... is asked first and alone.
find_python() {
    local name names=(python3.11 python3.12 python3.13 python3.14 python3 python)
    [ -z "${PYTHON:-}" ] || names=("$PYTHON")
    for name in "${names[@]}"; do
        if command -v "$name" >/dev/null && is_new_enough "$name"; then
            echo "$name"
            return
        fi
    done
    fail "no Python >= 3.11 found (looked for: ${names[*]})." \
        "Install one, or name it: PYTHON=/path/to/python bash $0"
}

# Makes .venv, or repairs one that was cut off half-way.
make_venv() {
    local python
    python=$(find_python) || exit 1
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv ||
        fail "$python cannot make a virtual environment (on Debian and Ubuntu: install python3-venv)."
}

has_compiler() {
    command -v cc gcc clang >/dev/null
}

# ensure_venv EXTRA: the package and its EXTRA are installed, editable. `dev` includes `server`.
ensure_venv() {
    local extra=$1 extras=$1 digest stamp
    [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
    is_new_enough .venv/bin/python ||
        fail ".venv has $(.venv/bin/python --version 2>&1); remove it, Python >= 3.11 is needed."
    digest=$(cat pyproject.toml deploy/constraints.txt | .venv/bin/python -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
    for stamp in ".venv/.loriner-$extra" .venv/.loriner-dev; do
        [ "$(cat "$stamp" 2>/dev/null)" != "$digest" ] || return 0
    done
    has_compiler || extras=$extra,compiler # the CPU kernels are compiled on first use
    echo "Installing loriner[$extras] (once; a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint deploy/constraints.txt --editable ".[$extras]" ||
        fail "the installation failed; the lines above say why."
    echo "$digest" >".venv/.loriner-$extra"
}
