import errno
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resect import files
from resect.errors import FileError, InputError
from resect.lab import checkpoint
from resect.lab.tree import flatten, unflatten

STATE = {"model": {"a.b": torch.arange(6.0).reshape(2, 3).t()}, "optimizer": {0: (1, 2.5)}, "n": float("inf")}


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=4),
    st.sampled_from([torch.float32, torch.int64, torch.uint8, torch.bool]).map(lambda kind: torch.ones(2, dtype=kind)),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=9), st.integers()), inner, max_size=3),
        st.dictionaries(st.sampled_from(["__tensor__", "__items__", "a/b", "a"]), inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_tree_survives(tree):
    tensors = {}
    plain = json.loads(json.dumps(flatten(tree, tensors, "state")))
    assert same(unflatten(plain, tensors), tree)


def test_a_tree_of_anything_else_is_refused_with_its_path():
    with pytest.raises(InputError, match=r"State 'state/a/1' is a set"):
        flatten({"a": [1, {2}]}, {}, "state")


def test_save_load_and_only_the_newest_stays(tmp_path):
    for number in (9, 10, 1000000):
        path = checkpoint.save(tmp_path, number, {**STATE, "number": number})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert checkpoint.newest(tmp_path) == path
    assert same(checkpoint.load(path), {**STATE, "number": 1000000})


def test_the_newest_is_the_highest_number(tmp_path):
    for name in ("checkpoint-999999", "checkpoint-1000000"):
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoint-1000000"


def test_a_copy_is_no_checkpoint_and_stays(tmp_path):
    names = {"checkpoint-000004-keep", "checkpoint-000009.old", "checkpoint-", "checkpoint-5e3"}
    for name in names:
        (tmp_path / name).mkdir()
    assert checkpoint.newest(tmp_path) is None
    path = checkpoint.save(tmp_path, 5, STATE)
    assert checkpoint.newest(tmp_path) == path
    assert {entry.name for entry in tmp_path.iterdir()} == names | {path.name}


def test_tied_tensors_are_saved_apart(tmp_path):
    weight = torch.ones(3)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"a": weight, "b": weight, "c": weight[1:]}))
    assert same(loaded, {"a": weight, "b": weight, "c": weight[1:]})


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_failure_at_any_point_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, failure, call):
    old = checkpoint.save(tmp_path, 1, STATE)
    calls = iter(range(3))
    sync, replace = files._sync, os.replace

    def failing_sync(path):
        if next(calls) == call:
            path.write_bytes(path.read_bytes()[:9])
            raise failure
        sync(path)

    def failing_replace(*paths):
        if next(calls) == call:
            raise failure
        replace(*paths)

    monkeypatch.setattr(files, "_sync", failing_sync)
    monkeypatch.setattr(os, "replace", failing_replace)
    expected = FileError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        checkpoint.save(tmp_path, 2, {"other": 1})
    if expected is FileError:
        assert "No space left on device" in str(caught.value)
    assert list(tmp_path.iterdir()) == [old]
    assert same(checkpoint.load(old), STATE)


def test_leftovers_of_a_killed_process_are_no_checkpoint_and_go(tmp_path):
    leftover = tmp_path / ".checkpoint-000005.x1.tmp"
    leftover.mkdir()
    (leftover / "state.json").write_text("{")
    assert checkpoint.newest(tmp_path) is None
    path = checkpoint.save(tmp_path, 1, STATE)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("state.json", lambda content: content[:-20], "not whole JSON"),
        ("state.json", lambda content: content.replace(b"2.5", b"2.6"), "altered"),
        ("state.json", lambda content: b'{"format": "other"}', "not a checkpoint"),
        ("state.json", lambda content: b"[]", "not a checkpoint"),
        ("state.json", lambda content: b"\xff\xfe\xfa", "not whole JSON"),
        ("state.json", None, "No such file"),
        ("tensors.safetensors", lambda content: content[:-4], "is damaged"),
        ("tensors.safetensors", lambda content: content[:-1] + b"\x01", "is damaged"),
        ("tensors.safetensors", None, "No such file"),
    ],
)
def test_damage_is_one_clear_message(tmp_path, file, change, said):
    path = checkpoint.save(tmp_path, 1, STATE)
    content = (path / file).read_bytes()
    (path / file).unlink()
    if change:
        (path / file).write_bytes(change(content))
    with pytest.raises(FileError, match=said) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)
