#!/bin/sh
# Remove what serving on a CPU does not need from a virtual environment: docker/slim.sh VENV
# Needs binutils. Symbol tables serve only debuggers and the linker; the dynamic symbols remain. Libraries in *.libs were
# rewritten when their wheel was made, and would no longer load.
set -eu
packages=$(echo "$1"/lib/python3*/site-packages)

# Headers and test programs of PyTorch, for extensions that are compiled from C++. `--compile` on a CPU needs them and a
# compiler, which this image does not have either.
rm -rf "$packages/torch/include" "$packages/torch/test"
find "$packages/torch/bin" -type f -not -name torch_shm_manager -delete
# Codecs other than JPEG XL, and their libraries.
find "$packages/imagecodecs" -name '_*.so' -not -name '_jpegxl.*' -not -name '_shared*' -delete
find "$packages/imagecodecs.libs" -type f -not -name 'libjxl*' -not -name 'libbrotli*' -delete
find "$packages" -type d -name tests -prune -exec rm -rf {} +
find "$packages" -name '*.so*' -type f -not -path '*.libs/*' -exec strip --strip-unneeded {} +
rm -rf "$packages"/pip "$packages"/pip-*.dist-info "$1"/bin/pip*
