"""A clone becomes a guest of its own."""

import json
import random
import tempfile
from base64 import b64encode
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from guest.host import IDENTITY
from substrate_guest.identity import CA_VARIABLES, Identities, Identity, parse_identity, reseed
from substrate_guest.problems import BadInput

ENTROPY = bytes(range(64))


def told(**changed):
    return json.dumps(IDENTITY | changed).encode()


class FakeKernel:
    """A kernel that remembers what it was set to, or permits nothing."""

    def __init__(self, *, permits=True):
        self.permits = permits
        self.was_set = []

    def _set(self, value):
        if not self.permits:
            raise PermissionError(1, "Operation not permitted")
        self.was_set.append(value)

    set_clock = set_hostname = add_entropy = set_boot_id = set_machine_id = _set


def test_an_identity_is_what_the_node_says():
    identity = parse_identity(told(ca_pem="PEM", unknown="ignored, because nodes are upgraded separately"))
    assert identity == Identity(
        epoch_ns=1_700_000_000_000_000_000,
        entropy=ENTROPY,
        guest_id="inv-0123456789abcdef",
        hostname="guest",
        boot_id="5a1c0f6e-0000-4000-8000-000000000001",
        ca_pem="PEM",
        restored=True,
    )


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"nonsense", b"\xff", b'{"epoch_ns": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000]
)
def test_what_is_not_one_object_is_refused(body):
    with pytest.raises(BadInput, match="body: found"):
        parse_identity(body)


def test_every_problem_of_an_identity_is_said_at_once():
    wrong = {"epoch_ns": True, "entropy_b64": "AAAA", "guest_id": 1, "boot_id": None, "ca_pem": 2, "restored": "yes"}
    with pytest.raises(BadInput) as refused:
        parse_identity(json.dumps(wrong).encode())
    problems = {problem.path: problem.found for problem in refused.value.problems}
    assert problems.keys() == wrong.keys() | {"hostname"}
    assert problems["hostname"] == "nothing"


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
@pytest.mark.parametrize("member", sorted(IDENTITY))
def test_no_value_of_a_member_breaks_the_parser(member, value):
    try:
        problems = parse_identity(told(**{member: value})) and []
    except BadInput as refused:
        problems = refused.problems
    assert [problem.path for problem in problems] in ([], [member])


def test_random_numbers_and_temporary_names_depend_on_the_entropy():
    """Two clones of one process differ afterwards, and one told the same twice does not."""
    state = random.getstate()
    drawn = []
    for entropy in (b"a" * 64, b"b" * 64, b"a" * 64):
        random.setstate(state)
        reseed(entropy)
        drawn.append(random.random())
    assert drawn[0] != drawn[1]
    assert drawn[0] == drawn[2]

    names = tempfile._get_candidate_names()
    reseed(ENTROPY)
    assert tempfile._get_candidate_names() is not names


def test_a_vm_gets_entropy_clock_host_name_and_ids():
    kernel = FakeKernel()
    done = Identities(kernel, {}).adopt(parse_identity(told()))
    assert kernel.was_set == [ENTROPY, 1_700_000_000_000_000_000, "guest", IDENTITY["boot_id"], ENTROPY]
    assert done == dict.fromkeys(["entropy", "clock", "hostname", "boot_id", "machine_id"], "set") | {"ca": "none"}


def test_a_guest_without_the_privilege_goes_on_and_says_so():
    done = Identities(FakeKernel(permits=False), {}).adopt(parse_identity(told()))
    assert done["clock"] == done["hostname"] == done["entropy"] == "not set: Operation not permitted"


def test_a_process_guest_leaves_the_hosts_kernel_alone():
    assert Identities(None, {}).adopt(parse_identity(told()))["clock"] == "the host's"


def test_certificates_are_trusted_beside_the_systems(tmp_path, monkeypatch):
    """The variables replace the system's bundle for most of their readers, so both are in the file."""
    system = tmp_path / "system.pem"
    system.write_text("SYSTEM")
    monkeypatch.setattr("substrate_guest.identity.SYSTEM_BUNDLES", (str(tmp_path / "absent.pem"), str(system)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environ = {"SSL_CERT_FILE": "/the/workloads/own.pem"}
    identities = Identities(None, environ)

    bundle = Path(identities.adopt(parse_identity(told(ca_pem="OURS")))["ca"])
    assert bundle.read_text().split() == ["SYSTEM", "OURS"]
    assert bundle.parent.stat().st_mode & 0o077 == 0
    assert environ.pop("SSL_CERT_FILE") == "/the/workloads/own.pem"
    assert environ == {name: str(bundle) for name in CA_VARIABLES if name != "SSL_CERT_FILE"}

    identities.adopt(parse_identity(told(ca_pem="NEWER")))
    assert bundle.read_text().split() == ["SYSTEM", "NEWER"]


def test_the_bundle_is_one_that_openssl_can_load(tmp_path, monkeypatch):
    import ssl

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    certificate = trustme.CA().cert_pem.bytes().decode()
    bundle = Identities(None, {}).adopt(parse_identity(told(ca_pem=certificate)))["ca"]
    ssl.create_default_context(cafile=bundle)


def test_entropy_may_be_longer_but_not_shorter_than_a_seed():
    assert parse_identity(told(entropy_b64=b64encode(bytes(100)).decode())).entropy == bytes(100)
    with pytest.raises(BadInput, match="entropy_b64"):
        parse_identity(told(entropy_b64=b64encode(bytes(31)).decode()))
