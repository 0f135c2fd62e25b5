#!/usr/bin/env bash
# Runs a config with everything it needs, where you start it or on the TPUs that you name.
#
#   launch/tpu_run.sh configs/cadpo.py:tiny                      the whole chain on the embedded corpus
#   launch/tpu_run.sh configs/sft.py:7b --config.data.path=DIR   stage 1 on your records
#
# On this machine, be it a TPU VM, a GPU or a CPU: as above. Hosts of one TPU pod find each other.
# A setting may name a bucket, --config.root=gs://BUCKET/PATH (launch/buckets.sh).
#
# From a laptop, on all workers of a TPU VM or of a queued resource (launch/remote.py):
#   TPU_NAME=my-pod ZONE=us-west4-a PROJECT=my-project launch/tpu_run.sh configs/cadpo.py:7b
#   ... launch/tpu_run.sh --stop                                 saves and ends it
#
# On GKE, as a JobSet of one or more slices, in kubectl's current context (launch/gke.py):
#   GKE_IMAGE=IMAGE launch/tpu_run.sh configs/cadpo.py:7b-v5e-256 --config.root=gs://BUCKET/7b
#
# The same call starts, goes on after an interruption, and says so when all is done. Exit status 75:
# it was told to stop (SIGTERM) and saved.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/hardware.sh
source launch/hardware.sh
# shellcheck source=launch/buckets.sh
source launch/buckets.sh

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,/^set -/{ s/^# \{0,1\}//p }' launch/tpu_run.sh
  echo
  echo "All settings of a config: launch/tpu_run.sh configs/cadpo.py:tiny --help"
  exit
fi
if [[ $# -lt 1 || ( "$1" == -* && "$1" != --stop ) ]]; then
  echo "usage: launch/tpu_run.sh configs/NAME.py:VARIANT [--config.key=value ...]," \
       "for example launch/tpu_run.sh configs/cadpo.py:tiny" >&2
  exit 2
fi
# A TPU VM may find its own name in TPU_NAME; there the work is here.
if [[ -n "${TPU_NAME:-}" ]] && ! has_tpu; then
  exec python3 -m launch.remote "$@"
elif [[ -n "${GKE_IMAGE:-}" ]]; then
  exec python3 -m launch.gke "$@"
elif [[ "$1" == --stop ]]; then
  echo "launch/tpu_run.sh: --stop is for runs elsewhere; set TPU_NAME or GKE_IMAGE." >&2
  exit 2
fi

config=$1; shift
SABER_MOUNTS=${SABER_MOUNTS:-$(bucket_mounts "$@")}
export SABER_MOUNTS
# jax writes its cache on the first host alone, so hosts that are to find it need one that all share;
# and a container's own disk is gone after a restart. jax reads and writes buckets by itself.
cache=$PWD/runs/compilation_cache
for argument in "$@"; do
  if [[ $argument == --config.root=gs://* ]] || { [[ $argument == --config.root=* ]] && has_tpu; }
  then cache=$(native "${argument#*=}")/compilation_cache; fi
done
for argument in "$@"; do
  argument=$(with_buckets "$argument")
  shift
  set -- "$@" "$argument"
done
python=$(launch/setup.sh)
# What was compiled once is not compiled again after a restart.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$cache}
# NumPy's threads and XLA's would take turns at waiting for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1
if has_tpu; then
  huge_pages
  LIBTPU_INIT_ARGS="$("$python" -m saber_jax.aot.xla_flags) ${LIBTPU_INIT_ARGS:-}"
  export LIBTPU_INIT_ARGS
elif has_nvidia; then
  # jax takes three quarters of a GPU's memory by itself.
  if [[ -z "${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]]; then
    export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}
  fi
else
  # An installed TPU compiler would make jax look for a TPU first.
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
fi
exec "$python" -m launch.chain "--config=$config" "$@"
