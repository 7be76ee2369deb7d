"""The file: what is written comes back, what is hostile is refused by name, writing is atomic."""

import contextlib
import os
import pickle
import re
import stat
from pathlib import Path

import hotgraft
import pytest
import torch
from factories import graft_on, state, tensor
from hostile import HOSTILE, good_file, good_graft, header, join, metadata, put, raw, split
from hotgraft import Entries, Graft, Provenance, files
from hotgraft.errors import FormatError, GraftError
from hotgraft.format import DTYPES, Group
from hotgraft.graft import bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

SPECIFICATION = Path(__file__).resolve().parents[1] / "docs" / "format.md"
NAME = "x.graft.safetensors"


def reader():
    """The reader that docs/format.md prints: the code block that defines `read_graft`, up to it."""
    blocks = re.findall(r"^```python\n(.*?)^```", SPECIFICATION.read_text(), re.M | re.S)
    (block,) = [b for b in blocks if "def read_graft" in b]
    code = block[: block.index("\nfound, rows")]
    assert "hotgraft." not in code
    assert len(code.strip().splitlines()) < 45
    namespace = {}
    exec(compile(code, str(SPECIFICATION), "exec"), namespace)
    return namespace["read_graft"]


# ---- round trip -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_comes_back(dtype, tmp_path):
    new, old = (tensor(dtype, (50,), seed, finite=False) for seed in (1, 2))
    graft = Graft.from_entries({"w": Entries(torch.arange(0, 100, 2), new, old, (10, 10))})
    graft.save(tmp_path / NAME)
    loaded = Graft.load(tmp_path / NAME)
    assert loaded == graft
    assert loaded.rows == graft.rows
    assert loaded.provenance == graft.provenance
    for name, group in graft.groups.items():
        for mine, theirs in zip(loaded.groups[name], group, strict=True):
            assert (mine.dtype, mine.tobytes()) == (theirs.dtype, theirs.tobytes())
            assert not mine.flags.writeable
    assert bits(loaded["w"].new).tobytes() == bits(new).tobytes()


@given(st.integers(0, 99))
def test_the_printed_reader_agrees(seed):
    base = state(seed, finite=False) | {f"é{seed}": tensor("F16", (3, 5), seed)}
    graft = graft_on(base, seed, share=0.1 + seed % 5 / 10, finite=False)
    path = Path(os.environ["PYTEST_FORMAT_FOLDER"]) / NAME
    graft.save(path)
    found, rows = reader()(path)
    assert found == graft.id == Graft.load(path).id
    assert [row[0] for row in rows] == list(graft.names)
    for name, shape, dtype, indices, new, old in rows:
        entries = graft[name]
        assert (shape, DTYPES[dtype].torch) == (entries.shape, entries.new.dtype)
        assert indices.tolist() == entries.indices.tolist()
        assert new.tobytes() == bits(entries.new).tobytes()
        assert old.tobytes() == bits(entries.old).tobytes()


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_FORMAT_FOLDER", str(tmp_path_factory.mktemp("format")))
        yield


def test_blocks_beyond_two_to_the_31_come_back(tmp_path):
    where = torch.tensor([5, 2**31, 2**32 + 1])
    graft = Graft.from_entries({"w": Entries(where, torch.ones(3), torch.zeros(3), (3, 2**31))})
    graft.save(tmp_path / NAME)
    assert Graft.load(tmp_path / NAME)["w"].indices.tolist() == where.tolist()
    (row, *_) = reader()(tmp_path / NAME)[1][1:]
    assert row[3].tolist() == [2**31]


@pytest.mark.parametrize("name", ["", "a b", 'quote " and \\', "é漢", "𝄞", "x" * 9999])
def test_names_of_any_kind_come_back(name, tmp_path):
    graft = Graft.from_entries({name: Entries([0], torch.ones(1), torch.zeros(1), (1,))})
    graft.save(tmp_path / NAME)
    assert Graft.load(tmp_path / NAME).names == (name,)
    assert reader()(tmp_path / NAME)[0] == graft.id


HOSTILE_TEXT = ["\x00", "\n", "\x1b[2Jw", "\x7f", "\x9b", "\ud800"]


@pytest.mark.parametrize("text", HOSTILE_TEXT)
def test_text_that_could_not_be_shown_is_refused(text, tmp_path):
    with pytest.raises(
        GraftError, match=r"name .* is not text without control characters"
    ) as error:
        Graft.from_entries({text: Entries([0], torch.ones(1), torch.zeros(1), (1,))})
    assert str(error.value).isprintable()
    for part in ("scope", "method", "creator", "base_id"):
        with pytest.raises(GraftError, match=f"the {part} '.*' is not text without control"):
            Provenance(**{part: text})
        (tmp_path / NAME).write_bytes(metadata(**{part: text})(good_file(tmp_path)))
        with pytest.raises(FormatError):
            Graft.load(tmp_path / NAME)
    (tmp_path / NAME).write_bytes(put(0, 0, text)(good_file(tmp_path)))
    with pytest.raises(FormatError, match="is not text without control characters"):
        Graft.load(tmp_path / NAME)


@pytest.mark.parametrize(
    "wrong",
    [{"scope": None}, {"method": 3}, {"base_id": 7}, {"creator": b"me"}, {"eligible": -1},
     {"eligible": 2.0}, {"eligible": True}],
)  # fmt: skip
def test_provenance_is_checked_when_made(wrong):
    with pytest.raises(GraftError, match=f"{next(iter(wrong))} .* (is )?not (text|a count)"):
        Provenance(**wrong)


def test_what_is_no_graft_is_not_read_whole(tmp_path):
    head = {"x": {"dtype": "U8", "shape": [2**45], "data_offsets": [0, 2**45]}}
    for start in (join(head, b""), join(head | {"__metadata__": {"format": "pt"}}, b"")):
        (tmp_path / NAME).write_bytes(start)
        os.truncate(tmp_path / NAME, len(start) + 2**40)  # 1 TiB, all of it a hole
        with pytest.raises(FormatError, match="a safetensors file, but not a graft"):
            Graft.load(tmp_path / NAME)
    for start in (b"", b"\xff" * 64, pickle.dumps("weights")):
        (tmp_path / NAME).write_bytes(start)
        os.truncate(tmp_path / NAME, 2**40)
        with pytest.raises(FormatError, match="not a safetensors file"):
            Graft.load(tmp_path / NAME)


def test_provenance_comes_back(tmp_path):
    given_ = Provenance(
        base_id="b" * 64, scope="encoder", eligible=12345, method="exact", creator="me"
    )
    graft = Graft(good_graft().rows, good_graft().groups, given_)
    graft.save(tmp_path / NAME)
    assert Graft.load(tmp_path / NAME).provenance == given_
    stored = split((tmp_path / NAME).read_bytes())[0]["__metadata__"]
    assert float(stored["density"]) == graft.density == 6 / 12345
    assert stored["base_id"] == "b" * 64


def test_keys_nobody_knows_are_ignored(tmp_path):
    (tmp_path / NAME).write_bytes(metadata(note="hello")(good_file(tmp_path)))
    assert Graft.load(tmp_path / NAME) == good_graft()


# ---- hostile files ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name, tmp_path):
    spoil, message = HOSTILE[name]
    good = good_file(tmp_path)
    path = tmp_path / NAME
    path.write_bytes(spoil(good))
    assert path.read_bytes() != good
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        Graft.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 3000


def test_every_truncation_is_refused(tmp_path):
    good = good_file(tmp_path)
    for length in range(len(good)):
        (tmp_path / NAME).write_bytes(good[:length])
        with pytest.raises(FormatError):
            Graft.load(tmp_path / NAME)


@given(st.data())
def test_every_changed_byte_is_refused_or_says_the_same(data):
    """Also in the header, where a byte may be white space or metadata that is not hashed."""
    folder = Path(os.environ["PYTEST_FORMAT_FOLDER"])
    good = bytearray(good_file(folder))
    for _ in range(20):
        at = data.draw(st.integers(0, len(good) - 1))
        spoiled = bytearray(good)
        spoiled[at] ^= data.draw(st.integers(1, 255))
        (folder / NAME).write_bytes(spoiled)
        with contextlib.suppress(FormatError):
            assert Graft.load(folder / NAME) == good_graft()


def test_a_key_given_twice_cannot_smuggle_anything(tmp_path):
    """Whichever of two equal keys a parser takes, what is loaded was checked."""
    head, body = split(good_file(tmp_path))
    text = join(head, b"")[8:]
    for key in ("F32.new", "__metadata__"):
        other = header(lambda h: h["__metadata__"].update(id="0" * 64))(join(head, body))
        value = join({key: split(other)[0][key]}, b"")[9:-1]
        (tmp_path / NAME).write_bytes(join(text[:-1] + b"," + value + b"}", body))
        with contextlib.suppress(FormatError):
            assert Graft.load(tmp_path / NAME) == good_graft()


def test_no_pickle_is_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    for name in (NAME, "model.safetensors", "model.bin", "model.pt"):
        torch.save({"w": Trap()}, tmp_path / name)
        with pytest.raises(FormatError):
            Graft.load(tmp_path / name)
        with pytest.raises(FormatError):
            hotgraft.diff(tmp_path / name, tmp_path / name)
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(FormatError):
            Graft.load(tmp_path / name)
    assert not (tmp_path / "trapped").exists()


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Graft.load(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        Graft.load(tmp_path)


# ---- a file that changes while it is read -----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-8], r"its size went from \d+ to \d+ bytes while it was read"),
        (lambda data: data + bytes(8), r"its size went from \d+ to \d+ bytes while it was read"),
        (lambda _: b"", r"its size went from \d+ to 0 bytes while it was read"),
        (HOSTILE["new bits changed"][0], "the file is damaged or was changed; get it anew"),
        (HOSTILE["position moved"][0], "the file is damaged or was changed; get it anew"),
    ],
)
def test_a_file_rewritten_in_place_while_it_is_loaded(change, message, tmp_path, monkeypatch):
    path = tmp_path / NAME
    path.write_bytes(header(lambda _: None)(good_file(tmp_path)))  # without padding, as changed
    changed, fstat = change(path.read_bytes()), os.fstat

    def rewrite(handle):
        before = fstat(handle)
        path.write_bytes(changed)
        return before

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fstat", rewrite)
        with pytest.raises(FormatError, match=message):
            Graft.load(path)


def test_a_file_rewritten_after_it_is_loaded(tmp_path):
    path = tmp_path / NAME
    path.write_bytes(good_file(tmp_path))
    loaded = Graft.load(path)
    path.write_bytes(raw(bytes(len(path.read_bytes())))(b""))
    assert Graft(loaded.rows, loaded.groups, Provenance()).id == good_graft().id


# ---- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["os.fsync", "os.chmod", "os.replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_crash_while_writing_leaves_the_old_file(step, error, tmp_path, monkeypatch):
    path = tmp_path / NAME
    path.write_bytes(b"old")

    def crash(*_arguments, **_keywords):
        raise error("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(f"hotgraft.files.{step}", crash)
        with pytest.raises(error, match="the disk is full"):
            good_graft().save(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [NAME]


def test_half_a_file_is_never_seen(tmp_path, monkeypatch):
    """When the rename comes, the whole file is there under another name in the same folder."""
    seen = []
    replace = os.replace

    def watched(source, target):
        assert Path(source).parent == tmp_path
        assert Graft.load(source) == good_graft()
        assert not Path(target).exists()
        seen.append(target)
        replace(source, target)

    monkeypatch.setattr("hotgraft.files.os.replace", watched)
    good_graft().save(tmp_path / NAME)
    assert seen == [tmp_path / NAME]
    assert os.listdir(tmp_path) == [NAME]


def test_writing_replaces_and_others_may_read(tmp_path, monkeypatch):
    good_graft().save(tmp_path / NAME)
    good_graft().invert().save(str(tmp_path / NAME))
    assert Graft.load(tmp_path / NAME) == good_graft().invert()
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o644
    monkeypatch.chdir(tmp_path)
    good_graft().save("here.graft.safetensors")
    assert Graft.load("here.graft.safetensors") == good_graft()


def test_writing_where_one_cannot(tmp_path):
    with pytest.raises(FileNotFoundError):
        good_graft().save(tmp_path / "missing" / NAME)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        good_graft().save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_the_same_graft_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        good_graft().save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    Graft.load(tmp_path / "one").save(tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one").read_bytes()


def test_other_readers_take_the_file(tmp_path):
    """safetensors' own reader gives the tensors, aligned and with their dtypes."""
    graft = graft_on(state(finite=False), 1, finite=False)
    graft.save(tmp_path / NAME)
    stored = load_file(tmp_path / NAME)
    assert sorted(stored) == sorted(f"{d}.{p}" for d in graft.groups for p in Group._fields)
    for name, group in graft.groups.items():
        assert stored[f"{name}.new"].dtype == DTYPES[name].torch
        for part, array in zip(Group._fields, group, strict=True):
            assert bits(stored[f"{name}.{part}"]).tobytes() == array.tobytes()
    head, body = split((tmp_path / NAME).read_bytes())
    assert ((tmp_path / NAME).stat().st_size - len(body)) % 8 == 0
    for tensor_name, entry in head.items():
        if tensor_name != "__metadata__":
            assert entry["data_offsets"][0] % stored[tensor_name].element_size() == 0


def test_the_specification_lists_every_dtype_and_key(tmp_path):
    text = SPECIFICATION.read_text()
    keys = split(good_file(tmp_path))[0]["__metadata__"]
    for name in (*DTYPES, *keys, "base_id"):
        assert f"`{name}`" in text


def test_an_id_may_be_taken_on_trust(tmp_path: Path) -> None:
    graft = graft_on(state(), seed=1)
    path = tmp_path / "a.graft.safetensors"
    graft.save(path)
    assert Graft.load(path, verify_id=False) == graft
    data = path.read_bytes().replace(graft.id.encode(), b"0" * 64)
    path.write_bytes(data)
    with pytest.raises(FormatError, match="its contents have id"):
        Graft.load(path)
    trusted = Graft.load(path, verify_id=False)
    assert trusted.id == "0" * 64
    path.write_bytes(data.replace(b"0" * 64, b"z" * 64))
    with pytest.raises(FormatError, match="where its id should be"):
        Graft.load(path, verify_id=False)
