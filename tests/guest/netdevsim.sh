#!/bin/bash
# Builds a module for the test guest's kernel: netdevsim.sh DIR
#
# DIR/netdevsim.ko      devices without hardware that have ports, virtual functions and representors
#
# Debian's packages of the kernel do not have it, the one of its source does. Nothing is installed; DIR is build.sh's.
set -euo pipefail
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin

cd "$1"
[ ! netdevsim.ko -nt vmlinux ] || exit 0
work=$(mktemp -d -p "$PWD" work.XXXX)
trap 'rm -rf "$work"' EXIT
echo "building netdevsim" >&2

version=$(dpkg-deb -f linux-image.deb Version)
release=$(ls modules/lib/modules)
series=$(cut -d . -f 1,2 <<<"$release")
packages=(linux-headers-"$release" linux-headers-"${release%-*}"-common linux-kbuild-"$series" linux-source-"$series")
# As ourselves: apt's own user may not write here.
(cd "$work" && apt-get download -q -o APT::Sandbox::User="$(id -un)" "${packages[@]/%/=$version}" >/dev/null)
for package in "$work"/linux-{headers,kbuild}*.deb; do dpkg-deb -x "$package" "$work"; done

source=linux-source-$series
# tar ends when it has what it looks for, in the middle of the archive.
dpkg-deb --fsys-tarfile "$work/$source"*.deb 2>/dev/null | tar -xO "./usr/src/$source.tar.xz" 2>/dev/null |
    tar -xJ -C "$work" --occurrence=1 "$source/drivers/net/netdevsim" 2>/dev/null || true
headers=$work/usr/src/linux-headers-$release
sed -i "s|/usr/src|$work/usr/src|" "$headers/Makefile"
make -s -C "$headers" M="$work/$source/drivers/net/netdevsim" CONFIG_NETDEVSIM=m modules >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    exit 1
}
strip --strip-debug -o netdevsim.ko "$work/$source/drivers/net/netdevsim/netdevsim.ko"
