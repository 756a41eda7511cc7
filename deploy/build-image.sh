#!/usr/bin/env bash
# Builds the image without a registry: a Debian base by mmdebstrap, on it deploy/Containerfile by buildah.
#
#   deploy/build-image.sh IMAGE ARCHIVE
#
# IMAGE is the name with its tag. ARCHIVE is written in OCI's layout, which `ctr images import`, `podman load` and `skopeo
# copy` read; ARCHIVE.packages lists what is in it. Run as root. The base is kept beside ARCHIVE and made again
# when it is a week old, for the distribution's security updates.
set -euo pipefail
image=$1 archive=$2
cd "$(dirname "$0")/.."
folder=$(dirname "$archive")
base=$folder/debian-12.tar
base_name=localhost/drawbridge-base:debian-12
mkdir -p "$folder"

if [ -z "$(find "$base" -mtime -7 2>/dev/null)" ]; then
	echo "making a Debian 12 base with mmdebstrap (half a minute)"
	mmdebstrap --quiet --variant=minbase --format=tar \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
		--dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
		bookworm "$base.new"
	container=$(buildah from scratch)
	buildah add --quiet "$container" "$base.new" / >/dev/null
	buildah commit --quiet --rm "$container" "$base_name" >/dev/null
	mv "$base.new" "$base"
fi

echo "building $image from deploy/Containerfile with buildah"
# pip is to trust whom this machine trusts.
authorities=/etc/ssl/certs/ca-certificates.crt
buildah bud --quiet --layers --isolation chroot --network host \
	--build-arg "BASE=$base_name" --build-arg PIP_CERT=/run/authorities.crt --volume "$authorities:/run/authorities.crt:ro" \
	--file deploy/Containerfile --tag "$image" . >/dev/null

echo "writing $archive"
buildah push --quiet "$image" "oci-archive:$archive.new:$image"
container=$(buildah from "$image")
buildah run --isolation chroot "$container" -- sh -c 'cat /opt/drawbridge/*-packages' >"$archive.packages"
buildah rm "$container" >/dev/null
megabytes=$(($(stat -c %s "$archive.new") / 1000000))
if [ "$megabytes" -ge 100 ]; then
	echo "$megabytes MB compressed: what of it is not needed? The image is to stay below 100 MB" >&2
	exit 1
fi
mv "$archive.new" "$archive"
echo "$megabytes MB compressed; $(wc -l <"$archive.packages") packages in $archive.packages"
