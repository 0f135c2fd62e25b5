#!/usr/bin/env bash
# Makes the Python environment if it does not exist yet. Prints only the interpreter's path on stdout;
# all messages go to stderr.
#
#   launch/setup.sh          the requirements of training (requirements.txt)
#   launch/setup.sh --prep   also those of preparing raw videos (data_prep.run)
#   launch/setup.sh --test   also those of the tests
#   launch/setup.sh --demo   also those of the demo page
#   launch/setup.sh --aot    also the TPU compiler, which needs no TPU
#   launch/setup.sh --tpu    also jax for TPUs, on a machine without TPUs: for an image
#   launch/setup.sh --python PATH   uses that Python (3.11 or 3.12), in .venv-3.12 for example
#   launch/setup.sh --torch  also torch and transformers, for the parity tests
#   launch/setup.sh --bench  the requirements of the benchmarks, including the compared programs
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
bench=
interpreter=
while (($#)); do
  flag=$1; shift
  case "$flag" in
    --python) interpreter=${1:?launch/setup.sh: --python needs the path of an interpreter}; shift ;;
    --prep) layers+=(requirements-prep.txt) ;;
    --test) layers+=(requirements-test.txt) ;;
    --demo) layers+=(requirements-demo.txt) ;;
    --aot) layers+=(requirements-tpu.txt) ;;
    --tpu) image_for_tpus=yes ;;
    --torch) layers+=(requirements-torch.txt) ;;
    --bench) layers+=(requirements-prep.txt requirements-torch.txt); bench=yes ;;
    *) echo "launch/setup.sh: unknown flag $flag;" \
            "it knows --prep, --test, --demo, --aot, --tpu, --torch, --bench and --python." >&2
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
    echo "setup: installing $layer into $venv" >&2
    if [[ $layer == requirements-torch.txt ]]; then
      install "$(grep '^torch==' "$layer")"
    fi
    install -r "$layer"
    echo "$want" > "$stamp"
  fi
done

# torchvision is installed in a separate folder for benchmarks/input_pipeline.py, because a version
# that does not match torch breaks `import transformers`.
if [[ $bench ]]; then
  want=$(sha256sum requirements-bench.txt | cut -c1-16)
  stamp="$venv/.installed-requirements-bench"
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$want" ]]; then
    echo "setup: installing requirements-bench.txt into $venv/bench" >&2
    install --upgrade --no-deps --target "$venv/bench" -r requirements-bench.txt
    echo "$want" > "$stamp"
  fi
fi

# Installs jax for the accelerator of this machine, at the pinned version.
add_jax() {
  local extra=$1 stamp="$venv/.installed-jax-$1" want
  want=$(sha256sum requirements.txt | cut -c1-16)
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$want" ]]; then
    echo "setup: adding jax[$extra]" >&2
    install -c requirements.txt "jax[$extra]"
    echo "$want" > "$stamp"
  fi
}
if [[ $image_for_tpus ]] || has_tpu; then
  add_jax tpu
elif has_nvidia; then
  add_jax "cuda$(cuda_of_driver)"
fi
echo "$venv/bin/python"
