"""A workload's identity is the bytes that travel, and nothing else."""

import hashlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate_seam.invocation import Isolation, WorkloadRef
from substrate_seam.workload import EgressRules, Workload, WorkloadSpec

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)
WORDS = st.text(st.characters(codec="utf-8"), max_size=20)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "env": st.dictionaries(WORDS, WORDS, max_size=4),
        "image": WORDS,
        "guest": st.sampled_from(["substrate", "go-shim"]),
        "isolation": st.none() | st.sampled_from(Isolation),
        "vcpus": st.integers(1, 32),
        "memory_mib": st.integers(1, 1 << 20),
        "concurrency": st.integers(1, 4096),
        "queue": st.integers(0, 4096),
        "pool": st.integers(0, 64),
        "warm_base": st.booleans(),
        "ready_path": WORDS,
        "sessioned": st.booleans(),
        "egress": st.none() | st.builds(EgressRules, allow=st.lists(WORDS).map(tuple), deny=st.lists(WORDS).map(tuple)),
        "requires": st.lists(WORDS, max_size=3).map(tuple),
    },
)


DEFAULTS = msgspec.json.decode(
    msgspec.json.encode(
        {
            field.name: field.default
            for field in msgspec.structs.fields(WorkloadSpec)
            if field.default is not msgspec.NODEFAULT
        }
    )
)


@st.composite
def specs(draw):
    """Any spec that names exactly one guest."""
    guest = draw(
        st.fixed_dictionaries({"command": st.lists(WORDS, min_size=1, max_size=4).map(tuple)})
        | st.fixed_dictionaries({"rootfs_path": WORDS})
    )
    return WorkloadSpec(name=draw(NAMES), **guest, **draw(OPTIONS))


@given(specs())
def test_a_workload_survives_the_journey(spec):
    """Parsing the sealed bytes gives the same spec, the same bytes and the same digest."""
    sealed = Workload.of(spec)
    arrived = Workload.parse(sealed.raw)
    assert (arrived.spec, arrived.raw, arrived.digest) == (spec, sealed.raw, sealed.digest)
    assert arrived == sealed
    assert hash(arrived) == hash(sealed)


@given(specs())
def test_the_digest_is_the_sha256_of_the_bytes(spec):
    """Anybody can check it with no code of ours."""
    sealed = Workload.of(spec)
    assert sealed.digest == hashlib.sha256(sealed.raw).hexdigest()
    assert sealed.ref == WorkloadRef(spec.name, sealed.digest)


@given(specs())
def test_the_bytes_are_sorted_json_without_defaults(spec):
    """Equal specs have equal bytes: keys in order at every depth, and nothing that goes without saying."""
    written = json.loads(Workload.of(spec).raw)
    assert list(written) == sorted(written)
    assert list(written.get("env", {})) == sorted(written.get("env", {}))
    assert not [name for name, default in DEFAULTS.items() if name in written and written[name] == default]
    assert written.get("env") != {}


@pytest.mark.parametrize("defaults", [{"memory_mib": 2048}, {"ready_path": "/shim/ready"}, {"env": {}}])
def test_a_default_spelled_out_changes_no_byte(defaults):
    """Defaults are left out by their value, wherever that value came from."""
    spelled_out = json.loads(json.dumps(defaults))
    assert Workload.of(WorkloadSpec(name="x", command=("x",), **spelled_out)).raw == b'{"command":["x"],"name":"x"}'


@given(specs(), st.randoms())
def test_the_order_in_which_env_is_written_does_not_matter(spec, order):
    """The environment is a set of pairs; shuffling it changes no byte."""
    pairs = list(spec.env.items())
    order.shuffle(pairs)
    assert Workload.of(msgspec.structs.replace(spec, env=dict(pairs))) == Workload.of(spec)


@given(specs(), specs())
def test_different_specs_have_different_digests(one, other):
    """A digest names one spec."""
    assert (Workload.of(one).digest == Workload.of(other).digest) == (one == other)


@given(specs(), st.dictionaries(st.from_regex(r"zz[a-z]{1,8}", fullmatch=True), st.integers(), min_size=1))
def test_what_a_newer_plane_added_keeps_its_bytes(spec, added):
    """An unknown field is tolerated, and stays part of the digest although we cannot decode it."""
    raw = json.dumps({**json.loads(Workload.of(spec).raw), **added}).encode()
    arrived = Workload.parse(raw)
    assert arrived.spec == spec
    assert arrived.raw == raw
    assert arrived.digest == hashlib.sha256(raw).hexdigest()
    assert arrived != Workload.of(spec)


@pytest.mark.parametrize("guests", [{}, {"command": ("x",), "rootfs_path": "/x"}], ids=["neither", "both"])
def test_a_spec_has_exactly_one_kind_of_guest(guests):
    """No spec can say neither or both, whether it is built here or decoded."""
    with pytest.raises(ValueError, match="exactly one of `command` and `rootfs_path`"):
        WorkloadSpec(name="x", **guests)
    with pytest.raises(msgspec.ValidationError, match="exactly one of"):
        Workload.parse(msgspec.json.encode({"name": "x", **guests}))


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "a b", "a\n", "ä", "a" * 64, "../a"])
def test_a_name_that_could_mislead_is_refused_on_arrival(name):
    """Names become parts of paths and URLs: letters, digits, dot, underscore and dash, 63 at most."""
    with pytest.raises(msgspec.ValidationError, match="name"):
        Workload.parse(msgspec.json.encode({"name": name, "command": ["x"]}))


@pytest.mark.parametrize(("field", "value"), [("vcpus", 0), ("memory_mib", -1), ("concurrency", 0), ("pool", -1)])
def test_impossible_numbers_are_refused_on_arrival(field, value):
    """A node never sees a workload without room to run."""
    with pytest.raises(msgspec.ValidationError, match=field):
        Workload.parse(msgspec.json.encode({"name": "x", "command": ["x"], field: value}))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_workload_are_an_error_of_msgspec(raw):
    """Whatever arrives, a node has two exceptions to catch."""
    try:
        Workload.parse(raw)
    except (msgspec.ValidationError, msgspec.DecodeError):
        return
