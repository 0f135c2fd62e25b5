#!/usr/bin/env bash
# Makes the Python environment, or finds that it stands already. Prints the interpreter's path, alone,
# on stdout; everything for people goes to stderr.
#
#   launch/setup.sh          what running needs (requirements.txt)
#   launch/setup.sh --prep   and what preparing raw videos needs (data_prep.run)
#   launch/setup.sh --test   and what the tests need
#   launch/setup.sh --demo   and what the demo page needs
#   launch/setup.sh --aot    and the TPU compiler, which needs no TPU
#   launch/setup.sh --tpu    and jax for TPUs, where none shows yet: in an image
#   launch/setup.sh --torch  and torch and transformers, which the parity tests compare with
#   launch/setup.sh --bench  all that the benchmarks need, the peers that they compare with included
#
# Bring your own environment: SABER_PYTHON=/path/to/python is used as it is, nothing is installed and
# no .venv is made. Otherwise the environment is .venv in this checkout (SABER_VENV moves it).
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

venv=${SABER_VENV:-.venv}
layers=(requirements.txt)
image_for_tpus=
bench=
for flag in "$@"; do
  case "$flag" in
    --prep) layers+=(requirements-prep.txt) ;;
    --test) layers+=(requirements-test.txt) ;;
    --demo) layers+=(requirements-demo.txt) ;;
    --aot) layers+=(requirements-tpu.txt) ;;
    --tpu) image_for_tpus=yes ;;
    --torch) layers+=(requirements-torch.txt) ;;
    --bench) layers+=(requirements-prep.txt requirements-torch.txt); bench=yes ;;
    *) echo "launch/setup.sh: unknown flag $flag;" \
            "it knows --prep, --test, --demo, --aot, --tpu, --torch and --bench." >&2
       exit 2 ;;
  esac
done

find_python() {
  for candidate in python3.11 python3.12 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c \
        'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'; then
      echo "$candidate"; return
    fi
  done
  echo "launch/setup.sh: Python 3.11 (or 3.12) is needed and none is on the PATH." >&2; return 1
}

if [[ ! -x "$venv/bin/python" ]]; then
  python=$(find_python)
  echo "setup: making $venv with $python" >&2
  "$python" -m venv "$venv"
fi

# torch comes before anything that depends on it, so that its exact pin is what the others find.
for layer in "${layers[@]}"; do
  want=$(sha256sum "$layer" | cut -c1-16)
  stamp="$venv/.installed-${layer%.txt}"
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$want" ]]; then
    echo "setup: installing $layer into $venv" >&2
    if [[ $layer == requirements-torch.txt ]]; then
      "$venv/bin/python" -m pip install -q --disable-pip-version-check \
        "$(grep '^torch==' "$layer")" >&2
    fi
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -r "$layer" >&2
    echo "$want" > "$stamp"
  fi
done

# torchvision has a folder of its own: one that does not match its torch breaks `import transformers`
# for everything else. benchmarks/input_pipeline.py looks for it there.
if [[ $bench ]]; then
  want=$(sha256sum requirements-bench.txt | cut -c1-16)
  stamp="$venv/.installed-requirements-bench"
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$want" ]]; then
    echo "setup: installing requirements-bench.txt into $venv/bench" >&2
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --upgrade --no-deps \
      --target "$venv/bench" -r requirements-bench.txt >&2
    echo "$want" > "$stamp"
  fi
fi

# jax for the accelerator that is here, at the version that everything else is pinned to.
add_jax() {
  local extra=$1 stamp="$venv/.installed-jax-$1" pin
  pin=$(grep '^jax==' requirements.txt)
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$pin" ]]; then
    echo "setup: adding jax[$extra]" >&2
    "$venv/bin/python" -m pip install -q --disable-pip-version-check "jax[$extra]==${pin#jax==}" >&2
    echo "$pin" > "$stamp"
  fi
}
if [[ $image_for_tpus ]] || has_tpu; then
  add_jax tpu
elif has_nvidia; then
  add_jax cuda12
fi
echo "$venv/bin/python"
