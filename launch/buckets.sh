# Buckets as folders; sourced by tpu_run.sh. A bucket's folder is below SABER_BUCKETS, by default
# ~/buckets: the same path on every host, and outside of this checkout, which may be cleaned. A run
# reads and writes the bucket itself (saber_jax/runs/buckets.py); with SABER_FUSE=1 the bucket is also
# mounted on its folder with gcsfuse, for other programs.
# shellcheck shell=bash

# Prints its argument with every gs://BUCKET replaced by the folder of BUCKET.
with_buckets() {
  local argument=$1 bucket folder
  while [[ $argument =~ gs://([a-z0-9][-_.a-z0-9]*) ]]; do
    bucket=${BASH_REMATCH[1]} folder=${SABER_BUCKETS:-$HOME/buckets}/${BASH_REMATCH[1]}
    if [[ -n ${SABER_FUSE:-} ]]; then
      mount_bucket "$bucket" "$folder" || return 1
    else
      stand_in "$folder"
    fi
    argument=${argument/gs:\/\/$bucket/$folder}
  done
  printf '%s\n' "$argument"
}

# An empty file in the place of a bucket's folder, if nothing is mounted: a program that does not know
# buckets then fails, instead of leaving files on the disk of one host.
stand_in() {
  local folder=$1
  if mountpoint -q "$folder"; then return; fi
  mkdir -p "$(dirname "$folder")"
  rmdir "$folder" 2>/dev/null || true
  if [[ ! -e $folder ]]; then : > "$folder"; fi
}

# Prints the buckets in its arguments, one per line: FOLDER=gs://BUCKET.
bucket_mounts() {
  local bucket
  { grep -oE 'gs://[a-z0-9][-_.a-z0-9]*' <<<"$*" || true; } | sort -u | while read -r bucket; do
    printf '%s\n' "${SABER_BUCKETS:-$HOME/buckets}/${bucket#gs://}=$bucket"
  done
}

# Prints a path as gs://BUCKET/PATH if SABER_MOUNTS names the folder of its bucket, as it does on GKE.
native() {
  local path=$1 line
  while IFS= read -r line; do
    if [[ -n $line && "$path/" == "${line%=gs://*}/"* ]]; then path=${line##*=}${path#"${line%=gs://*}"}; fi
  done <<<"${SABER_MOUNTS:-}"
  printf '%s\n' "$path"
}

# Installs gcsfuse on a TPU VM. Prints no errors: the caller checks whether gcsfuse exists.
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  local source
  source="https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main"
  echo "installing gcsfuse" >&2
  { curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo -n tee $key &&
    echo "deb [signed-by=$key] $source" | sudo -n tee /etc/apt/sources.list.d/gcsfuse.list &&
    sudo -n apt-get -qq update &&
    sudo -n apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse; } >/dev/null || true
}

# Finished folders are renamed, which are many objects in a bucket; and hosts have to see at once what
# another one wrote, so metadata is not cached.
mount_bucket() {
  local bucket=$1 folder=$2
  if mountpoint -q "$folder"; then return; fi
  if ! command -v gcsfuse >/dev/null && has_tpu; then install_gcsfuse; fi
  if ! command -v gcsfuse >/dev/null; then
    echo "launch/tpu_run.sh: gs://$bucket is mounted by gcsfuse, which is not here. Install it" \
         "(https://cloud.google.com/storage/docs/cloud-storage-fuse/install) on every host, or give" \
         "the path of a disk that all hosts share." >&2
    return 1
  fi
  if [[ -f $folder && ! -s $folder ]]; then rm "$folder"; fi
  mkdir -p "$folder"
  echo "mounting gs://$bucket on $folder" >&2
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
    "$bucket" "$folder" >&2 || {
    echo "launch/tpu_run.sh: gs://$bucket could not be mounted, see above." >&2; return 1; }
}
