#!/usr/bin/env python3
"""Writes schema.json, cases.jsonl and random.jsonl beside itself from the os-vif that is installed. See README.md."""

import importlib.metadata
import json
import pathlib
import random
import uuid
import warnings

import os_vif.objects
from os_vif.objects import base
from oslo_versionedobjects import base as ovo
from oslo_versionedobjects import fields

warnings.simplefilter("ignore")
os_vif.objects.register_all()

HERE = pathlib.Path(__file__).parent
CLASSES = {name: classes[0] for name, classes in sorted(ovo.VersionedObjectRegistry.obj_classes().items())
           if classes[0].OBJ_PROJECT_NAMESPACE == "os_vif"}


def envelope(name, data, version=None, **other):
    """An envelope; a keyword (changes, namespace …) replaces that key, None removes it."""
    keys = {"name": name, "namespace": "os_vif", "version": version or CLASSES[name].VERSION, "data": data, **other}
    return {f"versioned_object.{key}": value for key, value in keys.items() if value is not None}


def verdict(primitive):
    """What os-vif does with a primitive: its exception's name, or the primitive written again."""
    try:
        # A copy: the library keeps parts of what it is given.
        return {"ok": base.VersionedObject.obj_from_primitive(json.loads(json.dumps(primitive))).obj_to_primitive()}
    except Exception as error:  # which one it is, is the result
        name = type(error).__name__
        # Python stumbled over a value of the wrong type; nobody meant to tell these apart from ValueError.
        stumbled = name in ("TypeError", "AttributeError", "OverflowError")
        return {"exception": "ValueError" if stumbled else name}


# --- the schema -----------------------------------------------------------------------------------------------------

def field_type(kind):
    if isinstance(kind, fields.List):
        return {"list": field_type(kind._element_type._type)}
    if isinstance(kind, fields.Object):
        return {"subclass" if kind._subclasses else "object": kind._obj_name}
    if isinstance(kind, fields.Enum):
        return {"enum": list(kind.valid_values)}
    return type(kind).__name__


def field_schema(field):
    schema = {"type": field_type(field._type), "nullable": field.nullable}
    if field.default != fields.UnspecifiedDefault:
        schema["default"] = field.default
    return schema


def schema():
    return {name: {
        "version": cls.VERSION,
        "bases": [c.__name__ for c in cls.__mro__[1:] if c.__name__ in CLASSES],
        "fields": {field: field_schema(cls.fields[field]) for field in sorted(cls.fields)},
    } for name, cls in CLASSES.items()}


# --- cases ----------------------------------------------------------------------------------------------------------

NET = envelope("Network", {"id": "n"})
OVS = envelope("VIFPortProfileOpenVSwitch", {})

# (class, field, values): each is decoded alone in an object of that class.
VALUES = [
    ("InstanceInfo", "name", ["", "é\n\"", 5, -3, 0, True, False, 18446744073709551615, None, [], {}]),
    ("InstanceInfo", "uuid", ["", "not a uuid", "DC065497-3C8D-4F44-8FB4-E1D33C16A536", 5, True, None]),
    ("Network", "mtu", [0, -1, 9000, 1.9, -1.9, 1e18, True, "1500", " 1_500 ", "+5", "-0", "007", None, "", "big", "0x5",
                        "1.5", "1__0", "_1", "1_", "+ 5", "+-5", "--5", "-", [], {}]),
    ("Network", "subnets", [None, 5, [], {}, envelope("SubnetList", {}), envelope("SubnetList", {"objects": []}),
                            envelope("Subnet", {}), envelope("SubnetList", {"objects": None}),
                            envelope("SubnetList", {"objects": [None]}), envelope("SubnetList", {"objects": [5]}),
                            envelope("SubnetList", {"objects": [envelope("Subnet", {})]}),
                            envelope("SubnetList", {"objects": [envelope("Route", {})]})]),
    ("VIFBase", "active", [True, False, None, 0, 1, 0.0, -0.0, 0.5, -1]),
    ("VIFPortProfileK8sDPDK", "l3_setup", [True, None]),
    ("VIFBase", "address", ["22:52:25:62:E2:aa", "22-52-25-62-e2-aa", "22-52:25:62:e2:aa", None, "", "zz",
                            "2252.2562.e2aa", "22:52:25:62:e2", "22:52:25:62:e2:aa:bb", "22:52:25:62:e2:a",
                            "022:52:25:62:e2:a", "+2:52:25:62:e2:aa", " 22:52:25:62:e2:aa", 5, True, [], {}]),
    ("VIFBase", "network", [None, NET, envelope("Network", {}), envelope("Network", {}, "1.2"), OVS, "x", 5, [], {},
                            envelope("Network", {"mtu": 1, "subnets": envelope("SubnetList", {})}, "1.0")]),
    ("VIFBase", "port_profile", [None, OVS, NET, envelope("VIFPortProfileBase", {}), envelope("VIFPortProfileFPTap", {}),
                                 envelope("VIFPortProfileFPOpenVSwitch", {}), envelope("VIFBase", {}), 5, "x", [], {},
                                 envelope("VIFPortProfileOpenVSwitch", {"multiqueue": True}, "1.3"),
                                 envelope("VIFPortProfileOpenVSwitch", {}, "1.5")]),
    ("VIFPortProfileBase", "datapath_offload", [None, envelope("DatapathOffloadBase", {}), OVS,
                                                envelope("DatapathOffloadRepresentor", {"representor_name": None})]),
    ("VIFVHostUser", "mode", ["client", "server", "Server", "both", "", None, 5, True, [], {}]),
    ("VIFDirect", "mode", ["vepa", "passthrough", "bridge", "private"]),
    ("VIFDirect", "dev_address", ["0000:03:00.1", "0000:AB:1F.7", "0000:03:20.1", "0000:03:1f.8", "000:03:1f.1",
                                  "0000:03:1f.1.", "03:1f.1", "0000:03:1f", "", 5, None, [], {}]),
    ("FixedIP", "address", ["192.0.2.1", "255.255.255.255", "::", "::1", "::ffff", "::1:0", "::1.2.3.4", "::ffff:1.2.3.4",
                            "::ffff:0:1.2.3.4", "64:ff9b::1.2.3.4", "1:0:2::", "1:2:3:4:5:6:7::", "FE80::A", 5,
                            4294967295, 4294967296, True, None, "", "x", "192.0.2.1/32", "192.0.2", "192.0.2.256",
                            "192.0.2.01", "::01.2.3.4", " ::1", "fe80::1%eth0", "1::2:3:4:5:6:7:8", "12345::", ":::",
                            -1, 1.5, [], {}]),
    ("FixedIP", "floating_ips", [[], ["192.0.2.1", "::", 5], None, 5, True, "x", [None], [[]], ["x"], ["192.0.2.1", "x"]]),
    ("Route", "cidr", ["192.0.2.77/24", "192.0.2.77", "2001:db8::1", "2001:DB8::1/64", "192.0.2.0/0", "192.0.2.0/32",
                       "::/128", "192.0.2.7/255.255.0.0", "192.0.2.7/0.0.255.255", "192.0.2.7/0.0.0.0",
                       "192.0.2.7/255.255.255.255", "::/ffff::", "::/::ffff", "::/::", "192.0.2.7/ 2_4 ", "::/+64", "::/064",
                       "192.0.2.7/33", "::/129", "192.0.2.7/-1", "192.0.2.7/", "/24", "192.0.2.7/1/2", "192.0.2.7/x",
                       "192.0.2.7/255.0.255.0", "::/ffff:0:1::", "192.0.2.7/::", "::/255.0.0.0", "192.0.2/24", "",
                       5, True, None, [], {}]),
]

ENVELOPES = [
    ({}), (5), ("x"), (None), ([]),
    *(envelope("VIFVHostUser", {"vif_name": "a"}, version) for version in
      ["1.1", "1.0", "1", "01.00", "1.1.0", "1.0.9", "1.2", "1.1.5", "0.9", "2.0", "1.99999999999999999999", "", "abc",
       "1.", ".1", "1..0", "-1.0", 1.1, 1, True, [], {}]),
    *(envelope(name, {}, "1.0") for name in ["", "Nope", "VersionedObject", "vifvhostuser", 5, True]),
    *(envelope("VIFGeneric", {}, namespace=space) for space in ["nova_object", "", "OS_VIF", 5, [], {}]),
    *({key: value for key, value in envelope("VIFGeneric", {}).items() if not key.endswith(missing)}
      for missing in ["name", "namespace", "version", "data"]),
    *(envelope("VIFGeneric", data) for data in [5, True]),
    *(envelope("InstanceInfo", {"name": "x"}, changes=changes) for changes in
      [[], ["name"], ["name", "name"], ["uuid"], ["nope", "name"], ["name", 5, None, True], 5, True, [[]], [{}]]),
    {**envelope("InstanceInfo", {"name": "x"}), "versioned_object.changes": None},
    {**envelope("InstanceInfo", {"name": "x", "nope": {"a": [1]}}), "nope": 5},
    envelope("VIFBase", {"network": envelope("Network", {"id": "n"}, changes=["id"])}),
    envelope("HostInfo", {"plugin_info": [envelope("HostPluginInfo", {"plugin_name": "p"}, changes=["plugin_name"])]}),
    envelope("VIFGeneric", {"mode": "both", "vif_name": "a"}),
]

# What this crate refuses on purpose although os-vif accepts it: the list in lib.rs.
STRICTER = [
    *(envelope("VIFBase", {"active": value}) for value in ["false", "", [], {}]),
    *(envelope("InstanceInfo", {"name": value}) for value in [1.5, 1e20]),
    *(envelope("InstanceInfo", {"uuid": value}) for value in [1.5, [], {}]),
    *(envelope("Network", {"mtu": value}) for value in [2**63, -2**63 - 1, 1e30, "9223372036854775808", "٣"]),
    *(envelope("FixedIP", {"floating_ips": value}) for value in ["", {}, {"192.0.2.1": 1}]),
    envelope("FixedIP", {"address": 2**64}),
    *(envelope("VIFDirect", {"dev_address": value}) for value in ["0000:03:00x1", "0000:03:00.1\n"]),
    envelope("VIFBase", {"address": "22:52:25:62:e2:aa\n"}),
    *(envelope("VIFVHostUser", {}, version) for version in ["1.0a1", " 1.0", "1.0 "]),
    *(envelope("InstanceInfo", data) for data in [[], ""]),
    *(envelope("InstanceInfo", {}, changes=changes) for changes in ["", "name", {}]),
]


def cases():
    inputs = [envelope(cls, {field: value}) for cls, field, values in VALUES for value in values] + ENVELOPES
    for primitive in inputs:
        yield {"input": primitive, **verdict(primitive)}
    for primitive in STRICTER:
        assert "ok" in verdict(primitive), primitive
        yield {"input": primitive, "stricter": True}


# --- random objects -------------------------------------------------------------------------------------------------

def random_text(rng):
    return "".join(rng.choice("aZ09-_./ :é\u4e2d\n\"\\\0") for _ in range(rng.randrange(12)))


def random_ip(rng):
    if rng.random() < 0.5:
        return ".".join(str(rng.choice([0, 1, 255, rng.randrange(256)])) for _ in range(4))
    return ":".join(rng.choice(["0", "0", "ffff", f"{rng.randrange(65536):x}"]) for _ in range(8))


def random_network(rng):
    address = random_ip(rng)
    return f"{address}/{rng.randrange(129 if ':' in address else 33)}"


def random_value(rng, kind):
    if isinstance(kind, fields.List):
        return [random_value(rng, kind._element_type._type) for _ in range(rng.randrange(3))]
    if isinstance(kind, fields.Object):
        wanted = CLASSES[kind._obj_name]
        fitting = [cls for cls in CLASSES.values() if issubclass(cls, wanted)] if kind._subclasses else [wanted]
        return random_object(rng, rng.choice(fitting))
    if isinstance(kind, fields.Enum):
        return rng.choice(list(kind.valid_values))
    return {
        "String": lambda: random_text(rng),
        "UUID": lambda: str(uuid.UUID(int=rng.getrandbits(128))),
        "MACAddress": lambda: rng.choice(":-").join(f"{rng.randrange(256):02X}" for _ in range(6)),
        "PCIAddress": lambda: f"{rng.randrange(65536):04X}:{rng.randrange(256):02x}:{rng.randrange(32):02x}.{rng.randrange(8)}",
        "Integer": lambda: rng.choice([0, -1, 1500, rng.randrange(-2**63, 2**63)]),
        "Boolean": lambda: rng.random() < 0.5,
        "IPAddress": lambda: random_ip(rng),
        "IPNetwork": lambda: random_network(rng),
    }[type(kind).__name__]()


def random_object(rng, cls):
    """An object of that class with random fields unset, null or set, random changes, and sometimes an older label."""
    obj = cls()
    for name, field in cls.fields.items():
        chance = rng.random()
        if chance < 0.1 and field.nullable:
            setattr(obj, name, None)
        elif chance < 0.8:
            setattr(obj, name, random_value(rng, field._type))
    if rng.random() < 0.3:
        obj.obj_reset_changes()
    if rng.random() < 0.2:
        obj.VERSION = f"1.{rng.randrange(int(cls.VERSION.split('.')[1]) + 1)}"
    return obj


def random_primitives(count, seed):
    rng = random.Random(seed)
    for cls in list(CLASSES.values()) * count:
        yield random_object(rng, cls).obj_to_primitive()


def main():
    def lines(items):
        return "".join(json.dumps(item, sort_keys=True) + "\n" for item in items)

    (HERE / "schema.json").write_text(json.dumps(schema(), indent=1, sort_keys=True) + "\n")
    (HERE / "cases.jsonl").write_text(lines(cases()))
    (HERE / "random.jsonl").write_text(lines(random_primitives(3, seed=1)))
    print("written from", *(f"{name} {importlib.metadata.version(name)}" for name in ["os-vif", "oslo.versionedobjects"]))


if __name__ == "__main__":
    main()
