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

# Mounts the disk that `launch/pod.sh create --disk` attached to a TPU VM, for reading, on
# /mnt/disks/data. DEVICES and DISKS replace /dev and /mnt/disks in tests.
mount_disk() {
  local folder=${DISKS:-/mnt/disks}/data device
  if ! has_tpu || mountpoint -q "$folder"; then return 0; fi
  for device in "${DEVICES:-/dev}"/{disk/by-id/google-persistent-disk-1,sdb,nvme0n2}; do
    if [[ ! -e $device ]]; then continue; fi
    # ext4 would replay its journal, which it cannot write; other file systems have no `noload`.
    { sudo -n mkdir -p "$folder" && { sudo -n mount -o ro,noload "$device" "$folder" ||
      sudo -n mount -o ro "$device" "$folder"; }; } >/dev/null 2>&1 ||
      echo "the disk $device could not be mounted on $folder" >&2
    return 0
  done
}
