"""Transfer: grafts as a weight-transfer backend of vLLM, for trainers that ship deltas.

`weight_transfer_config={"backend": "hotgraft"}` makes vLLM's own calls take grafts: between
`start_weight_update` and `finish_weight_update` each `update_weights` names a file. It is prepared
on every rank at once, while what is live stays as it is; only the end makes it live. Where the rank
refuses, the update ends with its error, and the server goes on with the weights that it had. Of
several ranks vLLM 0.32 reads the answers up to the first error and no further, so all later answers
are those of the call before: restart it then, or ship grafts by `connect` of
`hotgraft.serve.vllm.worker`, whose calls return errors and take back what succeeded elsewhere.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from hotgraft.errors import SkillInUseError
from hotgraft.serve.rank import Rank
from hotgraft.serve.ranks import POLL
from hotgraft.serve.vllm.worker import rank_of


@dataclasses.dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: ranks read files."""


@dataclasses.dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A graft to make live."""

    path: str
    """Of its file, which every rank can read."""
    name: str = "update"
    """What to call it."""
    cast: bool = False
    """As in `Host.load`."""


class GraftTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Makes the grafts of an update live, and no others; an update without any brings the base."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fresh: dict[str, str] = {}  # of this update: what they are called here
        self._live: list[str] = []  # of the last one

    def init_transfer_engine(self, init_info: InitInfo) -> None:  # noqa: ARG002 - vLLM's signature
        """Attach to the model now, so that the first update need not wait for it."""
        rank_of(self.model, self.vllm_config)

    @property
    def _rank(self) -> Rank:
        return rank_of(self.model, self.vllm_config)

    def start_weight_update(self) -> None:
        """Begin; what an update before this one left unfinished is dropped."""
        self._drop()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Prepare a graft.

        Args:
            update_info: the fields of `UpdateInfo`.

        Raises:
            ValueError: a field is unknown or missing.
            SkillInUseError: the update has a graft of that name already.
            OverlapError: it writes what another one of the update writes.
            FormatError, OSError, BaseMismatchError, LayoutError, NonFiniteError: it cannot be put
                into this rank.
        """
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Prepare a graft; see `update_weights`. After an error nothing of the update is left."""
        rank, given = self._rank, update_info.name
        token = uuid.uuid4().hex
        name = f"{given} ({token[:8]})"  # the last update's are live under theirs
        try:
            if given in self._fresh:
                raise SkillInUseError(f"this update has a graft {given!r} already")
            rank.begin(name, token, update_info.path, update_info.cast)
            try:
                while rank.prepared(name, token) is None:
                    time.sleep(POLL)
            except BaseException:
                rank.withdraw(name, token)
                raise
            rank.keep(name, token)
            self._fresh[given] = name
            rank.prepare(tuple(self._fresh.values()), "refuse", None)
        except BaseException:
            self._drop()  # vLLM ends the update here, and takes no error later
            raise

    def finish_weight_update(self) -> None:
        """Make the update's grafts live, in place of those of the one before.

        Raises:
            HostChangedError: somebody else wrote the weights.
        """
        rank = self._rank
        rank.activate(tuple(self._fresh.values()), "refuse", None)
        before, self._live, self._fresh = self._live, list(self._fresh.values()), {}
        for name in before:
            rank.unload(name)

    def _drop(self) -> None:
        for name in self._fresh.values():
            self._rank.unload(name)
        self._fresh = {}

    def shutdown(self) -> None:
        """Nothing is held open."""
