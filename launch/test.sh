#!/usr/bin/env bash
# Sets up and runs the test suite.
#
#   launch/test.sh               everything but the tests marked slow
#   launch/test.sh --no-torch    without installing torch; tests that need it are skipped by name
#   launch/test.sh -m slow       the slow ones; any other argument goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."

torch=(--torch)
if [[ "${1:-}" == --no-torch ]]; then torch=(); shift; fi
python=$(launch/setup.sh --prep --test --demo --aot "${torch[@]}")
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Files stay together, because their fixtures (goldens, a trained model) cost more than their tests.
exec "$python" -m pytest -n auto --dist loadfile "$@"
