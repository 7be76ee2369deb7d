"""Files that a server cannot read or write just now, and such as it never can."""

import asyncio
import errno

import pytest

pytest.importorskip("prometheus_client")

from hotgraft.library import folder as library_folder
from hotgraft.library.folder import ENDING
from hotgraft.serve.vllm import folder
from skill_toys import Toy, digest


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


def test_a_file_that_cannot_be_read_now_is_tried_again(toy, monkeypatch):
    """It need not be written anew: to let others read a file, or to have fewer of them open, does
    not touch it."""

    def described(path):
        raise OSError(errno.EMFILE, "too many open files", str(path))

    async def run():
        toy.write(known="aa")
        await toy.skills.scan()
        await toy.use("known")
        toy.write(known="bb", new="cc")
        monkeypatch.setattr(folder, "described", described)
        for _ in range(2):
            await toy.skills.scan()
            assert set(toy.skills) == {"known"}
            assert await toy.use("known") == digest("aa")
        monkeypatch.setattr(folder, "described", library_folder.described)
        await toy.skills.scan()
        assert set(toy.skills) == {"known", "new"}
        assert await toy.use("known") == digest("bb")
        assert toy.consistent()

    asyncio.run(run())
    assert [line["skill"] for line in toy.events("refusal")] == ["new"]  # once


def test_a_link_to_itself_keeps_no_other_file_out(toy):
    async def run():
        toy.write(sql="aa")
        link = toy.skills.folder / f"link{ENDING}"
        link.symlink_to(link)
        for _ in range(2):
            await toy.skills.scan()
            assert set(toy.skills) == {"sql"}
        with pytest.raises(FileNotFoundError, match="no file 'link"):
            toy.skills.find("link")

    asyncio.run(run())
    assert [line["skill"] for line in toy.events("refusal")] == ["link"]


def test_a_folder_in_the_place_of_a_file_is_no_skill(toy):
    async def run():
        toy.write(sql="aa")
        await toy.skills.scan()
        path = toy.skills.find("sql")
        path.unlink()
        path.mkdir()
        await toy.skills.scan()
        assert not toy.skills

    asyncio.run(run())


def test_a_log_that_cannot_be_written_undoes_nothing(toy, monkeypatch):
    def write(_):
        raise OSError(errno.ENOSPC, "no space left")

    async def run():
        toy.write(sql="aa")
        await toy.skills.scan()
        monkeypatch.setattr(toy.log, "write", write)
        assert await toy.use("sql") == digest("aa")
        assert toy.consistent()
        await toy.skills.unload("sql")
        assert toy.consistent()

    asyncio.run(run())
