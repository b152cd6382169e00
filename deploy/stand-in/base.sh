#!/usr/bin/env bash
# Makes what stands in for debian:bookworm-slim where no registry is reachable: `deploy/stand-in/base.sh TAG`.
# Debian's own image is made the same way, by debootstrap and without documentation.
set -euo pipefail
tag=$1
command -v debootstrap > /dev/null || {
  echo "images: debootstrap is not installed (Debian: apt-get install debootstrap)." >&2
  exit 1
}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase bookworm "$root" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} > "$root.log" || {
  tail -n 20 "$root.log" >&2
  exit 1
}
rm "$root.log"
mirror=$(awk '$1 == "deb" { print $2; exit }' "$root/etc/apt/sources.list")
chroot "$root" apt-get clean
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/log/*.log "$root"/var/cache/ldconfig/aux-cache \
  "$root"/usr/share/{doc,info,man,groff,lintian,locale}/*
cat > "$root/etc/dpkg/dpkg.cfg.d/slim" <<'SLIM'
path-exclude /usr/share/doc/*
path-exclude /usr/share/info/*
path-exclude /usr/share/man/*
path-exclude /usr/share/lintian/*
path-exclude /usr/share/locale/*
SLIM
# As Debian's own image has it: no package and no cache of apt stays in a layer.
cat > "$root/etc/apt/apt.conf.d/docker-clean" <<'CLEAN'
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true"; };
APT::Update::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/archives/partial/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
CLEAN
printf 'deb %s main\n' "$mirror bookworm" "$mirror bookworm-updates" "$mirror-security bookworm-security" \
  > "$root/etc/apt/sources.list"
tar --create --numeric-owner --directory "$root" . | "$DOCKER" import --change 'CMD ["bash"]' - "$tag"
