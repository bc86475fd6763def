#!/usr/bin/env bash
# Build the Dockerfile without Docker: docker/build_with_buildah.sh DIR
# Needs root, buildah and debootstrap. Debian's own Python replaces the official Python image, which is based on the
# same Debian release. The stage `packages-gpu`, which installs PyTorch for CUDA and TensorRT, is not built. Results:
# pid-decode-server:cpu and pid-decode-server:server-gpu in the storage DIR/store, for `podman --root DIR/store`.
# DIR needs about 6 GB; remove it afterwards.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
base=$folder/base

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$base" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
ln -s /usr/bin/python3 "$base/usr/local/bin/python"
# Like the official image, the base has no package lists, documentation and translations.
rm -rf "$base"/var/cache/apt/archives/*.deb "$base"/var/lib/apt/lists/* "$base"/usr/share/{doc,info,locale,man}

# Inside the build, pip uses the same PIP_* settings and certificates as outside.
volumes=(--volume "$folder/pip.conf:/etc/pip.conf:ro" --volume /etc/ssl/certs:/etc/ssl/certs:ro)
echo "[global]" > "$folder/pip.conf"
while IFS='=' read -r name value; do
    key=${name#PIP_} && key=${key,,}
    echo "${key//_/-} = $value" >> "$folder/pip.conf"
    if [[ $value = /* && -d $value ]]; then volumes+=(--volume "$value:$value:ro"); fi
done < <(env | grep '^PIP_' || true)

store=(--storage-driver "${STORAGE_DRIVER:-overlay}" --root "$folder/store" --runroot "$folder/run")
base_image=$(buildah "${store[@]}" from scratch)
buildah "${store[@]}" copy --quiet "$base_image" "$base" /
buildah "${store[@]}" commit --quiet --rm "$base_image" debian-python
rm -r "$base"
for target in cpu server-gpu; do
    buildah "${store[@]}" bud --isolation chroot --format docker "${volumes[@]}" \
        --build-arg PYTHON=localhost/debian-python --build-arg TORCH_INDEX="${TORCH_INDEX-}" \
        --target "$target" --tag "pid-decode-server:$target" --file Dockerfile .
done
