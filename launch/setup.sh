#!/usr/bin/env bash
# Makes the Python environment if it does not exist yet. Prints only the interpreter's path on stdout;
# all messages go to stderr.
#
#   launch/setup.sh          the requirements of training (requirements.txt)
#   launch/setup.sh --prep   also those of preparing raw videos (data_prep.run)
#   launch/setup.sh --test   also those of the tests
#   launch/setup.sh --demo   also those of the demo page
#   launch/setup.sh --aot    also the TPU compiler, which needs no TPU
#   launch/setup.sh --aot-gpu  also the GPU compiler, which needs no GPU
#   launch/setup.sh --tpu    also jax for TPUs, on a machine without TPUs: for an image
#   launch/setup.sh --python PATH   uses that Python (3.11 or 3.12), in .venv-3.12 for example
#   launch/setup.sh --torch  also torch and transformers, for the parity tests
#   launch/setup.sh --bench  the requirements of the benchmarks, including the compared programs
#
# Several may be started at once: they take turns (.venv.lock).
#
# To use your own environment set SABER_PYTHON=/path/to/python: then nothing is installed and no .venv
# is made. Otherwise the environment is .venv in this checkout (SABER_VENV changes the path).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/hardware.sh
source launch/hardware.sh

if [[ -n "${SABER_PYTHON:-}" ]]; then
  "$SABER_PYTHON" -c "import jax" >&2 || {
    echo "launch/setup.sh: SABER_PYTHON=$SABER_PYTHON cannot import jax." \
         "Install requirements.txt there, or unset SABER_PYTHON to get a .venv made." >&2; exit 1; }
  echo "$SABER_PYTHON"; exit 0
fi

layers=(requirements.txt)
image_for_tpus=
apart=()
interpreter=
while (($#)); do
  flag=$1; shift
  case "$flag" in
    --python) interpreter=${1:?launch/setup.sh: --python needs the path of an interpreter}; shift ;;
    --prep) layers+=(requirements-prep.txt) ;;
    --test) layers+=(requirements-test.txt) ;;
    --demo) layers+=(requirements-demo.txt) ;;
    --aot) layers+=(requirements-tpu.txt) ;;
    --aot-gpu) apart+=(cuda) ;;
    --tpu) image_for_tpus=yes ;;
    --torch) layers+=(requirements-torch.txt) ;;
    --bench) layers+=(requirements-prep.txt requirements-torch.txt); apart+=(bench) ;;
    *) echo "launch/setup.sh: unknown flag $flag;" \
            "it knows --prep, --test, --demo, --aot, --aot-gpu, --tpu, --torch, --bench and --python." >&2
       exit 2 ;;
  esac
done
venv=.venv
if [[ $interpreter ]]; then
  venv=.venv-$("$interpreter" -c 'import sys; print("{}.{}".format(*sys.version_info))')
fi
venv=${SABER_VENV:-$venv}

# Finds the newest supported Python that can make an environment. On Debian this needs a separate
# package, python3.11-venv, which has ensurepip.
find_python() {
  local candidate
  for candidate in ${interpreter:-python3.12 python3.11 python3}; do
    if "$candidate" -c 'import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"; return
    fi
  done
  return 1
}

# If the system has no such Python (Ubuntu 22.04, so most TPU VMs), uv installs one.
make_venv() {
  local python
  if python=$(find_python); then
    echo "setup: making $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv"
  elif [[ $interpreter ]]; then
    echo "launch/setup.sh: $interpreter cannot make the environment: Python 3.11 or 3.12 with its" \
         "venv and ensurepip modules is needed. Name another with --python." >&2
    return 1
  elif has_uv && uv venv --quiet --seed --python 3.12 "$venv" >&2; then
    echo "setup: no Python 3.11 or 3.12 here that can make environments; uv brought 3.12" >&2
  else
    echo "launch/setup.sh: no Python 3.11 or 3.12 with its venv module on the PATH, and no uv that" \
         "could bring one. Install python3.11 and python3.11-venv (apt-get), or uv, and start again." >&2
    return 1
  fi
}

has_uv() {
  export PATH="$PATH:$HOME/.local/bin"
  command -v uv >/dev/null || python3 -m pip install -qq --user uv >&2 2>/dev/null
  command -v uv >/dev/null
}

install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@" >&2; }

# Only one setup at a time may change an environment: with flock where there is one, which the kernel
# releases when its holder dies, else with a directory that names its holder. If no lock can be
# written here, nobody can change the environment either.
lock=$(readlink -f "$venv" 2>/dev/null || echo "$venv").lock
holder="process $$ on $(hostname)"

await_lock() {
  if ! { : >> "$lock"; } 2>/dev/null; then return; fi
  if command -v flock >/dev/null; then
    exec 9>> "$lock"
    if ! flock --nonblock 9; then
      echo "setup: waiting for another setup of $venv ($(cat "$lock"))" >&2
      flock 9
    fi
    echo "$holder" > "$lock"
    return
  fi
  local other said=
  while ! mkdir "$lock.d" 2>/dev/null; do
    other=$(cat "$lock.d/holder" 2>/dev/null || echo "process ? on $(hostname)")
    if [[ $said != "$other" ]]; then
      said=$other
      echo "setup: waiting for another setup of $venv ($other); if it is gone, remove $lock.d" >&2
    fi
    sleep 0.2
    if is_gone "$other"; then take_over "$other"; fi
  done
  echo "$holder" > "$lock.d/holder"
  trap 'rm -rf "$lock.d"' EXIT
}

# Whether the holder of a lock was a process of this machine that does not run any more.
is_gone() {
  local pid=${1#process } host=${1##* on }
  pid=${pid%% *}
  [[ $host == "$(hostname)" ]] && ! kill -0 "$pid" 2>/dev/null
}

# Several may see the same holder gone. Only one of them can move its lock, and a lock that another
# has taken since is put back.
take_over() {
  local moved=$lock.$$.stale
  mv "$lock.d" "$moved" 2>/dev/null || return 0
  if [[ "$(cat "$moved/holder" 2>/dev/null || echo "$1")" == "$1" ]]; then
    echo "setup: taking over the lock of $1, which is gone" >&2
    rm -rf "$moved"
  else
    mv "$moved" "$lock.d"
  fi
}
await_lock

# An interrupted setup leaves an environment without pip, which cannot be used.
if [[ -e "$venv" ]] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  echo "setup: $venv is half-made (its pip does not start); making it anew" >&2
  rm -rf "$venv"
fi
[[ -e "$venv" ]] || make_venv

# torch is installed before packages that depend on it, so that they use its pinned version.
for layer in "${layers[@]}"; do
  want=$(sha256sum "$layer" | cut -c1-16)
  stamp="$venv/.installed-${layer%.txt}"
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$want" ]]; then
    echo "setup: installing $layer into $venv, which can take minutes" >&2
    if [[ $layer == requirements-torch.txt ]]; then
      install "$(grep '^torch==' "$layer")"
    fi
    install -r "$layer"
    echo "$want" > "$stamp"
  fi
done

# Two layers have folders of their own. torchvision, for benchmarks/input_pipeline.py, breaks `import
# transformers` unless its version matches torch; and where jax finds its GPU plug-in without a GPU, it
# complains at every start.
for name in "${apart[@]}"; do
  want=$(sha256sum "requirements-$name.txt" | cut -c1-16)
  stamp="$venv/.installed-requirements-$name"
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$want" ]]; then
    echo "setup: installing requirements-$name.txt into $venv/$name" >&2
    install --upgrade --no-deps --target "$venv/$name" -r "requirements-$name.txt"
    echo "$want" > "$stamp"
  fi
done

# Installs jax for the accelerator of this machine, at the pinned version: `add_jax EXTRA FILE ...`,
# where the files have the pins. libtpu's is that of the compiler of saber_jax.aot, whose executables
# the TPU then loads.
add_jax() {
  local extra=$1 stamp="$venv/.installed-jax-$1" want file
  local -a pins=()
  shift
  want=$(cat "$@" | sha256sum | cut -c1-16)
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$want" ]]; then
    echo "setup: adding jax[$extra]" >&2
    for file in "$@"; do pins+=(-c "$file"); done
    install "${pins[@]}" "jax[$extra]"
    echo "$want" > "$stamp"
  fi
}
if [[ $image_for_tpus ]] || has_tpu; then
  add_jax tpu requirements.txt requirements-tpu.txt
elif has_nvidia; then
  add_jax "cuda$(cuda_of_driver)" requirements.txt
fi
echo "$venv/bin/python"
