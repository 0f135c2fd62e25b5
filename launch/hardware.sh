# Detects accelerators; sourced by the other scripts. SYSFS replaces /sys in tests.
# shellcheck shell=bash

# TPUs are PCI devices with Google's vendor id. Network cards of Google machines have it too, so the
# device ids are checked: v3, v4, v5p, v5e, v6e, TPU7x.
tpu_chips() {
  local device count=0
  for device in "${SYSFS:-/sys}"/bus/pci/devices/*; do
    if grep -qs 0x1ae0 "$device/vendor" &&
      grep -qsE '0x00(27|56|5e|62|63|6f|76)' "$device/device"; then
      count=$((count + 1))
    fi
  done
  echo "$count"
}

has_tpu() { (($(tpu_chips) > 0)); }

has_nvidia() {
  command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU '
}

# The newest CUDA that the driver runs and jax is built for; 580 is the first driver of CUDA 13.
cuda_of_driver() {
  local version
  version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)
  if ((${version%%.*} >= 580)); then echo 13; else echo 12; fi
}

# Without transparent huge pages, TPUs of v5e and later start slowly, and a run starts them several
# times. In a GKE container the file is writable; on a TPU VM it needs sudo.
huge_pages() {
  local switch=${SYSFS:-/sys}/kernel/mm/transparent_hugepage/enabled
  if [[ ! -e $switch ]] || grep -q '\[always\]' "$switch"; then return; fi
  { echo always > "$switch" || echo always | sudo -n tee "$switch"; } >/dev/null 2>&1 ||
    echo "transparent huge pages stay off ($switch); TPUs start more slowly" >&2
}
