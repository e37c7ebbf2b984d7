"""`fc-invoke image build`: from a path or a registry to a root file system, whatever the registry does."""

from __future__ import annotations

import base64
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.images import FakeImage, digest_of, file, folder, gzipped, index_of, layer, write_layout
from fakes.registry import FakeRegistry, serving
from fc_invoke import imaging, main
from fc_invoke.credentials import Login, LoginUnusable, login_for
from fc_invoke.imaging import ImageRequest, ProgressLine, build
from fc_invoke.registry import Reference, RegistryUnavailable, pulled
from real_parts import needs
from substrate_guest.tree import NoTree, guest_tree
from substrate_node.images import ARCHITECTURES, Built, ImageStore, ImageUnusable, Limits, Progress

HERE = ARCHITECTURES[platform.machine()]
BASE = layer(folder("etc"), file("etc/os-release", b"ID=test\n"))
TOP = layer(file("app", os.urandom(300_000), mode=0o755))
BLOB = gzipped(TOP)


@pytest.fixture
def image() -> FakeImage:
    """An image for this machine, of a small layer and a larger one."""
    return FakeImage(BASE, TOP, architecture=HERE)


@pytest.fixture
def registry(image):
    """A registry that has the image as `team/app:1`."""
    with serving(FakeRegistry()) as registry:
        registry.put(image, "1")
        yield registry


class Puller:
    """Pulls and builds as `fc-invoke image build` does; pauses are noted instead of waited for."""

    def __init__(self, registry: FakeRegistry, root: Path) -> None:
        self.registry = registry
        self.root = root
        self.login: Login | None = None
        self.pauses_s: list[float] = []
        self.pause = self.pauses_s.append
        self.told: list[Progress] = []

    def pull(self, name: str = "team/app:1", limits: Limits | None = None) -> Built:
        """Build `name` of the registry."""
        with pulled(
            Reference.of(f"{self.registry.address}/{name}"),
            into=self.root / "pulls",
            architecture=HERE,
            login=self.login,
            limits=limits or Limits(),
            report=self.told.append,
            pause=self.pause,
        ) as image:
            return ImageStore(self.root / "sha256").build(
                image, extra=None, size_bytes=None, limits=limits or Limits(), report=self.told.append
            )

    def kept(self) -> list[str]:
        """What pulls have left, by name."""
        return sorted(path.name for path in (self.root / "pulls").rglob("*") if path.is_file())


@pytest.fixture
def puller(registry, tmp_path) -> Puller:
    """Pulls from that registry."""
    return Puller(registry, tmp_path)


# --- what is pulled ------------------------------------------------------------------------------------------------


def test_a_pulled_image_is_the_one_of_the_same_layout_bit_for_bit(puller, image, tmp_path):
    path = write_layout(tmp_path / "layout", image)
    request = ImageRequest(
        image=str(path),
        name=None,
        init=None,
        size_bytes=None,
        state_root=tmp_path / "other",
        docker_config=tmp_path / "none",
        plain_http=False,
    )
    local = build(request, report=lambda _: None)
    assert puller.pull().rootfs.read_bytes() == local.rootfs.read_bytes()
    assert puller.pull().manifest.image == image.digest
    assert puller.kept() == []


def test_what_is_there_already_is_not_pulled_again(puller):
    first = puller.pull()
    layers = [digest_of(gzipped(BASE)), digest_of(BLOB)]
    assert [len(puller.registry.asked(digest)) for digest in layers] == [1, 1]
    assert puller.pull().rootfs == first.rootfs
    assert [len(puller.registry.asked(digest)) for digest in layers] == [1, 1]


def test_an_image_can_be_named_by_its_digest(puller, image):
    assert puller.pull(f"team/app@{image.digest}").manifest.image == image.digest
    assert puller.registry.asked("/manifests/1") == []


def test_of_an_index_the_image_for_this_machine_is_pulled(puller, image):
    other = FakeImage(layer(), architecture="s390x")
    puller.registry.put(other)
    puller.registry.put_index(index_of(other.described(), image.described()), "all")
    assert puller.pull("team/app:all").manifest.image == image.digest
    puller.registry.put_index(index_of(other.described()), "foreign")
    with pytest.raises(ImageUnusable, match=rf"no image for linux/{HERE}; it has linux/s390x"):
        puller.pull("team/app:foreign")


def test_progress_tells_of_each_blob_that_is_pulled(puller):
    puller.pull()
    pulls = [one for one in puller.told if one.step == "pull" and one.item == digest_of(BLOB)[7:19]]
    assert (pulls[-1].done_bytes, pulls[-1].total_bytes) == (len(BLOB), len(BLOB))


# --- interruptions -------------------------------------------------------------------------------------------------


def test_a_download_that_breaks_off_goes_on_where_it_stopped(puller):
    puller.registry.cuts[digest_of(BLOB)] = [100_000, 50_000]
    puller.pull()
    ranges = [request.headers.get("range") for request in puller.registry.asked(digest_of(BLOB))]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert len(puller.pauses_s) == 2


def test_a_registry_that_knows_no_ranges_is_asked_for_all_of_it_again(puller):
    puller.registry.ranges = False
    puller.registry.cuts[digest_of(BLOB)] = [100_000]
    assert puller.pull().manifest.image


def test_a_build_that_was_broken_off_by_the_network_is_resumed_by_the_next_command(puller):
    puller.registry.cuts[digest_of(BLOB)] = [100_000, 0, 0, 0, 0, 0]
    with pytest.raises(RegistryUnavailable, match=r"Run the command again: it goes on where it stopped"):
        puller.pull()
    assert f"{digest_of(BLOB).removeprefix('sha256:')}.partial" in puller.kept()
    puller.registry.requests.clear()
    puller.registry.cuts.clear()
    puller.pull()
    assert [request.headers.get("range") for request in puller.registry.asked(digest_of(BLOB))] == ["bytes=100000-"]
    assert puller.registry.asked(digest_of(gzipped(BASE))) == []  # it was complete
    assert puller.kept() == []


def test_a_kept_part_that_was_wrong_is_fetched_again_from_the_beginning(puller, image):
    place = puller.root / "pulls" / image.digest.removeprefix("sha256:")
    place.mkdir(parents=True)
    (place / f"{digest_of(BLOB).removeprefix('sha256:')}.partial").write_bytes(b"wrong" * 1000)
    puller.pull()
    ranges = [request.headers.get("range") for request in puller.registry.asked(digest_of(BLOB))]
    assert ranges == ["bytes=5000-", None]


def test_a_kept_part_that_is_too_long_is_thrown_away(puller, image):
    place = puller.root / "pulls" / image.digest.removeprefix("sha256:")
    place.mkdir(parents=True)
    (place / f"{digest_of(BLOB).removeprefix('sha256:')}.partial").write_bytes(BLOB + b"more")
    puller.pull()
    assert puller.registry.asked(digest_of(BLOB))[0].headers.get("range") is None


def test_pulls_that_nobody_took_up_again_are_removed_after_a_week(puller):
    stale = puller.root / "pulls" / "aa"
    stale.mkdir(parents=True)
    (stale / "blob.partial").write_bytes(b"x")
    os.utime(stale, (1, 1))
    puller.pull()
    assert not stale.exists()


def test_a_busy_registry_is_asked_again_when_it_says(puller):
    puller.registry.statuses["/v2/team/app/manifests/1"] = [429, 503]
    puller.pull()
    assert puller.pauses_s == [7.0, 7.0]


def test_a_registry_that_stays_broken_is_given_up_with_its_own_words(puller):
    puller.registry.statuses["/v2/team/app/manifests/1"] = [500] * 5
    with pytest.raises(RegistryUnavailable, match=r"can't be used: it answered 500 \(Internal Server Error\)"):
        puller.pull()


def test_a_registry_that_is_not_there_is_named(puller):
    puller.registry.address = "127.0.0.1:9"
    with pytest.raises(RegistryUnavailable, match=r"127.0.0.1:9 can't be used: .*refused"):
        puller.pull()
    assert puller.pauses_s == [0.5, 1.0, 2.0, 4.0]


# --- lies ----------------------------------------------------------------------------------------------------------


def test_a_layer_that_is_not_its_digest_is_refused_and_nothing_is_left(puller):
    puller.registry.lies[digest_of(BLOB)] = [bytes(len(BLOB))]
    with pytest.raises(ImageUnusable, match=rf"the registry sent sha256:.* for {digest_of(BLOB)}"):
        puller.pull()
    assert puller.kept() == []
    assert list((puller.root / "sha256").iterdir()) == []


def test_a_layer_that_is_longer_than_promised_is_refused(puller):
    puller.registry.lies[digest_of(BLOB)] = [BLOB + b"more"]
    with pytest.raises(ImageUnusable, match=rf"is longer than the {len(BLOB)} bytes promised"):
        puller.pull()


def test_a_manifest_that_is_not_its_digest_is_refused_however_it_was_named(puller, image):
    other = FakeImage(layer(), architecture=HERE).manifest
    puller.registry.lies["1"] = [other]
    with pytest.raises(ImageUnusable, match=r"the registry sent sha256:.* for sha256:"):
        puller.pull()
    puller.registry.lies[image.digest] = [other]
    with pytest.raises(ImageUnusable, match=rf"the registry sent {digest_of(other)} for {image.digest}"):
        puller.pull(f"team/app@{image.digest}")


def test_a_manifest_of_another_kind_or_without_end_is_refused(puller):
    puller.registry.manifests["old"] = ("application/vnd.docker.distribution.manifest.v1+prettyjws", b"{}")
    with pytest.raises(ImageUnusable, match=r"is of type '.*prettyjws'; accepted are application/vnd"):
        puller.pull("team/app:old")
    with pytest.raises(ImageUnusable, match=r"is over 100 bytes long"):
        puller.pull(limits=Limits(document_bytes=100))


def test_what_is_not_there_is_said_to_be_missing(puller):
    with pytest.raises(ImageUnusable, match=r"the registry has no such image \(MANIFEST_UNKNOWN manifest unknown\)"):
        puller.pull("team/app:2")
    del puller.registry.blobs[digest_of(BLOB)]
    with pytest.raises(ImageUnusable, match=rf"no {digest_of(BLOB)}, a part of the image"):
        puller.pull()


# --- logins --------------------------------------------------------------------------------------------------------


def test_a_token_for_anybody_is_fetched_where_the_registry_sends_us(puller):
    puller.registry.auth = "bearer"
    puller.pull()
    assert len(puller.registry.asked("/token")) == 1
    assert "authorization" not in puller.registry.asked("/token")[0].headers


def test_a_login_is_shown_only_to_the_token_service(puller):
    puller.registry.auth, puller.registry.anonymous = "bearer", False
    puller.registry.users["ann"] = "s3cret"
    puller.login = Login(username="ann", password="s3cret")
    puller.pull()
    shown = {request.headers.get("authorization", "").partition(" ")[0] for request in puller.registry.asked("/v2/")}
    assert shown == {"", "Bearer"}


def test_an_identity_token_is_exchanged(puller):
    puller.registry.auth, puller.registry.anonymous = "bearer", False
    puller.registry.refresh_tokens.add("long-lived")
    puller.login = Login(identity_token="long-lived")
    puller.pull()
    assert [request.method for request in puller.registry.asked("/token")] == ["POST"]


def test_a_token_that_expires_is_renewed(puller):
    puller.registry.auth = "bearer"
    puller.registry.cuts[digest_of(BLOB)] = [1000]

    def expire(_: float) -> None:
        puller.registry.tokens.clear()
        puller.registry.tokens.add("somebody else's")

    puller.pause = expire
    puller.pull()
    assert len(puller.registry.asked("/token")) == 2


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_wrong_login_is_refused_with_the_command_that_mends_it(puller, auth):
    puller.registry.auth, puller.registry.anonymous = auth, False
    puller.login = Login(username="ann", password="wrong")
    with pytest.raises(ImageUnusable, match=rf"Run `docker login {puller.registry.address}`") as refused:
        puller.pull()
    assert "wrong" not in str(refused.value)


def test_basic_authentication_works_with_a_login_and_asks_for_one(puller):
    puller.registry.auth = "basic"
    with pytest.raises(ImageUnusable, match=r"wants a name and a password. Run `docker login"):
        puller.pull()
    puller.registry.users["ann"] = "s3cret"
    puller.login = Login(username="ann", password="s3cret")
    puller.pull()


def test_a_redirect_to_another_host_does_not_take_our_login_along(puller, image):
    puller.registry.auth = "bearer"
    with serving(FakeRegistry()) as storage:
        storage.blobs = image.blobs
        puller.registry.storage = storage.address
        puller.pull()
        assert storage.requests
        assert all("authorization" not in request.headers for request in storage.requests)


def test_a_token_service_without_tls_is_not_trusted_by_a_registry_with_it():
    from fc_invoke.registry import _Repository

    with httpx.Client() as client:
        there = Reference.of("registry.example/team/app")
        source = _Repository(client, there, there.url(plain_http=False), None, lambda _: None)
        with pytest.raises(RegistryUnavailable, match=r"sends us for a token to 'http://evil.example/t': not safe"):
            source._authorize(['Bearer realm="http://evil.example/t"'])
        with pytest.raises(RegistryUnavailable, match=r"wants negotiate; accepted are Bearer and Basic"):
            source._authorize(["Negotiate"])


# --- names and logins ----------------------------------------------------------------------------------------------

REFERENCES = {
    "alpine": "docker.io/library/alpine:latest",
    "team/app": "docker.io/team/app:latest",
    "docker.io/alpine:3": "docker.io/library/alpine:3",
    "localhost/app": "localhost/app:latest",
    "registry.example/a/b/c:v1.2": "registry.example/a/b/c:v1.2",
    "registry.example:5000/app": "registry.example:5000/app:latest",
    "[::1]:5000/app:x": "[::1]:5000/app:x",
    f"r.example/app:1@sha256:{'a' * 64}": f"r.example/app@sha256:{'a' * 64}",
}


@pytest.mark.parametrize("text", REFERENCES)
def test_a_reference_is_read_as_docker_reads_it(text):
    assert str(Reference.of(text)) == REFERENCES[text]


@pytest.mark.parametrize(
    "text", ["", "App", "a//b", "a:b:c", "r.example/", "a@sha256:zz", "../etc", "a b", "-", "x/./y"]
)
def test_what_names_no_image_is_refused(text):
    with pytest.raises(ImageUnusable, match=r"accepted"):
        Reference.of(text)


@given(st.text(max_size=40))
def test_no_text_makes_a_reference_that_leaves_its_place_in_a_url(text):
    try:
        reference = Reference.of(text)
    except ImageUnusable:
        return
    url = httpx.URL(f"{reference.url(plain_http=False)}/manifests/{reference.tag}")
    assert url.path == f"/v2/{reference.repository}/manifests/{reference.tag}"
    assert not url.query
    assert not url.userinfo


def test_tls_is_left_out_only_on_this_machine_or_when_told():
    assert Reference.of("127.0.0.1:5000/a").url(plain_http=False).startswith("http://127.0.0.1:5000/")
    assert Reference.of("localhost/a").url(plain_http=False).startswith("http://localhost/")
    assert Reference.of("127.0.0.1.example/a").url(plain_http=False).startswith("https://")
    assert Reference.of("alpine").url(plain_http=False) == "https://registry-1.docker.io/v2/library/alpine"
    assert Reference.of("r.example/a").url(plain_http=True).startswith("http://r.example/")


def written(where: Path, **kept: object) -> Path:
    path = where / "config.json"
    path.write_text(json.dumps(kept))
    return path


def test_logins_are_read_from_where_docker_keeps_them(tmp_path):
    auth = base64.b64encode(b"ann:s3:cret").decode()
    path = written(
        tmp_path,
        auths={
            "r.example": {"auth": auth},
            "https://old.example": {"username": "bob", "password": "x"},
            "t.example": {"auth": base64.b64encode(b"<token>:").decode(), "identitytoken": "long"},
            "https://index.docker.io/v1/": {"auth": auth},
            "empty.example": {},
        },
    )
    assert login_for("r.example", path) == Login(username="ann", password="s3:cret")
    assert login_for("old.example", path) == Login(username="bob", password="x")
    assert login_for("t.example", path).identity_token == "long"
    assert login_for("docker.io", path).username == "ann"
    assert login_for("empty.example", path) is None
    assert login_for("other.example", path) is None
    assert login_for("r.example", tmp_path / "absent.json") is None


def test_a_login_never_shows_its_secrets():
    assert "s3cret" not in repr(Login(username="ann", password="s3cret", identity_token="s3cret"))


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": 1}', '{"auths": {"r.example": {"auth": "%%%"}}}'])
def test_a_damaged_configuration_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(LoginUnusable, match=r"config.json"):
        login_for("r.example", path)


def test_a_credential_helper_is_asked(tmp_path, monkeypatch):
    helper = tmp_path / "docker-credential-test"
    helper.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "asked = sys.stdin.read()\n"
        "if asked != 'r.example':\n"
        "    sys.exit('credentials not found')\n"
        "print(json.dumps({'ServerURL': asked, 'Username': 'ann', 'Secret': 's3cret'}))\n"
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = written(tmp_path, credsStore="test")
    assert login_for("r.example", path) == Login(username="ann", password="s3cret")
    assert login_for("other.example", path) is None
    with pytest.raises(LoginUnusable, match=r"docker-credential-absent is not installed"):
        login_for("r.example", written(tmp_path, credHelpers={"r.example": "absent"}))


# --- the command ---------------------------------------------------------------------------------------------------


def nothing(_: Path) -> None:
    """An init of no files."""


def run(arguments: Sequence[str], *, lay_init=nothing) -> int:
    """The command as `main` runs it, but for our init, which takes its time."""
    chosen = main.parser().parse_args(["image", "build", *arguments])
    return imaging.run(chosen, os.environ, lay_init=lay_init)


@pytest.fixture
def state(tmp_path, monkeypatch) -> Path:
    """A state root of our own, and no login of anybody's."""
    monkeypatch.setenv("FC_INVOKE_STATE_ROOT", str(tmp_path / "state"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "state"


def test_the_command_prints_the_path_and_nothing_else_on_standard_output(registry, state, capsys):
    assert run([f"{registry.address}/team/app:1"]) == 0
    first = capsys.readouterr()
    rootfs = Path(first.out.removesuffix("\n"))
    assert rootfs.is_relative_to(state / "images" / "sha256")
    assert rootfs.exists()
    assert "built in" in first.err
    assert "\x1b" not in first.err  # no terminal, no progress
    assert run([f"{registry.address}/team/app:1"]) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "was there already" in second.err


def test_the_command_takes_a_layout_an_archive_of_it_and_a_registry(registry, image, state, tmp_path, capsys):
    """All three are the same image, and it is built once."""
    layout = write_layout(tmp_path / "layout", image)
    archive = shutil.make_archive(str(tmp_path / "image"), "tar", layout)
    paths = set()
    for source in (str(layout), archive, f"{registry.address}/team/app:1"):
        assert run([source]) == 0
        paths.add(capsys.readouterr().out)
    assert len(paths) == 1


def test_the_command_uses_the_login_that_docker_keeps(registry, state, tmp_path, capsys):
    registry.auth, registry.users = "basic", {"ann": "s3cret"}
    (tmp_path / "docker").mkdir()
    auth = base64.b64encode(b"ann:s3cret").decode()
    written(tmp_path / "docker", auths={registry.address: {"auth": auth}})
    assert run([f"{registry.address}/team/app:1"]) == 0
    assert capsys.readouterr().out


def test_the_state_root_that_the_command_makes_is_one_that_a_daemon_takes(image, state, tmp_path):
    assert run([str(write_layout(tmp_path / "layout", image))]) == 0
    assert [path.stat().st_mode & 0o777 for path in (state, state / "images")] == [0o700, 0o700]


def test_our_init_is_laid_in_unless_another_is_named(image, state, tmp_path, capsys):
    path = str(write_layout(tmp_path / "layout", image))
    laid: list[Path] = []

    def lay(directory: Path) -> None:
        laid.append(directory)
        (directory / "init").write_text("#!/bin/sh\n")

    other = tmp_path / "init"
    other.mkdir()
    assert [run([path], lay_init=lay), run([path, "--init", str(other)], lay_init=lay), run([path])] == [0, 0, 0]
    with_ours, with_other, with_nothing = capsys.readouterr().out.splitlines()
    assert with_ours != with_other == with_nothing
    assert len(laid) == 1
    assert not laid[0].exists()


@needs("debugfs", "x86-64-glibc")
def test_by_default_an_image_gets_the_init_of_our_guests(image, state, tmp_path, capsys):
    assert run([str(write_layout(tmp_path / "layout", image))], lay_init=guest_tree) == 0
    rootfs = capsys.readouterr().out.strip()
    told = subprocess.run(
        ["debugfs", "-R", "stat /.substrate/init", rootfs], capture_output=True, text=True, check=True
    )
    assert "Type: regular    Mode:  0755" in told.stdout


def test_a_machine_that_has_no_init_to_give_is_told_so(image, state, tmp_path, capsys):
    def lay(_: Path) -> None:
        raise NoTree("another machine is needed")

    assert run([str(write_layout(tmp_path / "layout", image))], lay_init=lay) == 1
    assert capsys.readouterr().err == "fc-invoke: another machine is needed\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/absent"], "fc-invoke: /absent can't be read: No such file or directory"),
        (["./absent.tar"], "absent.tar can't be read"),
        (["No Image"], "'No Image' names no image"),
        (["alpine", "--name", "x"], "--name chooses among the images at a path"),
    ],
)
def test_what_can_not_be_built_is_said_in_one_line(arguments, words, state, capsys):
    assert run(arguments) == 1
    told = capsys.readouterr()
    assert words in told.err
    assert told.out == ""


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("64M", 64 << 20), ("65536K", 64 << 20), ("33554432", 32 << 20), ("40MiB", 40 << 20)]
)
def test_a_size_is_written_as_people_write_it(text, size_bytes, image, state, tmp_path, capsys):
    assert run([str(write_layout(tmp_path / "layout", image)), "--size", text]) == 0
    assert Path(capsys.readouterr().out.strip()).stat().st_size == size_bytes


@pytest.mark.parametrize("text", ["0", "-1", "4 GB!", "4g", "", "1.5G"])
def test_a_size_that_is_none_is_refused(text, state, capsys):
    with pytest.raises(SystemExit):
        run(["/absent", f"--size={text}"])
    assert "accepted are sizes such as 512M and 4G" in capsys.readouterr().err


def test_a_limit_on_the_command_line_is_kept(image, state, tmp_path, capsys):
    assert run([str(write_layout(tmp_path / "layout", image)), "--limit", "100K"]) == 1
    assert "bytes accepted" in capsys.readouterr().err


def test_progress_on_a_terminal_shows_step_size_and_rate_at_most_ten_times_a_second():
    screen, now_s = io.StringIO(), 0.0
    line = ProgressLine(screen, clock=lambda: now_s)
    for now_s in (0.0, 0.05, 1.0):
        line(Progress(step="pull", item="abc", done_bytes=int(now_s * 3 * (1 << 20)), total_bytes=10 << 20))
    assert screen.getvalue().split("\r\x1b[K")[1:] == ["pull  abc", "pull  abc  3.0 MiB of 10.0 MiB  3.0 MiB/s"]
