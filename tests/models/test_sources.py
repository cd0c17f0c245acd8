from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import DataError, ModelError, SecateurError
from secateur.sources import CALLABLE, existing_path, load_callable, parse_source

KINDS = ("hf", "npz", "text")


def parse(text):
    return parse_source(text, KINDS, ModelError)


def test_options_are_literals_or_text():
    source = parse("npz:a.npz?n=7&x=0.5&yes=true&no=False&nothing=none&mean=0.1,0.2&name=imagenet&quoted='7'&amp=a%26b")
    assert source.kind == "npz"
    assert source.rest == "a.npz"
    assert source.options == {
        "n": 7, "x": 0.5, "yes": True, "no": False, "nothing": None, "mean": (0.1, 0.2), "name": "imagenet", "quoted": "7",
        "amp": "a&b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[0::2]", slice(0, None, 2)), ("[:10]", slice(None, 10)), ("[-5:]", slice(-5, None)), ("[::-1]", slice(None, None, -1))],
)
def test_slices(text, expected):
    source = parse(f"npz:a.npz{text}?split=test")
    assert (source.rest, source.select, source.options) == ("a.npz", expected, {"split": "test"})


def test_a_file_whose_name_looks_like_a_slice_is_that_file(tmp_path):
    (tmp_path / "a[1:2]").write_text("x")
    assert parse(f"text:{tmp_path}/a[1:2]").select is None


@given(
    options=st.dictionaries(
        st.from_regex(r"[a-z_]{1,6}", fullmatch=True),
        st.one_of(
            st.integers(),
            st.floats(allow_nan=False, allow_infinity=False),
            st.booleans(),
            st.none(),
            st.text(st.characters(categories=("L", "N", "P", "S")), max_size=30),
            st.tuples(st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
            st.tuples(st.integers()),
        ),
        max_size=4,
    ),
    select=st.sampled_from([None, slice(0, None, 2), slice(None, 5), slice(-3, None)]),
)
@settings(max_examples=50)
def test_canonical_text_parses_to_the_same_source(options, select):
    from secateur.sources import Source

    source = Source("hf", "org/name", options, select, ModelError)
    assert parse(str(source)) == source


@given(st.text(max_size=80))
def test_whatever_the_text_it_is_parsed_or_refused_in_words(text):
    try:
        source = parse(text)
    except ModelError as error:
        explained = str(error)
        source = None
    assert source.kind in (*KINDS, CALLABLE) if source else len(explained) > 15


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (7, "got int"),
        ("hff:gpt2", "Did you mean 'hf'"),
        ("gpt2", "no kind"),
        ("hf:", "names nothing"),
        ("hf: ", "names nothing"),
        ("hf:a?b", "no key=value"),
        ("hf:a?b=1&b=2", "twice"),
        ("hf:a?b-c=1", "no key=value"),
        ("npz:a[3]", "no slice"),
        ("npz:a[a:b]", "no slice"),
        ("npz:a[::0]", "step cannot be 0"),
        ("npz:a?split=test[0:2]", "before the '?'"),
        ("hf:a\0b", "cannot be printed"),
        ("hf:" + "x" * 5000, "longer than"),
        ("http://example.org/x", "unknown kind"),
    ],
)
def test_malformed_sources_are_refused_in_words(text, words):
    with pytest.raises(ModelError, match=words):
        parse(text)


def test_deep_nesting_stays_text():
    assert parse("hf:a?b=" + "(" * 190).options == {"b": "(" * 190}
    assert parse("hf:a?b=" + "[" * 3000).options == {"b": "[" * 3000}


@pytest.mark.parametrize("text", ["a" * 300, "x/" * 900, "~no-such-user/x", "\x00".replace("\x00", "?")])
def test_paths_that_cannot_be_are_absent(text):
    with pytest.raises(DataError, match="does not exist"):
        existing_path(text, "file", DataError)


def test_the_nearest_neighbour_is_named(tmp_path):
    (tmp_path / "digits.npz").write_text("")
    with pytest.raises(DataError, match=r"Did you mean 'digits\.npz'"):
        existing_path(str(tmp_path / "digts.npz"), "npz file", DataError)


@pytest.fixture
def code(tmp_path):
    def write(text, name="nets.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_a_file_is_run_once_until_it_changes(code):
    path = code("class A: pass\n")
    first, source = load_callable(f"{path}:A", ModelError)
    assert load_callable(f"{path}:A", ModelError)[0] is first
    assert str(source) == f"{path}:A"
    code("import os\nclass A: pass\nclass B: pass\n")
    import os

    os.utime(path, (1, 1))
    assert load_callable(f"{path}:A", ModelError)[0] is not first


def test_a_file_finds_its_neighbours_and_leaves_the_path_alone(code):
    import sys

    code("VALUE = 3\n", "secateur_neighbour.py")
    before = list(sys.path)
    function, _ = load_callable(code("from secateur_neighbour import VALUE\ndef f(): return VALUE\n") + ":f", ModelError)
    assert function() == 3
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("def make(): pass", "mak", "Did you mean 'make'"),
        ("x = 1", "x", "cannot be called"),
        ("def make(:", "make", r"SyntaxError.*"),
        ("import not_there_at_all", "make", "ModuleNotFoundError"),
        ("1 / 0", "make", r"ZeroDivisionError.*nets\.py, line 1"),
        ("raise SystemExit(3)", "make", "SystemExit"),
    ],
)
def test_files_at_fault_are_named(code, text, name, words):
    with pytest.raises(ModelError, match=words):
        load_callable(f"{code(text)}:{name}", ModelError)


def test_a_failed_file_is_not_kept(code):
    import sys

    path = code("1 / 0")
    for _ in range(2):
        with pytest.raises(ModelError, match="ZeroDivisionError") as caught:
            load_callable(f"{path}:make", ModelError)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert not any(path == getattr(m, "__file__", None) for m in list(sys.modules.values()))


@pytest.mark.parametrize("text", ["no_such_module:f", "os:no_such", "os.path.nothing:x", "nets.py:make", ":f", "a b:c", "os"])
def test_callables_that_are_not_there(text):
    with pytest.raises(SecateurError):
        load_callable(text, ModelError)
