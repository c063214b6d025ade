#!/usr/bin/env bash
# From a fresh clone to a running server, with nothing but Python 3.11+ and pip. Arguments go to
# `loriner demo`. Run again, it starts at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/venv.sh

ensure_venv server
exec .venv/bin/loriner demo "$@"
