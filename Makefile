# Each target gets the machine ready for itself (tests/setup.sh): a bare Debian 12 with Rust will do.
#
#   demo    two QEMU guests and the host on one network, ten minutes from a fresh clone
#   test    all tests, and instructions of a burst against stored values
#   nova    the os-vif plugin with PyPI's newest os-vif, with 4.3.1, and with nova: two guests as nova starts them
#   soak    the tests from outside with the full counts where `test` runs a part of them, those of changing and vanishing
#           memory under AddressSanitizer, Miri, half an hour a fuzz target
#   bench   criterion benches, start-up, memory and plugs, then the same traffic through vhostd and its peers, and latencies
#   lint    format, clippy and docs, warnings are errors
#
# test, nova and lint build the dev profile, demo, soak and bench the release profile, each once.

export CARGO_TARGET_DIR ?= $(CURDIR)/target

# The notification protocols and the workers' mailbox, every interleaving.
MODELS = RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/loom \
	cargo test -p vring -p dataplane --lib --release models
# Accesses to memory that is not ours, while a guest changes what is looked at or takes it away; memory never freed.
ASAN = RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/asan \
	cargo +nightly test --target $$(rustc -vV | sed -n 's/^host: //p') -p e2e --test hostile_race --test hostile_memory
# Undefined behaviour in the rings' logic.
MIRI = CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/miri cargo +nightly miri test -p vring --lib

# Instructions of a burst against stored values, under callgrind.
INSTRUCTIONS = { command -v valgrind || { apt-get update -q && apt-get install -y -q --no-install-recommends valgrind; }; } >/dev/null \
	&& cargo run -q --release -p benches --bin instructions

# Tests of what this machine's kernel may lack, in a guest with Debian's (tests/src/bin/guest.rs): test binaries, then
# names of tests, or parts of them.
IN_GUEST = --test host --test ovs --test ovs_vif --test device --test linux_bridge -- \
	vlan:: bridge::made either_datapath netdevsim test_guest igb:: kernel:: a_vlan_of_the_uplink

.PHONY: demo test nova soak bench lint

demo:
	tests/demo.sh

# All targets in one build, so that the features of dependencies are the same for the daemon and for the tests.
test:
	tests/setup.sh build guest netdevsim igb dpdk ovs ovn lldpad fuzz python
	cargo build --workspace --bins --tests
	cargo test --workspace
	cargo test --workspace --config 'target."cfg(unix)".runner = "$(CARGO_TARGET_DIR)/debug/guest"' $(IN_GUEST)
	integrations/os-vif/check.sh debian
	$(MODELS)
	$(INSTRUCTIONS)
	tests/fuzz/run.sh 20

nova:
	tests/setup.sh build guest ovs python nova
	cargo build --workspace --bins --examples
	integrations/os-vif/check.sh newest
	integrations/os-vif/check.sh 4.3.1
	integrations/os-vif/check.sh nova

soak:
	tests/setup.sh build guest dpdk ovs ovn lldpad fuzz
	cargo build --release --workspace --bins --tests
	VHOSTD_SOAK=1 cargo test --release -p e2e -p vhost-user
	VHOSTD_SOAK=1 $(ASAN)
	$(MIRI)
	tests/fuzz/run.sh 1800

bench:
	tests/setup.sh build dpdk ovs
	cargo bench -p benches
	cargo build --release -p vhostd -p benches
	$(CARGO_TARGET_DIR)/release/footprint
	$(CARGO_TARGET_DIR)/release/plugs
	$(CARGO_TARGET_DIR)/release/peers
	$(CARGO_TARGET_DIR)/release/virtio_user
	$(CARGO_TARGET_DIR)/release/latency

lint:
	tests/setup.sh build lint
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
