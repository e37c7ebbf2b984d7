"""A table's bytes are JSON or YAML, bounded, and never mean something that people did not write."""

import json

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from substrate_cluster.catalog import TableInvalid, parse_table
from substrate_cluster.catalog import document as document_module
from substrate_cluster.catalog.document import DEEPEST, MOST_BYTES, Key, Mapping, Odd, read_document

LOADERS = [yaml.SafeLoader, *([yaml.CSafeLoader] if hasattr(yaml, "CSafeLoader") else [])]


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__)
def loader(request, monkeypatch):
    """Both parsers of YAML that a machine may have: the one in Python, and libyaml where it was built."""
    monkeypatch.setattr(document_module, "_LOADER", request.param)


def refusal(raw, source="FC_INVOKE_WORKLOADS"):
    """The one thing that is wrong with bytes of which nothing can be read."""
    with pytest.raises(TableInvalid) as refused:
        parse_table(raw if isinstance(raw, bytes) else raw.encode(), source=source)
    [problem] = refused.value.problems
    return str(problem)


@pytest.mark.parametrize("source", ["table.json", "FC_INVOKE_WORKLOADS"])
def test_json_is_known_by_its_suffix_or_its_first_character(source):
    """The inline table of the Go daemon is JSON and has no name."""
    assert parse_table(b' {"w": {"command": ["x"]}}', source=source).entries.keys() == {"w"}


@pytest.mark.parametrize("source", ["table.yaml", "table.yml", "FC_INVOKE_WORKLOADS"])
@pytest.mark.usefixtures("loader")
def test_anything_else_is_yaml(source):
    """Block style anywhere; flow style in braces only in a file whose name says YAML."""
    assert parse_table(b"w:\n  command: [x]\n", source=source).entries.keys() == {"w"}
    if source.startswith("table."):
        assert parse_table(b"{w: {command: [x]}}", source=source).entries.keys() == {"w"}


def test_json_that_is_none_says_where_and_what_else_it_could_be():
    """A brace begins YAML in flow style too."""
    problem = refusal("{\n  w: {}}")
    assert problem.startswith("line 2: this is not JSON: Expecting property name enclosed in double quotes (column 3)")
    assert "to have it read as YAML, name it .yaml" in problem
    assert "YAML" not in refusal("{w: {}}", source="table.json")


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: [\n", 2), ("a: b: c", 1), ("a: {}\n\tb: 1", 2), ("@", 1), ("a: 'x", 1), ("a: 1\n--- \nb: 1", 2)],
)
@pytest.mark.usefixtures("loader")
def test_yaml_that_is_none_says_where(text, line):
    """Both parsers name the line."""
    assert refusal(text).startswith(f"line {line}: ")


@pytest.mark.usefixtures("loader")
def test_a_problem_in_yaml_has_its_line():
    """The walk knows the line of every key."""
    with pytest.raises(TableInvalid) as refused:
        parse_table(b"w:\n  command: [x]\n  env:\n    A: 5\n  vcpus: no\n", source="table.yaml")
    assert [str(problem) for problem in refused.value.problems] == [
        "w.env.A (line 4): found the number 5; accepted is a string (quote it)",
        "w.vcpus (line 5): found no (in YAML 1.1: bool); accepted is a whole number from 1 to 32 (write true or false, "
        "or quote it if it is a string)",
    ]


@pytest.mark.parametrize("source", ["table.json", "table.yaml"])
def test_duplicate_keys_are_refused_with_their_place(source):
    """Most parsers let the last one win, and a workload or a limit vanishes unseen."""
    text = '{"w": {"command": ["x"], "vcpus": 1, "vcpus": 2},\n "v": {"command": ["x"]},\n "v": {"command": ["y"]}}'
    with pytest.raises(TableInvalid) as refused:
        parse_table(text.encode(), source=source)
    assert sorted((problem.path, "second time" in problem.message) for problem in refused.value.problems) == [
        ("v", True),
        ("w.vcpus", True),
    ]


@pytest.mark.parametrize(
    "plain",
    ["yes", "on", "Off", "0755", "0x10", "0b1", "1_000", "1:30", "1e+3", "1.5e+3", ".5", ".inf", ".nan", "2024-01-01"]
    + ["=", "<<"],
)
@pytest.mark.usefixtures("loader")
def test_what_yaml_readers_disagree_about_is_no_value(plain):
    """`1:30` is 90 to one of them and a string to another; neither is what somebody meant."""
    mapping = read_document(f"a: {plain}\n".encode(), source="table.yaml")
    assert isinstance(mapping, Mapping)
    [entry] = mapping.entries
    if plain == "1e+3":  # a string to YAML 1.1, so a field that wants a number says so
        assert entry.value == plain
    else:
        assert isinstance(entry.value, Odd)
        assert entry.value.found.startswith(plain)


@pytest.mark.parametrize(
    "key", ["on", "1", "null", "true", "2024-01-01", "[a]", "{a: b}", "*x", "&x a", "!t a", "<<", "~", "1.5"]
)
@pytest.mark.usefixtures("loader")
def test_a_key_that_is_no_plain_string_is_refused(key):
    """A workload named `on` needs quotes, and gets told so."""
    assert refusal(f"? {key}\n: {{command: [x]}}\n").startswith("line 1: found ")


@pytest.mark.parametrize("value", ["&x {command: [x]}", "*x", "!!map {command: [x]}", "!!python/object:os.system x"])
@pytest.mark.usefixtures("loader")
def test_anchors_aliases_and_tags_are_no_values(value):
    """So no table grows when it is read, and nothing in it is constructed."""
    assert refusal(f"w: {value}").startswith("w (line 1): found the ")


@pytest.mark.usefixtures("loader")
def test_quoted_and_block_scalars_are_strings_whatever_they_look_like():
    """`"0755"` is as it stands."""
    mapping = read_document(b"a: \"on\"\nb: '1'\nc: |\n  null\nd: no way\n", source="table.yaml")
    assert mapping == Mapping((Key("a", "on", 1), Key("b", "1", 2), Key("c", "null\n", 3), Key("d", "no way", 5)))


@pytest.mark.parametrize("empty", [b"", b" \n\t", b"\xef\xbb\xbf", b"# later\n"])
def test_an_empty_file_is_no_empty_table(empty):
    """A file that is just being written must not take every workload away."""
    assert "write {} for a table without workloads" in refusal(empty)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{}" + b" " * MOST_BYTES, "found more than 4,194,304 bytes"),
        (b'{"a":\n "\xff"}', "line 2: found the byte 0xff; accepted is UTF-8"),
        (b"\x00\x01", "this is not YAML: unacceptable character #x0000"),
        (b"[]", "found an empty list; accepted is an object of workloads by name"),
        (b"3", "found the number 3; accepted is an object"),
        (b"NaN", 'found the string "NaN"; accepted is an object'),
        (b"[" * 100_000, f"found too many levels; accepted are at most {DEEPEST}"),
        (b'{"a":' * 100_000, f"found too many levels; accepted are at most {DEEPEST}"),
        (b"a:\n" + b"- " * 100_000, f"found too many levels; accepted are at most {DEEPEST}"),
        (b'"\\UFFFFFFFF": {}', "this is not YAML"),
    ],
)
@pytest.mark.usefixtures("loader")
def test_bytes_that_are_no_table_are_refused_in_one_sentence(raw, said):
    """Size, encoding, depth: each bound says which it is."""
    assert said in refusal(raw)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        ("NaN", "found NaN"),
        ("-Infinity", "found -Infinity"),
        ("1e999", "found the number inf"),
        ("9" * 10_000, "found a number of 10,000 digits"),
        ("-" + "9" * 19, "found a number of 19 digits"),
        ("2.0", "found the number 2.0"),
    ],
)
def test_numbers_that_no_field_holds_are_named(number, said):
    """Python would take the first two, and refuse the fourth with a traceback."""
    problem = refusal(f'{{"w": {{"command": ["x"], "vcpus": {number}}}}}')
    assert problem.startswith(f"w.vcpus: {said}")


@given(st.binary(max_size=300), st.sampled_from(["a.json", "a.yaml", "FC_INVOKE_WORKLOADS"]))
@example(b"\xff\xfe", "a.yaml")
@example(b"? ? ? a", "a.yaml")
def test_no_bytes_break_the_reader(raw, source):
    """Whatever a file holds, there is a table or a `TableInvalid` that can be printed."""
    try:
        parse_table(raw, source=source)
    except TableInvalid as refused:
        str(refused).encode()


YAMLISH = st.lists(
    st.sampled_from(
        ["a", "w:", " ", "\n", "  ", "- ", "[", "]", "{", "}", ",", ": ", "? ", "&a ", "*a", "!t ", "'", '"']
    )
    | st.sampled_from(
        ["|", ">", "#", "---\n", "...\n", "%", "@", "`", "\t", "null", "yes", "0x1", "<<: ", "\\", "é", "command"]
    ),
    max_size=40,
).map("".join)


@given(YAMLISH)
@pytest.mark.parametrize("parser", LOADERS, ids=lambda parser: parser.__name__)
def test_no_yaml_breaks_either_parser(parser, text):
    """Made of the characters that mean something to YAML, because random bytes rarely do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_module, "_LOADER", parser)
        try:
            parse_table(text.encode(), source="table.yaml")
        except TableInvalid as refused:
            str(refused).encode()


def plain(value):
    """A tree as the standard library would give it."""
    if isinstance(value, Mapping):
        return {entry.key: plain(entry.value) for entry in value.entries}
    return [plain(item) for item in value] if isinstance(value, list) else value


DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), DATA, min_size=1))
def test_data_reads_back_from_both_formats(data):
    """Whatever was written by a proper writer of JSON or YAML is read as it was."""
    assert plain(read_document(json.dumps(data).encode(), source="a.json")) == data
    assert plain(read_document(yaml.safe_dump(data).encode(), source="a.yaml")) == data
