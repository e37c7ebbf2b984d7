"""What an image says of its program, and what that makes of it."""

import json

import pytest

from substrate_guest.command import Account
from substrate_guest.execution import ExecWorkload
from substrate_guest.image import PATH, Image, account, served
from substrate_guest.loading import NotAWorkload
from substrate_guest.proxy import HttpWorkload

FILES = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\n\n# none\nweb:x:33:34::/var/www:/bin/false\nbare:x:50:51:::\n",
    "/etc/group": "root:x:0:\nweb:x:34:\nstaff:x:20:web,bare\nlogs:x:21:web\n",
}
IMAGE = Image(env={}, argv=("/program",), directory="/", user="")


def read(path):
    return FILES[path]


def read_nothing(path):
    raise FileNotFoundError(path)


def test_the_configuration_is_read_as_its_builder_writes_it():
    text = {
        "Env": ["A=1", "B=x=y", "C=", "=D"],
        "Entrypoint": ["/run"],
        "Cmd": ["--all"],
        "WorkingDir": "/srv",
        "User": "web",
    }
    assert Image.parse(json.dumps(text)) == Image(
        env={"A": "1", "B": "x=y", "C": ""}, argv=("/run", "--all"), directory="/srv", user="web"
    )
    assert Image.parse("{}") == Image(env={}, argv=(), directory="/", user="")


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", Account(0, 0, (), "/root")),
        ("web", Account(33, 34, (20, 21), "/var/www")),
        ("33", Account(33, 34, (20, 21), "/var/www")),
        ("web:staff", Account(33, 20, (), "/var/www")),
        ("web:77", Account(33, 77, (), "/var/www")),
        ("1000:1001", Account(1000, 1001, (), "/")),
        ("1000", Account(1000, 0, (), "/")),
        ("bare", Account(50, 51, (20,), "/")),
    ],
)
def test_a_user_is_looked_up_in_the_image_as_container_engines_do(user, expected):
    assert account(user, read) == expected


def test_an_image_without_users_knows_root_and_numbers():
    assert account("", read_nothing) == Account(0, 0)
    assert account("65532:65532", read_nothing) == Account(65532, 65532)


@pytest.mark.parametrize(("user", "said"), [("me", "runs as user 'me'"), ("web:them", "runs as group 'them'")])
def test_a_user_nobody_knows_is_refused(user, said):
    with pytest.raises(NotAWorkload, match=said):
        account(user, read)


def test_the_environment_is_the_images_with_what_every_program_expects():
    image = Image(env={"HOME": "/home/web", "SUBSTRATE_SERVE": "exec"}, argv=(), directory="/", user="")
    kernel = {"HOME": "/", "TERM": "linux", "SUBSTRATE_SERVE": "http:80"}
    assert image.environ(Account(33, 34, (), "/var/www"), kernel) == {
        "PATH": PATH,
        "HOME": "/home/web",
        "TMPDIR": "/tmp",
        "SUBSTRATE_SERVE": "http:80",
    }


def test_the_way_to_serve_is_chosen_by_name():
    who = Account(0, 0)
    assert isinstance(served("exec", IMAGE, who, "/site"), ExecWorkload)
    assert isinstance(served("http:8080", IMAGE, who, "/site"), HttpWorkload)


@pytest.mark.parametrize(
    "serve", ["", "exec:1", "http", "http:0", "http:70000", "http:x", "python:app", "python:a:b:c", "wsgi"]
)
def test_any_other_way_is_refused_with_what_is_accepted(serve):
    with pytest.raises(NotAWorkload, match="accepted are `exec`, `http:PORT` or `python:MODULE:ATTRIBUTE`"):
        served(serve, IMAGE, Account(0, 0), "/site")


def test_an_image_without_a_program_can_only_bring_a_python_module():
    nothing = Image(env={}, argv=(), directory="/", user="")
    with pytest.raises(NotAWorkload, match="needs an ENTRYPOINT or a CMD"):
        served("exec", nothing, Account(0, 0), "/site")
    served("python:handlers:app", nothing, Account(0, 0), "/site")
