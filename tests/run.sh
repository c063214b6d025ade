#!/usr/bin/env bash
# Everything CI checks: lint, format, types, import contracts, tests. Arguments go to pytest.
# LORINER_OFFLINE=1 fetches no base model; the tests that need it are then skipped. LORINER_TEST_WORKERS (2) is how many
# files of tests run at a time; 0: one, in this process.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source deploy/venv.sh

BASE=models/smollm2-nf4
failed=()

# step NAME COMMAND...: runs it, prints how long it took, remembers whether it failed.
step() {
    local name=$1 start=$SECONDS status=0
    shift
    echo "== $name"
    "$@" || status=$?
    echo "== $name: $([ "$status" = 0 ] && echo ok || echo FAILED) in $((SECONDS - start)) s"
    [ "$status" = 0 ] || failed+=("$name")
}

step install ensure_venv dev
PATH="$PWD/.venv/bin:$PATH"
step lint ruff check .
step format ruff format --check --quiet .
step types mypy
step imports lint-imports --no-logo
if [ ! -e "$BASE/config.json" ] && [ "${LORINER_OFFLINE:-0}" != 1 ]; then
    step "base model" loriner pull smollm2
fi
step tests pytest -n "${LORINER_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=10 "$@"

if [ ${#failed[@]} != 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
