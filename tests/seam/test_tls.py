"""The wire's certificates: what cannot be used is named, and plain text needs a reason."""

import ssl

import pytest
import trustme

from substrate_seam.tls import CertificateUnusable, client_context, plaintext_refusal, server_context


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A certificate, its key and the authority, as files."""
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("node-1")
    paths = {name: directory / f"{name}.pem" for name in ("cert", "key", "ca")}
    issued.cert_chain_pems[0].write_to_path(paths["cert"])
    issued.private_key_pem.write_to_path(paths["key"])
    authority.cert_pem.write_to_path(paths["ca"])
    return paths


def test_both_ends_want_the_others_certificate_and_no_old_protocol(files):
    client, server = client_context(**files), server_context(**files)
    assert (client.verify_mode, server.verify_mode) == (ssl.CERT_REQUIRED, ssl.CERT_REQUIRED)
    assert client.check_hostname
    assert client.minimum_version == server.minimum_version == ssl.TLSVersion.TLSv1_3


def test_nobody_elses_authority_is_trusted(files):
    """Not even those that the system trusts."""
    assert len(client_context(**files).get_ca_certs()) == 1


@pytest.mark.parametrize("make", [client_context, server_context])
@pytest.mark.parametrize("which", ["cert", "key", "ca"])
@pytest.mark.parametrize("content", [None, b"", b"nonsense", "another"])
def test_a_file_that_cannot_be_used_is_named(files, tmp_path, make, which, content):
    """Missing, empty, no PEM, or a key of another certificate."""
    bad = tmp_path / f"bad-{which}.pem"
    if content == "another" and which == "key":
        trustme.CA().issue_cert("node-1").private_key_pem.write_to_path(bad)
    elif content == "another":
        bad.write_bytes(files["key"].read_bytes())
    elif content is not None:
        bad.write_bytes(content)
    with pytest.raises(CertificateUnusable, match=f"bad-{which}"):
        make(**files | {which: bad})


def test_a_key_behind_a_password_is_refused_instead_of_asked_for(files, tmp_path):
    """Nobody sits at the terminal of a daemon."""
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files["key"].read_bytes(), password=None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(CertificateUnusable, match="locked"):
        client_context(**files | {"key": locked})


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("loopback", [True, False])
@pytest.mark.parametrize("insecure", [True, False])
def test_plain_text_stays_on_one_machine_unless_the_network_is_trusted(tls, loopback, insecure):
    refusal = plaintext_refusal("NODE_", tls=tls, loopback=loopback, insecure=insecure)
    assert (refusal is None) == (tls or loopback or insecure)
    assert refusal is None or "NODE_TLS_CERT_FILE" in refusal
