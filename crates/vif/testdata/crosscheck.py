#!/usr/bin/env python3
"""Compares this crate with the os-vif that is installed, on random and on damaged objects. See README.md.

crosscheck.py REENCODE [COUNT [SEED]], where REENCODE is the built example `reencode`; without a seed, others each time."""

import collections
import json
import logging
import random
import subprocess
import sys
import time

from generate import HERE, envelope, random_primitives, schema, verdict

# An older os-vif refuses versions that this crate reads.
IS_OLDER = schema() != json.loads((HERE / "schema.json").read_text())

# netaddr before 1.0 reads abbreviated networks; later ones do not, and neither do we.
ABBREVIATED = ("is not an IP network (address/prefix)",) if "ok" in verdict(envelope("Route", {"cidr": "1.4"})) else ()

# What lib.rs lists as refused although os-vif accepts it, by the end of our message.
STRICTER = ("is not true or false", "is not text", "is not an integer of 64 bits", "is not a PCI address (dddd:bb:dd.f)",
            "is not a list", "is not an IP address", "is not a map", "is not a list of field names", *ABBREVIATED)

JUNK = [None, True, False, 0, 1, -1, 5, 1500, 2**32, 2**40, 0.0, 1.9, 1e18, "", "x", "1", " 2_4 ", "true", "client", "server",
        "1.0", "1.1", "1.4", "2.0", "1.0.1", "os_vif", "192.0.2.1", "192.0.2.1/24", "::1/64", "22:52:25:62:E2:AA",
        "0000:03:00.1", "name", [], ["x"], ["192.0.2.1"], [None], {}, {"x": 1},
        envelope("Network", {}), envelope("SubnetList", {"objects": []}), envelope("VIFPortProfileBase", {}),
        envelope("VIFPortProfileFPTap", {"mac_address": None}), envelope("VIFVHostUser", {}), envelope("Nope", {}, "1.0")]


def places(tree):
    """All (container, key) of a tree, and one for the root."""
    yield from ((tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree))))
    for inner in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def damage(rng, primitive):
    container, key = rng.choice(list(places(primitive)))
    chance = rng.random()
    if chance < 0.1:
        del container[key]
    elif chance < 0.2 and isinstance(container, dict):
        container[rng.choice(["nope", "versioned_object.nope"])] = container.pop(key)
    elif chance < 0.3 and isinstance(container[key], str) and container[key]:
        text, at = container[key], rng.randrange(len(container[key]))
        container[key] = text[:at] + rng.choice(["", " ", "0", "f", ":", ".", "/", "-", "_", "x"]) + text[at + 1:]
    else:
        container[key] = rng.choice(JUNK)
    return primitive


def normal(tree):
    """`changes` is a set."""
    if isinstance(tree, dict):
        return {key: sorted(value) if key.endswith(".changes") else normal(value) for key, value in tree.items()}
    return [normal(item) for item in tree] if isinstance(tree, list) else tree


def ours(reencode, primitives):
    lines = "".join(json.dumps(primitive) + "\n" for primitive in primitives)
    answer = subprocess.run([reencode], input=lines, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in answer.splitlines()]


def compare(primitive, theirs, answer, seen):
    """Whether the two verdicts agree; counts them by kind."""
    if "ok" in theirs and "ok" in answer:
        seen["both accept"] += 1
        written = answer["ok"]
        # What we write, os-vif reads, and has the same object.
        return normal(written) == normal(theirs["ok"]) == normal(verdict(written).get("ok"))
    if "exception" in theirs and "exception" in answer:
        seen[f"both refuse, {theirs['exception']}"] += 1
        # We refuse an object of the wrong class before reading it, any version but plain numbers as none at all, and a
        # name that is no text as unknown.
        early = "is not of class" in answer["message"] or answer["exception"] in ("UnsupportedObjectError", "InvalidVersion")
        return theirs["exception"] == answer["exception"] or early
    if IS_OLDER and "ok" in answer and theirs["exception"] == "IncompatibleObjectVersion":
        seen["newer than that os-vif"] += 1
        return True
    message = answer.get("message", "")
    end = next((end for end in STRICTER if message.endswith(end)), "is not a version" if "is not a version" in message else None)
    seen[f"we refuse, {end}"] += 1
    return "ok" in theirs and end is not None


def main():
    # The library logs each class that it does not know.
    logging.disable()
    reencode, count, seed = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20, int((sys.argv[3:] or [time.time()])[0])
    rng = random.Random(seed)
    primitives = list(random_primitives(count, seed))
    damaged = [damage(rng, json.loads(json.dumps(primitive))) for primitive in primitives for _ in range(5)]
    seen, failed = collections.Counter(), 0
    for inputs, must_be_ok in ((primitives, True), (damaged, False)):
        for primitive, answer in zip(inputs, ours(reencode, inputs), strict=True):
            theirs = verdict(primitive)
            if not compare(primitive, theirs, answer, seen) or (must_be_ok and "ok" not in answer):
                failed += 1
                print("DIFFER", json.dumps({"input": primitive, "os-vif": theirs, "ours": answer}))
    for kind, times in sorted(seen.items()):
        print(f"{times:8} {kind}")
    print(f"{failed} differ (seed {seed})")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()
