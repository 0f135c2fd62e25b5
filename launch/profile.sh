#!/usr/bin/env bash
# Opens the traces of a run in xprof, in a separate environment because its pins conflict with ours.
#
#   launch/profile.sh runs/tiny/sft            then look at http://localhost:8791
#   PORT=9000 launch/profile.sh WORKDIR
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?usage: launch/profile.sh WORKDIR, which was trained with --config.profile.steps=10:15}
if [[ ! -d $folder/profile ]]; then
  echo "launch/profile.sh: $folder holds no trace; train with --config.profile.steps=10:15" >&2
  exit 1
fi
venv=${XPROF_VENV:-.venv-xprof}
if [[ ! -x $venv/bin/xprof ]]; then
  echo "profile: installing xprof into $venv" >&2
  "$(command -v python3.11 || command -v python3)" -m venv "$venv"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check xprof==2.24.2 >&2
fi
exec "$venv/bin/xprof" --logdir="$folder/profile" --port="${PORT:-8791}"
