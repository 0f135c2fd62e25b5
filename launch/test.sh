#!/usr/bin/env bash
# Sets up and runs the test suite.
#
#   launch/test.sh               everything but the tests marked slow or science
#   launch/test.sh --no-torch    without installing torch; tests that need it are skipped by name
#   launch/test.sh --python PATH with that Python, in a separate environment such as .venv-3.12
#   launch/test.sh -m slow       the slow ones; any other argument goes to pytest
#   launch/test.sh -m science    whether stage 1 still weighs the modalities, on two seeds, in an hour
set -euo pipefail
cd "$(dirname "$0")/.."

torch=(--torch)
interpreter=()
while true; do
  case "${1:-}" in
    --no-torch) torch=(); shift ;;
    --python) interpreter=(--python "$2"); shift 2 ;;
    *) break ;;
  esac
done
python=$(launch/setup.sh --prep --test --demo --aot --aot-gpu "${torch[@]}" "${interpreter[@]}")
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Files stay together, because their fixtures (goldens, a trained model) cost more than their tests,
# and are taken in the order of tests/conftest.py, in which the longest come first.
exec "$python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
