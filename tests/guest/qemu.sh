#!/bin/bash
# Gets a QEMU that has a network card with virtual functions: qemu.sh DIR
#
# DIR/qemu/usr/bin/qemu-system-x86_64   from Debian's backports, with its firmware
#
# igb came with QEMU 8.0, and Debian 12 has 7.2. Nothing is installed, and the machine's package sources stay as they are: the
# index of the backports, which are where Debian is, is gone when this ends. Libraries are those of the QEMU that is
# installed. Where that one has the card already there is nothing to do.
set -euo pipefail
export LC_ALL=C

has_igb() { # QEMU, which does not fail where it has not
    [[ $("$1" -machine q35 -device igb,help) == igb\ options* ]]
}

cd "$1"
[ ! -e qemu ] || exit 0
! has_igb qemu-system-x86_64 2>/dev/null || exit 0
work=$(mktemp -d -p "$PWD" work.XXXX)
trap 'rm -rf "$work"' EXIT
echo "fetching a QEMU with igb" >&2

release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
sources=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages')
mirror=$(sed -n "/^$release /{s///p;q}" <<<"$sources")
if [ -z "$mirror" ]; then
    echo "qemu.sh: apt has no source for release ${release:-that is nameless}" >&2
    exit 1
fi
mkdir -p "$work"/{lists,cache,archives}/partial
echo "deb $mirror $release-backports main" >"$work/sources.list"
# As ourselves: apt's own user may not write here.
apt=(apt-get -q -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=- -o Dir::State::Lists="$work/lists"
    -o Dir::Cache="$work/cache" -o APT::Sandbox::User="$(id -un)")
"${apt[@]}" update >/dev/null
(cd "$work/archives" && "${apt[@]}" download {qemu-system-x86,qemu-system-data,seabios}/"$release-backports" >/dev/null)
for package in "$work"/archives/*.deb; do dpkg-deb -x "$package" "$work/qemu"; done
has_igb "$work/qemu/usr/bin/qemu-system-x86_64"
mv "$work/qemu" qemu
