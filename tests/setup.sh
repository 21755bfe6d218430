#!/bin/bash
# Gets a Debian 12 machine ready: setup.sh [build] [guest] [netdevsim] [igb] [dpdk] [ovs] [ovn] [lldpad]
#          [fuzz] [python] [nova] [lint]
#
#   build      a linker, and a look at the Rust tool chain, which is not ours to install
#   guest      QEMU, and the test guest in target/guest (guest/build.sh)
#   netdevsim  for that guest: devices with representors, and without hardware; what needs them is skipped if there are none
#   igb        for that guest: a QEMU with a card that has virtual functions (guest/qemu.sh); skipped like netdevsim
#   dpdk       dpdk-testpmd
#   ovs        Open vSwitch, with DPDK and without; its services are not started
#   ovn        OVN, for two hosts with Open vSwitch; its services are not started
#   lldpad     lldpad, for one host; its service is not started
#   fuzz       cargo-fuzz; a nightly tool chain is not ours to install
#   python     os-vif, and what builds a Python package
#   nova       virtual environments
#   lint       rustfmt and clippy are there
#
# Without arguments: all of them. What is there is not touched; when all is there this takes no time and needs no root.
set -euo pipefail
export LC_ALL=C DEBIAN_FRONTEND=noninteractive PATH=$PATH:/usr/sbin:/sbin

root=$(dirname "$(dirname "$(realpath "$0")")")

fail() {
    printf 'setup.sh: %s\n' "$@" >&2
    exit 1
}

# What a machine may be without. Where changes are checked nothing is skipped.
lacks() {
    [ "${CI:-}" != true ] || fail "$1"
    echo "setup.sh: $1" >&2
}

# What has to be there, as COMMAND:PACKAGE or PATH:PACKAGE.
needs() {
    case $1 in
    build) echo cc:gcc cc:libc6-dev ;;
    guest)
        echo qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio xz:xz-utils depmod:kmod \
            ip:iproute2 dash:dash ethtool:ethtool iperf3:iperf3 flock:util-linux
        ;;
    netdevsim) echo gcc-12:gcc-12 make:make xz:xz-utils strip:binutils ;;
    dpdk) echo dpdk-testpmd:dpdk-dev ;;
    ovs)
        echo ovsdb-server:openvswitch-common ovs-vsctl:openvswitch-switch \
            /usr/lib/openvswitch-switch/ovs-vswitchd:openvswitch-switch \
            /usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk:openvswitch-switch-dpdk
        ;;
    ovn) echo ovn-controller:ovn-host ovn-northd:ovn-central ip:iproute2 ping:iputils-ping iperf3:iperf3 ;;
    lldpad) echo lldpad:lldpad ;;
    fuzz) echo c++:g++ ;;
    python)
        local modules=/usr/lib/python3/dist-packages
        echo $modules/os_vif:python3-os-vif $modules/setuptools:python3-setuptools $modules/wheel:python3-wheel ip:iproute2
        ;;
    nova) echo /usr/lib/python3.11/ensurepip:python3-venv ;;
    igb | lint) ;;
    *) fail "unknown part: $1 (parts: build guest netdevsim igb dpdk ovs ovn lldpad fuzz python nova lint)" ;;
    esac
}

install_packages() {
    local need packages=()
    for need; do
        command -v "${need%%:*}" >/dev/null || [[ $need == /* && -d ${need%%:*} ]] || packages+=("${need##*:}")
    done
    [ ${#packages[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        fail "missing packages, and only root can install them:" \
            "    apt-get update && apt-get install --no-install-recommends ${packages[*]}"
    fi
    command -v apt-get >/dev/null || fail "missing, and there is no apt-get to install them: ${packages[*]}"
    echo "installing ${packages[*]}" >&2
    apt-get update -q >/dev/null
    without_services apt-get install -y -q --no-install-recommends "${packages[@]}" >/dev/null
}

# Runs a command during which packages start no service of theirs: tests start what they need for themselves, and the
# machine is somebody's. Debian asks this program before it starts one (101 is "no"); one that is there decides itself.
without_services() (
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap 'rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    "$@"
)

check_rust() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    found=$(cd "$root" && rustc --version 2>/dev/null | cut -d ' ' -f 2) || true
    if [ "$(printf '%s\n' "$wanted" "${found:-0}" | sort -V | head -n 1)" != "$wanted" ]; then
        fail "Rust $wanted or newer is needed, found: ${found:-none}. Debian 12 has an older one:" \
            "    install rustup, then: rustup toolchain install stable"
    fi
}

check_lint() {
    if ! cargo fmt --version >/dev/null 2>&1 || ! cargo clippy --version >/dev/null 2>&1; then
        fail "rustfmt or clippy is missing:" "    rustup component add rustfmt clippy"
    fi
}

check_fuzz() {
    if ! cargo +nightly --version >/dev/null 2>&1; then
        fail "fuzz targets need a nightly tool chain:" "    rustup toolchain install nightly --profile minimal"
    fi
    cargo fuzz --version >/dev/null 2>&1 || cargo install --quiet --locked cargo-fuzz
}

[ $# -gt 0 ] || set -- build guest netdevsim igb dpdk ovs ovn lldpad fuzz python nova lint
needs=()
for part; do
    words=$(needs "$part")
    read -ra words <<<"$words"
    needs+=("${words[@]}")
done
install_packages "${needs[@]}"
for part; do
    case $part in
    build) check_rust ;;
    guest) "$root/tests/guest/build.sh" "$root/target/guest" ;;
    netdevsim)
        "$root/tests/guest/netdevsim.sh" "$root/target/guest" || lacks "no netdevsim: what needs representors is skipped"
        ;;
    igb)
        "$root/tests/guest/qemu.sh" "$root/target/guest" ||
            lacks "no QEMU with igb: what needs virtual functions is skipped"
        ;;
    fuzz) check_fuzz ;;
    lint) check_lint ;;
    esac
done
