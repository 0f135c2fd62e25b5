#!/usr/bin/env bash
# Sets this machine up and runs a config with everything it needs, on what is here: TPU, GPU or CPU.
#
#   launch/tpu_run.sh configs/cadpo.py:tiny                      the whole chain on the embedded corpus
#   launch/tpu_run.sh configs/sft.py:7b --config.data.path=DIR   stage 1 on your records
#
# The same call starts, goes on after an interruption, and says so when all is done.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ $# -lt 1 || "$1" == -* ]]; then
  echo "usage: launch/tpu_run.sh configs/NAME.py:VARIANT [--config.key=value ...]," \
       "for example launch/tpu_run.sh configs/cadpo.py:tiny" >&2
  exit 2
fi
config=$1; shift
python=$(launch/setup.sh)
# What was compiled once is not compiled again after a restart.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/compilation_cache}
# NumPy's threads and XLA's would take turns at waiting for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1
exec "$python" -m launch.chain "--config=$config" "$@"
