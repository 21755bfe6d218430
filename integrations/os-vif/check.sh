#!/bin/bash
# The package's tests: check.sh debian|newest|VERSION|nova [ARGUMENT OF UNITTEST...]
#
#   debian            as built with Debian's setuptools, with Debian's os-vif (tests/setup.sh python)
#   newest, VERSION   as pip installs it, in a virtual environment in target/os-vif, with that os-vif of PyPI
#   nova              the same with PyPI's newest nova, and two guests that nova plugs and describes (setup.sh guest)
#
# They run against the daemon that cargo built, target/debug/vhostd, or $VHOSTD, and a real Open vSwitch (setup.sh ovs). Before
# them, what that os-vif makes of random and of damaged objects is held against what we make of them.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
root=$(realpath "$here/../..")
export VHOSTD=${VHOSTD:-${CARGO_TARGET_DIR:-$root/target}/debug/vhostd}
os_vif=${1:?debian, newest, a version of os-vif, or nova}
work=$root/target/os-vif/$os_vif
shift

# Building writes beside the sources.
rm -rf "$work"/{source,site,*.whl}
mkdir -p "$work"
cp -rL "$here" "$work/source"

case $os_vif in
debian)
    python=/usr/bin/python3
    (cd "$work/source" && "$python" -c 'from setuptools import build_meta; build_meta.build_wheel("..")') \
        >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
    "$python" -m zipfile -e "$work"/*.whl "$work/site"
    export PYTHONPATH=$work/site
    ;;
*)
    python=$work/bin/python
    [ -x "$python" ] || /usr/bin/python3 -m venv "$work"
    case $os_vif in
    newest) wanted=os-vif ;;
    nova) wanted=nova ;;
    *) wanted=os-vif==$os_vif ;;
    esac
    "$python" -m pip install -q --upgrade "$wanted" oslotest testtools "$work/source"
    ;;
esac
export PYTHONDONTWRITEBYTECODE=1
reencode=$(dirname "$VHOSTD")/examples/reencode
[ $# != 0 ] || "$python" -W ignore "$root/crates/vif/testdata/crosscheck.py" "$reencode" 60
cd "$here/tests"
# OpenStack's libraries warn of each other.
unittest=("$python" -W ignore -W default::ResourceWarning -m unittest)
"${unittest[@]}" discover "$@"
[ "$os_vif" != nova ] || "${unittest[@]}" nova_boot "$@"
