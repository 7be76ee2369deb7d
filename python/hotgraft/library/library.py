"""Library: skills by name, loaded when they are asked for."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from hotgraft.errors import DataError, HotgraftError, SkillInUseError, UnknownSkillError
from hotgraft.graft import Graft
from hotgraft.host import Host
from hotgraft.ledger import require_name
from hotgraft.library.folder import Changes, Folder, described
from hotgraft.library.shelf import Shelf, Volume
from hotgraft.placement import Names


class Entry(NamedTuple):
    """What a library knows of one skill."""

    name: str
    path: Path | None
    """None for one that was added as a graft."""
    id: str
    """As its file states it; checked when it is read."""
    tier: Literal["disk", "memory", "loaded"]
    nbytes: int
    """Of its file, of its graft in memory, or of what is loaded."""
    leases: int
    pinned: bool


class Stats(NamedTuple):
    """Counts since the library was made, and what it holds now."""

    skills: int
    loaded: int
    loaded_nbytes: int
    memory_nbytes: int
    hits: int
    """Leases of skills that were loaded."""
    misses: int
    """Those that had to wait."""
    evictions: int
    failures: int
    """Skills that could not be read or loaded."""


class Library:
    """Skills by name, for one host. Close it, or use it as a context manager.

    A skill is on disk; or it is loaded, and then it is switched to in the time that its entries
    take, however many skills there are. What is asked for is read and loaded by threads of the
    library, so that nobody waits but those who asked. Where the budget is used up, the skills go
    that were not used for longest, of those that are not live, leased or pinned. All methods may be
    called from any thread.

    Args:
        host: where skills are loaded to, under their names here. Its other skills are left alone
            and do not count.
        loaded: bytes that the loaded skills may take, on the device and in host memory together:
            on a CPU 8 an entry in bf16 and 12 in fp32, on a GPU twice that, and 256 a tensor.
        memory: bytes of grafts that are kept in host memory when they are unloaded, so that they
            need not be read again: for models on a GPU. Grafts are read into pinned memory then,
            from which it copies by itself; torch gives that in powers of two, which are not
            counted. (What is loaded into a model on the CPU is in host memory already.)
        workers: threads that read and load: so many files are read at once, in the order in which
            they were asked for.
        names, cast, partial, allow_nonfinite, verify_id: as in `host.load`.

    Raises:
        DataError: a budget or the number of workers is out of range.

    Example:
        >>> import hotgraft, tempfile, torch
        >>> model, tuned = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> folder = Path(tempfile.mkdtemp())
        >>> hotgraft.diff(model, tuned).save(folder / "sql.graft.safetensors")
        >>> with Library(hotgraft.attach(model)) as library:
        ...     print(library.scan(folder).added)
        ...     with library.using("sql"):
        ...         torch.equal(model.weight, tuned.weight)
        ('sql',)
        True
    """

    def __init__(
        self,
        host: Host,
        *,
        loaded: int = 1 << 30,
        memory: int = 0,
        workers: int = 4,
        names: Names | None = None,
        cast: bool = False,
        partial: bool = False,
        allow_nonfinite: bool = False,
        verify_id: bool = True,
    ) -> None:
        for what, number, least in (
            ("loaded", loaded, 1), ("memory", memory, 0), ("workers", workers, 1)
        ):  # fmt: skip
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise DataError(f"{what} {number!r}: wanted a whole number of at least {least}")
        self.host = host
        self._reading = {"verify_id": verify_id, "pin": memory > 0}
        self._lock = threading.RLock()
        self._volumes: dict[str, Volume] = {}
        load = functools.partial(
            host.load, names=names, cast=cast, partial=partial, allow_nonfinite=allow_nonfinite
        )
        self._shelf = Shelf(host, loaded, memory, self._lock, load)
        self._hits = self._misses = self._failures = 0
        self._folders: dict[Path, Folder] = {}
        self._closed = threading.Event()
        self._followers: list[threading.Thread] = []
        self._pool = ThreadPoolExecutor(workers, "hotgraft-library")

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Library({len(self)} skills, {len(self._shelf)} loaded, of {self.host!r})"

    # ---- what there is ---------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._volumes)

    def __contains__(self, name: object) -> bool:
        return name in self._volumes

    def __iter__(self) -> Iterator[str]:
        """The names, as they are now."""
        return iter(tuple(self._volumes))

    def __getitem__(self, name: str) -> Entry:
        """What is known of a skill. Raises `UnknownSkillError`."""
        with self._lock:
            volume = self._known(name)
            tier: Literal["disk", "memory", "loaded"] = "disk"
            nbytes = volume.file_nbytes
            if volume.loaded is not None:
                tier, nbytes = "loaded", volume.nbytes
            elif volume.graft is not None:
                tier, nbytes = "memory", volume.graft.nbytes
            return Entry(name, volume.path, volume.id, tier, nbytes, volume.leases, volume.pinned)

    @property
    def stats(self) -> Stats:
        """Counts and sizes."""
        with self._lock:
            shelf = self._shelf
            return Stats(
                len(self), len(shelf), shelf.nbytes, shelf.memory_nbytes,
                self._hits, self._misses, shelf.evictions, self._failures,
            )  # fmt: skip

    def add(self, source: Graft | str | os.PathLike[str], name: str | None = None) -> str:
        """Take a skill in. Of a file no more than the header is read now.

        Args:
            source: the path of a graft file, or a graft, which stays in memory beside the budgets.
            name: by default the file's stem, or the first 12 digits of the graft's id.

        Returns:
            the name.

        Raises:
            FormatError, OSError: it is no graft file, or cannot be read.
            GraftError: the name is no string, or empty.
            SkillInUseError: the name is taken, here or in the host.
        """
        if isinstance(source, Graft):
            volume = Volume(source.id[:12], None, source.id, source.nbytes, graft=source)
        else:
            volume = described(Path(source).absolute())
        if name is not None:
            require_name(name)
        volume.name = name or volume.name
        with self._lock:
            self._require_open()
            if volume.name in self._volumes:
                raise SkillInUseError(
                    f"there is a skill {volume.name!r} already; remove it, or give another name"
                )
            if volume.name in self.host.skills:
                raise SkillInUseError(
                    f"the host has a skill {volume.name!r} that is not this library's; "
                    "host.unload it, or give another name"
                )
            self._volumes[volume.name] = volume
        return volume.name

    def remove(self, name: str) -> None:
        """Forget a skill, and unload it. Its file stays.

        Raises:
            UnknownSkillError: there is none of that name.
            SkillInUseError: it is live, leased or pinned.
        """
        while True:
            with self._lock:
                volume = self._known(name)
                if volume.leases or volume.pinned:
                    how = f"leased ({volume.leases})" if volume.leases else "pinned"
                    raise SkillInUseError(f"{name!r} is {how}")
                coming = volume.coming
                if coming is None or not volume.begun:
                    self._shelf.forget(volume)
                    volume.removed = True
                    del self._volumes[name]
                    return
            concurrent.futures.wait([coming])  # it is being read just now

    def scan(self, folder: str | os.PathLike[str]) -> Changes:
        """Make the skills of a folder those whose files, `*.graft.safetensors`, it holds now.

        A file that was replaced is read anew when its skill is asked for next and nobody uses what
        was there before. A file that is no graft is no reason to stop: `Changes.failed` tells.
        Skills that were added otherwise are left alone.

        Raises:
            OSError: the folder cannot be read.
        """
        return self._folder(folder).scan()

    def watch(self, folder: str | os.PathLike[str], *, every: float = 2.0) -> Changes:
        """Scan a folder now, and again and again until the library is closed.

        Args:
            folder: the folder.
            every: seconds between two scans.

        Returns:
            what the first scan found. What later ones find is logged, as `hotgraft.library`.

        Raises:
            DataError: the time is none.
            OSError: the folder cannot be read now. Later that is logged.
        """
        if not every > 0:
            raise DataError(f"every {every} s: wanted more than 0")
        followed = self._folder(folder)
        found = followed.scan()
        thread = threading.Thread(
            target=followed.follow, args=(every, self._closed), name="hotgraft-watch", daemon=True
        )
        self._followers.append(thread)
        thread.start()
        return found

    def close(self) -> None:
        """Wait for what is being read, then unload the library's skills.

        What is live or leased stays loaded, under its name in the host. Who waits for a skill that
        was not begun to be read gets a `HotgraftError`.
        """
        with self._lock:
            self._closed.set()
        for thread in self._followers:
            thread.join()
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            self._shelf.clear()
            self._volumes.clear()

    # ---- use -------------------------------------------------------------------------------------

    def fetch(self, name: str) -> Future[None]:
        """Begin to load a skill, if it is not, and do not wait: for what will be asked for soon.

        Example: `await asyncio.wrap_future(library.fetch("sql"))`.

        Raises:
            UnknownSkillError: there is none of that name.
        """
        with self._lock:
            coming = self._coming(self._known(name))
        mine: Future[None] = Future()  # it may be cancelled, and the others go on
        coming.add_done_callback(functools.partial(_pass_on, mine))
        return mine

    @contextlib.contextmanager
    def lease(self, *names: str) -> Iterator[None]:
        """These skills are loaded, and stay so, in this block. Entering waits until they are.

        Raises:
            UnknownSkillError: there is none of that name.
            LibraryFullError: what is leased, pinned and live leaves no room.
            FormatError, OSError, BaseMismatchError: as `host.load`, and whatever else it raises.
                Nobody but who waits is told, and the next lease tries again.
        """
        leased: list[Volume] = []
        coming: list[Future[None]] = []
        try:
            with self._lock:
                for volume in [self._known(name) for name in dict.fromkeys(names)]:
                    coming.append(self._coming(volume))
                    volume.leases += 1
                    leased.append(volume)
                    hit = coming[-1].done() and volume.loaded is not None
                    self._hits, self._misses = self._hits + hit, self._misses + (not hit)
            while coming:  # emptied, for a failure must not keep itself alive
                try:
                    coming.pop(0).result()
                except concurrent.futures.CancelledError:
                    raise HotgraftError(_CLOSED) from None
            yield
        finally:
            with self._lock:
                for volume in leased:
                    volume.leases -= 1

    def pin(self, name: str) -> None:
        """Load a skill, and keep it loaded until it is unpinned. Raises as `lease` does."""
        with self.lease(name), self._lock:
            self._known(name).pinned = True

    def unpin(self, name: str) -> None:
        """Let a skill go when room is wanted. Raises `UnknownSkillError`."""
        with self._lock:
            self._known(name).pinned = False

    def activate(
        self, *names: str, policy: str = "refuse", weights: Sequence[float] | None = None
    ) -> None:
        """`host.activate`, of skills that are loaded first where they are not.

        Raises as `lease` and `host.activate` do.
        """
        with self.lease(*names):
            self.host.activate(*names, policy=policy, weights=weights)

    @contextlib.contextmanager
    def using(
        self,
        *names: str,
        policy: str = "refuse",
        weights: Sequence[float] | None = None,
        hold: bool = False,
    ) -> Iterator[None]:
        """`host.using`, of skills that are loaded first where they are not."""
        with self.lease(*names), self.host.using(*names, policy=policy, weights=weights, hold=hold):
            yield

    # ---- inside ----------------------------------------------------------------------------------

    def volume(self, name: str) -> Volume | None:
        """For `Folder`: a skill as the library has it."""
        return self._volumes.get(name)

    def replace(self, volume: Volume, other: Volume) -> None:
        """For `Folder`: a skill's file is another one now."""
        with self._lock:
            volume.signature, volume.file_nbytes = other.signature, other.file_nbytes
            volume.stale = volume.loaded is not None or volume.coming is not None
            if volume.loaded is None:
                self._shelf.forget(volume)
                volume.id = other.id

    def _require_open(self) -> None:
        if self._closed.is_set():
            raise HotgraftError(_CLOSED)

    def _known(self, name: str) -> Volume:
        self._require_open()
        try:
            return self._volumes[name]
        except (KeyError, TypeError):  # a list of names is no name
            raise UnknownSkillError(
                f"no skill {name!r} in the library, which has {len(self)}"
            ) from None

    def _folder(self, path: str | os.PathLike[str]) -> Folder:
        self._require_open()
        with self._lock:
            return self._folders.setdefault(Path(path).absolute(), Folder(self, path))

    def _coming(self, volume: Volume) -> Future[None]:
        """When it is done, the skill is loaded. With the lock held."""
        if volume.coming is not None:
            return volume.coming
        # What is in use stays what it is, though its file be another.
        if self._shelf.touch(volume) and (
            not volume.stale or volume.leases or self.host.in_use(volume.name)
        ):
            done: Future[None] = Future()
            done.set_result(None)
            return done
        volume.coming = self._pool.submit(self._bring, volume)
        return volume.coming

    def _bring(self, volume: Volume) -> None:
        """Read and load a skill, in a thread of the pool."""
        with self._lock:
            if volume.removed:
                raise UnknownSkillError(f"the skill {volume.name!r} was removed meanwhile")
            volume.begun = True
            stale, volume.stale = volume.stale, False
            path = volume.path
            graft = None if stale and path is not None else volume.graft
        try:
            if graft is None:
                assert path is not None
                graft = Graft.load(path, **self._reading)
            self._shelf.load(volume, graft)
        except BaseException as error:
            graft = None
            traceback.clear_frames(error.__traceback__)  # which hold it too
            with self._lock:
                volume.coming, volume.begun = None, False
                volume.stale = volume.stale or stale
                if stale and volume.loaded is not None and isinstance(error, SkillInUseError):
                    return  # live by now: it goes on as it was
                self._failures += 1
            raise


_CLOSED = "the library is closed; make another one"


def _pass_on(mine: Future[None], coming: Future[None]) -> None:
    """Give a caller's future what the library's came to."""
    if not mine.set_running_or_notify_cancel():
        return
    if coming.cancelled():
        mine.set_exception(HotgraftError(_CLOSED))
    elif (error := coming.exception()) is not None:
        mine.set_exception(error)
    else:
        mine.set_result(None)
