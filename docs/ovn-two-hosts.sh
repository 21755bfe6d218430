#!/bin/bash
# Two hosts with OVN on one machine: ovn-two-hosts.sh up | down | status | in HOST COMMAND...
#
#   up       starts what does not run yet
#   down     ends what `up` started, and removes its files
#   status   what runs, and the chassis and logical ports that OVN knows
#   in       runs a command on host `a` or `b`, with Open vSwitch's, OVN's and vhostd's programs finding what is theirs
#
# A host is a network namespace, $OVN_NAME-a and $OVN_NAME-b (default: ovn-a, ovn-b), joined by a veth pair as their underlay:
#
#   a: ovn-central                                          b:
#      ovsdb-server, ovs-vswitchd, ovn-controller              ovsdb-server, ovs-vswitchd, ovn-controller
#      br-int ── Geneve ── br-phy 192.168.77.1 ── veth ── 192.168.77.2 br-phy ── Geneve ── br-int
#
# Open vSwitch forwards in user space (datapath_type netdev): neither its kernel module nor a second machine is needed. It then
# looks for the way of its tunnels among its own bridges, hence br-phy, with the tunnel's address on it. All files are
# in $OVN_DIR (default: /run/$OVN_NAME-hosts). Needs root, and on Debian 12 the packages below.
set -euo pipefail
export LC_ALL=C PATH=$PATH:/usr/sbin:/sbin

packages="openvswitch-switch ovn-central ovn-host iproute2"
name=${OVN_NAME:-ovn}
dir=${OVN_DIR:-/run/$name-hosts}
# Of the underlay. A guest's frames are 58 bytes longer in there.
mtu=${OVN_UNDERLAY_MTU:-1500}
# Seconds for each step.
patience=30

fail() {
    echo "ovn-two-hosts.sh: $1" >&2
    exit 1
}

address() { # HOST
    case $1 in a) echo 192.168.77.1 ;; b) echo 192.168.77.2 ;; esac
}

daemons() { # HOST: in the order in which they end
    echo ovn-controller ovs-vswitchd conf
    [ "$1" = b ] || echo ovn-northd ovnsb ovnnb
}

enter() { # HOST: sets what runs a command there
    local rundir=$dir/$1
    enter=(env OVS_RUNDIR="$rundir" OVS_LOGDIR="$rundir" OVS_DBDIR="$rundir" OVS_SYSCONFDIR="$rundir"
        OVN_RUNDIR="$rundir" OVN_LOGDIR="$rundir" OVN_NB_DB="unix:$dir/a/ovnnb.sock" OVN_SB_DB="unix:$dir/a/ovnsb.sock"
        VHOSTD_API="$rundir/api.sock" ip netns exec "$name-$1")
}

on() { # HOST COMMAND...
    local enter
    enter "$1"
    "${enter[@]}" "${@:2}"
}

vsctl() { # HOST ARGUMENT...
    on "$1" ovs-vsctl --timeout=$patience "${@:2}"
}

# Whether a daemon of ours answers on its control socket: no pid is taken for another's.
runs() { # HOST DAEMON
    [ -S "$dir/$1/$2.ctl" ] && on "$1" ovs-appctl --timeout=5 -t "$dir/$1/$2.ctl" version >/dev/null 2>&1
}

start() { # HOST DAEMON PROGRAM ARGUMENT...
    local host=$1 daemon=$2 program=$3
    shift 3
    local files=$dir/$host/$daemon
    runs "$host" "$daemon" && return
    on "$host" "$program" "$@" --detach --no-chdir --pidfile="$files.pid" --log-file="$files.log" \
        -vconsole:off -vsyslog:off 2>"$files.err" || fail "$daemon of host $host does not start: $(cat "$files.err")"
    # Where it made its control socket, under a name that does not change.
    ln -sf "$(basename "$program").$(cat "$files.pid").ctl" "$files.ctl"
}

stop() { # HOST DAEMON ARGUMENT...
    runs "$1" "$2" || return 0
    on "$1" ovs-appctl --timeout=$patience -t "$dir/$1/$2.ctl" exit "${@:3}" >/dev/null
    wait_for "the end of $2 of host $1" [ ! -e "$dir/$1/$2.pid" ]
}

start_database() { # HOST DATABASE SCHEMA SOCKET ARGUMENT...
    local file=$dir/$1/$2.db
    [ -e "$file" ] || on "$1" ovsdb-tool create "$file" "$3"
    start "$1" "$2" ovsdb-server "$file" --remote=punix:"$dir/$1/$4" "${@:5}"
}

wait_for() { # WHAT COMMAND...
    local what=$1 deadline=$((SECONDS + patience))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $deadline ] || fail "waited $patience s for $what"
        sleep 0.05
    done
}

make_underlay() {
    local host
    for host in a b; do
        [ -e "/run/netns/$name-$host" ] || ip netns add "$name-$host"
        on "$host" ip link set lo up
        mkdir -p "$dir/$host"
    done
    on a ip link show phy >/dev/null 2>&1 ||
        on a ip link add phy mtu "$mtu" type veth peer name phy mtu "$mtu" netns "$name-b"
    for host in a b; do on "$host" ip link set phy up; done
}

start_switch() { # HOST
    local ip
    ip=$(address "$1")
    start_database "$1" conf /usr/share/openvswitch/vswitch.ovsschema db.sock
    vsctl "$1" --no-wait init
    start "$1" ovs-vswitchd /usr/lib/openvswitch-switch/ovs-vswitchd "unix:$dir/$1/db.sock"
    vsctl "$1" --may-exist add-br br-phy -- set Bridge br-phy datapath_type=netdev fail_mode=standalone \
        -- set Interface br-phy mtu_request="$mtu" -- --may-exist add-port br-phy phy
    on "$1" ip addr replace "$ip/24" dev br-phy
    on "$1" ip link set br-phy up
    # The five settings that make a chassis.
    vsctl "$1" set Open_vSwitch . external_ids:system-id="$1" external_ids:ovn-remote="tcp:$(address a):6642" \
        external_ids:ovn-encap-type=geneve external_ids:ovn-encap-ip="$ip" external_ids:ovn-bridge-datapath-type=netdev
    cat >"$dir/$1/vhostd.toml" <<EOF
[ovs]
database = "unix:$dir/$1/db.sock"
datapath_type = "netdev"
EOF
}

start_central() {
    start_database a ovnnb /usr/share/ovn/ovn-nb.ovsschema ovnnb.sock
    start_database a ovnsb /usr/share/ovn/ovn-sb.ovsschema ovnsb.sock --remote="ptcp:6642:$(address a)"
    start a ovn-northd ovn-northd --ovnnb-db="unix:$dir/a/ovnnb.sock" --ovnsb-db="unix:$dir/a/ovnsb.sock"
}

chassis_is_there() { # HOST
    [ -n "$(on a ovn-sbctl --timeout=5 --bare --columns=_uuid find Chassis name="$1")" ]
}

up() {
    local host
    [ "$(id -u)" = 0 ] || fail "only root can have network namespaces"
    for program in ovs-vsctl ovn-controller ovn-northd ip; do
        command -v $program >/dev/null || fail "no $program: apt-get install $packages"
    done
    make_underlay
    start_switch a
    start_central
    start_switch b
    for host in a b; do
        start "$host" ovn-controller ovn-controller "unix:$dir/$host/db.sock"
    done
    for host in a b; do
        wait_for "chassis $host" chassis_is_there "$host"
        wait_for "br-int of host $host" vsctl "$host" br-exists br-int
    done
}

down() {
    local host daemon
    for host in a b; do
        # Without a word to the others, who are about to end, too.
        stop "$host" ovn-controller --restart
    done
    for host in a b; do
        for daemon in $(daemons $host); do stop "$host" "$daemon"; done
        [ ! -e "/run/netns/$name-$host" ] || ip netns del "$name-$host"
        rm -rf "${dir:?}/$host"
    done
    [ ! -d "$dir" ] || rmdir "$dir"
}

status() {
    local host daemon
    for host in a b; do
        for daemon in $(daemons $host); do
            echo "$host: $daemon $(runs $host "$daemon" && echo runs || echo "does not run")"
        done
    done
    ! runs a ovnsb || on a ovn-sbctl --timeout=5 show
}

case ${1:-} in
up | down | status) "$1" ;;
in)
    [ $# -ge 3 ] || fail "usage: in a|b COMMAND..."
    enter "$2"
    exec "${enter[@]}" "${@:3}"
    ;;
*) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
esac
