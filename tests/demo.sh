#!/bin/bash
# `make demo`: builds what it needs, runs target/release/demo and leaves nothing behind, also when interrupted.
#
# Processes die with the program and the network namespace with its last process. What is left is files: all of them are
# in one directory, removed here.
set -euo pipefail
root=$(dirname "$(dirname "$(realpath "$0")")")
cd "$root"

if [ "$(id -u)" != 0 ]; then
    # As an ordinary user it all runs in a user namespace of its own, and needs two things from the machine.
    if ! unshare --user --map-root-user --net true 2>/dev/null; then
        echo "demo: this machine gives ordinary users no user namespaces: run as root" >&2
        exit 1
    fi
    if [ ! -r /dev/net/tun ] || [ ! -w /dev/net/tun ]; then
        echo "demo: /dev/net/tun is closed to you: run as root, or as root: chmod 666 /dev/net/tun" >&2
        exit 1
    fi
fi

tests/setup.sh build guest
cargo build --release -p vhostd -p e2e --bins

dir=$(mktemp -d /tmp/vhostd-demo.XXXXXX)
trap 'rm -rf "$dir"' EXIT
# In the background, because bash runs a trap only when no command in the foreground keeps it; and in a session of its own,
# or the guests would be interrupted, too, and the demo wonder where they went.
TMPDIR=$dir setsid "${CARGO_TARGET_DIR:-$root/target}/release/demo" &
demo=$!
trap 'echo "demo: interrupted" >&2; kill "$demo" 2>/dev/null || true; wait "$demo" || true; exit 130' INT TERM HUP
wait "$demo"
