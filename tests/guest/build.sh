#!/bin/bash
# Builds the test guest: build.sh DIR
#
# DIR/linux-image.deb   Debian's kernel package, fetched if it is not there
# DIR/vmlinux           the kernel in it, an ELF file with a PVH entry
# DIR/modules           the modules in it that the guest may load
# DIR/initramfs.cpio    busybox, init, these modules, and some programs of this machine with their libraries
#
# Nothing is installed. Kernel and initramfs are not compressed: unpacking them took an emulated guest 5 of its 8
# seconds to come up.
set -euo pipefail
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin

here=$(dirname "$(realpath "$0")")
mkdir -p "$1"
cd "$1"

# Programs that busybox does not have, or not in full. Its shell prefers what it has itself, so the shell is another one too.
programs=(bridge dash ethtool flock ip iperf3)
# What libraries load at run time, unseen by ldd: pthread_exit() needs this one.
libraries=(/lib/x86_64-linux-gnu/libgcc_s.so.1)
# Modules the guest may load; what they need comes along.
modules=(
    virtio_pci virtio_console virtio_net 9p 9pnet_virtio overlay
    8021q bonding bridge dummy ifb macvlan macvtap openvswitch team tun veth vhost_net vxlan geneve
    act_mirred cls_matchall cls_flower sch_fq sch_htb sch_ingress sch_netem pktgen tcp_bbr
    igb igbvf vfio-pci uio_pci_generic psample
    crc32c_generic
)

fetch_kernel() {
    local package
    package=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9]\)/\1/p' | head -n 1)
    if [ -z "$package" ]; then
        echo "build.sh: apt knows no linux-image-amd64; run as root: apt-get update" >&2
        exit 1
    fi
    echo "fetching $package" >&2
    mkdir "$work/fetch"
    # As ourselves: apt's own user may not write here.
    (cd "$work/fetch" && apt-get download -q -o APT::Sandbox::User="$(id -un)" "$package" >/dev/null)
    mv "$work"/fetch/*.deb linux-image.deb
}

unpack_kernel() {
    local unpacked=$work/kernel release module file
    dpkg-deb -x linux-image.deb "$unpacked"
    release=$(ls "$unpacked/lib/modules")
    depmod -b "$unpacked" "$release"
    rm -rf modules && mkdir -p "modules/lib/modules/$release"
    for module in "${modules[@]}"; do
        modprobe -C /dev/null -d "$unpacked" -S "$release" --show-depends "$module"
    done | sed -n "s|^insmod .*/lib/modules/\([^ ]*\) *\$|\1|p" | sort -u | while read -r file; do
        install -D -m 644 "$unpacked/lib/modules/$file" "modules/lib/modules/$file"
    done
    cp "$unpacked/lib/modules/$release"/modules.{builtin*,order} "modules/lib/modules/$release"
    depmod -b modules "$release"
    decompress_kernel "$unpacked/boot/vmlinuz-$release" >"$unpacked/vmlinux"
    mv "$unpacked/vmlinux" vmlinux
}

# Linux, Documentation/arch/x86/boot.rst: the compressed kernel starts payload_offset (at 0x248) bytes after the real-mode
# part, which is setup_sects (at 0x1f1) sectors and the boot sector long; payload_length (at 0x24c) ends with its size.
decompress_kernel() {
    local sectors offset length
    sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$1")
    read -r offset length < <(od -An -tu4 -j $((0x248)) -N 8 "$1")
    head -c $(((sectors + 1) * 512 + offset + length - 4)) "$1" | tail -c $((length - 4)) | xz -dc
}

build_initramfs() {
    local root=$work/root program file
    mkdir -p "$root"/{bin,dev,proc,run,sys,tmp,usr/bin,etc}
    cp "$here/init" "$root/init"
    cp -r modules/lib "$root"
    # The kernel loads what it misses through /sbin/modprobe.
    ln -s bin "$root/sbin"
    cp "$(command -v busybox)" "$root/bin/busybox"
    for program in $(busybox --list | grep -vx busybox); do
        ln -s busybox "$root/bin/$program"
    done
    ln -sf /usr/bin/dash "$root/bin/sh"
    for program in "${programs[@]}"; do
        program=$(command -v "$program")
        cp -L "$program" "$root/usr/bin"
        ldd "$program" | sed -n 's|.*[[:space:]]\(/[^ ]*\) (0x.*|\1|p'
    done | cat - <(printf '%s\n' "${libraries[@]}") | sort -u | while read -r file; do
        install -D "$file" "$root$file"
    done
    (cd "$root" && find . -mindepth 1 | cpio --quiet -o -H newc -R 0:0) >"$root.cpio"
    mv "$root.cpio" initramfs.cpio
}

newer() { # FILE THAN...: FILE is there and not older than any of the others
    local file=$1 than
    shift
    [ -e "$file" ] || return
    for than; do [ ! "$than" -nt "$file" ] || return; done
}

# One at a time, also when two checks start together.
exec 9>lock
flock 9
work=$(mktemp -d -p "$PWD" work.XXXX)
trap 'rm -rf "$work"' EXIT
[ -e linux-image.deb ] || fetch_kernel
newer vmlinux linux-image.deb "$here/build.sh" || { echo "unpacking the kernel" >&2; unpack_kernel; touch vmlinux; }
newer initramfs.cpio vmlinux "$here/build.sh" "$here/init" || { echo "building the initramfs" >&2; build_initramfs; }
