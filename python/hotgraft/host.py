"""Host: a live model that grafts are put into, in place, and out of again, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from hotgraft import gate as gates
from hotgraft import placement
from hotgraft.blocks import Block, Blocks
from hotgraft.composer import Composer
from hotgraft.composition import checked_weights
from hotgraft.errors import (
    AdoptWarning,
    GateError,
    GraftError,
    HostChangedError,
    HotgraftError,
    SkillInUseError,
    UnknownSkillError,
)
from hotgraft.graft import Graft
from hotgraft.kernels import POLICIES
from hotgraft.ledger import NOTHING, Ledger, LiveSet, Skill, require_name
from hotgraft.streams import Streams

__all__ = ["Host", "Skill", "attach"]


class Host:
    """A model with skills; make one with `hotgraft.attach`.

    Preparing (load, the first activation of a composed set) may fail with nothing changed.
    Committing (activate, deactivate) waits for forward passes to end, then writes in one go. All
    methods may be called from any thread.

    Example:
        >>> import hotgraft
        >>> model = torch.nn.Linear(3, 2)
        >>> tuned = {k: v.clone() for k, v in model.state_dict().items()}
        >>> _ = tuned["weight"][0].add_(1.0)
        >>> host = attach(model)
        >>> _ = host.load(hotgraft.diff(model, tuned), name="shift")
        >>> with host.using("shift"):
        ...     torch.equal(model.weight, tuned["weight"])
        True
        >>> host.active
        ()
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        base_id: str | None = None,
        backend: str | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        root = getattr(model, "_orig_mod", model)  # a torch.compile wrapper adds a prefix to names
        self._model = root
        self._slots = placement.find_slots(root)
        if not self._slots:
            raise GraftError(f"{type(model).__name__} has no parameters: nothing to graft into")
        self._streams = Streams({slot.tensor.device for slot in self._slots.values()}, stream)
        self._backends = placement.resolve_backends(self._slots, backend, stream)
        self._backend = next(iter(self._backends.values()))  # for work that no device is told for
        self._base_id = base_id
        # Taken first the gate, then the lock, which guards all that follows, and is held for short.
        self._gate = gates.Gate(self._settle, self._streams.order_entry)
        self._lock = threading.RLock()
        self._skills: dict[str, Skill] = {}
        self._composer = Composer(self._slots, self._backends)
        self._ledger = Ledger(self._slots, self._backends, self._streams)
        self._blocks = Blocks()
        compiled = root is not model
        self._remove_gates = [gates.install(root, self._gate, inner=compiled)]
        if compiled:
            self._remove_gates.append(gates.install(model, self._gate))

    def __repr__(self) -> str:
        live = ", ".join(self.active) or "nothing"
        return f"Host({type(self._model).__name__}, {len(self._skills)} skills, live: {live})"

    # ---- what is there -------------------------------------------------------------------------

    @property
    def skills(self) -> Mapping[str, Skill]:
        """The loaded skills by name."""
        return MappingProxyType(dict(self._skills))

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the live skills, in the order they were given."""
        return self._ledger.live.names

    def has(self, skill: Skill) -> bool:
        """Whether this very skill is loaded, and not another one of its name."""
        return self._skills.get(skill.name) is skill

    def in_use(self, name: str) -> bool:
        """Whether a skill is live, or an open `using` block will put it back."""
        return name in self.active or self._blocks.put_back(name)

    @property
    def base_id(self) -> str | None:
        """The base's id, where it is known."""
        return self._base_id

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the base id and the live set: a key for KV and prefix caches.

        Raises `HotgraftError` where the base id is not known."""
        if self._base_id is None:
            raise HotgraftError(
                "the digest needs the base's id: hotgraft.fingerprint(model) computes it over the "
                "weights once, for attach(model, base_id=...)"
            )
        return self._ledger.live.digest(self._base_id)

    # ---- preparing -----------------------------------------------------------------------------

    def load(
        self,
        source: Graft | str | os.PathLike[str],
        name: str | None = None,
        *,
        names: placement.Names | None = None,
        cast: bool = False,
        partial: bool = False,
        allow_nonfinite: bool = False,
        replace: bool = False,
        verify_id: bool = True,
    ) -> Skill:
        """Prepare a skill: read, check against this host's base bits, compile. Nothing is written;
        other skills may be live.

        Args:
            source: a graft or the path of a graft file.
            name: what to call it; by default the file's stem or the first 12 digits of its id.
            names: the host's name for each of the graft's (mapping or function), where they differ
                by more than a prefix.
            cast: round a graft made in another precision to the host's; the base is checked after
                rounding, and a `CastWarning` counts entries that vanish.
            partial: leave out tensors that the host lacks (`PartialWarning`).
            allow_nonfinite: let it write NaN and infinity.
            replace: take the place of a loaded skill of that name.
            verify_id: as in `Graft.load`.

        Raises:
            FormatError, OSError: the file is not a valid graft, or cannot be read.
            GraftError: the name is no string, or empty.
            BaseMismatchError: the host holds another shape, dtype or bits than the graft's base.
            CoverageError, LayoutError, ParameterError: a tensor has no counterpart that can be
                written.
            NonFiniteError: it writes NaN or infinity and may not.
            SkillInUseError: the name is taken, or the skill to be replaced is live.
        """
        self._streams.require_no_capture("loading")
        if name is not None:
            require_name(name)
        graft = source if isinstance(source, Graft) else Graft.load(source, verify_id=verify_id)
        if name is None and not isinstance(source, Graft):
            name = Path(source).name.removesuffix(".safetensors").removesuffix(".graft")
        name = name or graft.id[:12]
        self._require_free(name, replace)
        if not allow_nonfinite:
            placement.refuse_nonfinite(graft)
        fitted = placement.fit(
            graft, self._slots, self._model, self._backend,
            names=names, cast=cast, partial=partial, allow_nonfinite=allow_nonfinite,
        )  # fmt: skip
        skill = Skill(name, graft.id, placement.compile_plan(fitted, self._slots, self._backends))
        with self._lock:
            self._require_free(name, replace)
            self._ledger.settle()
            self._ledger.check_base(skill.plan, f"skill {name!r}")
            self._ledger.start_watching(skill.plan.watch)
            replaced = self._skills.get(name)
            self._skills[name] = skill
            if replaced is not None:
                self._retire(replaced)
            return skill

    def unload(self, name: str, *, force: bool = False) -> None:
        """Forget a skill and free its memory.

        Raises:
            UnknownSkillError: there is none of that name.
            SkillInUseError: it is live (`force=True` deactivates everything first) or an open
                `using` block will put it back.
        """

        def work() -> None:
            with self._lock:
                self._skill(name)
                self._require_not_put_back(name)
                if force and name in self.active:
                    self._ledger.commit(NOTHING)
                self._require_not_live(name)
                self._retire(self._skills.pop(name))

        if force:
            self._gate.commit(work)
        else:
            work()

    # ---- committing ----------------------------------------------------------------------------

    def prepare(
        self, *names: str, policy: str = "refuse", weights: Sequence[float] | None = None
    ) -> None:
        """Do all of `activate` that may fail for the set's own sake, and write nothing.

        For hosts that must switch together: prepare on all, then activate on all. Raises as
        `activate` does.
        """
        self._prepare(names, policy, weights)

    def activate(
        self, *names: str, policy: str = "refuse", weights: Sequence[float] | None = None
    ) -> None:
        """Make exactly this set of skills live.

        A set that was never composed before is composed first; its plan is kept.

        Args:
            names: loaded skills, each once; none at all deactivates.
            policy: how they meet, see `compose`.
            weights: a number a skill, 1.0 by default.

        Raises:
            UnknownSkillError, GraftError: a name, policy or weight is wrong.
            OverlapError, NonFiniteError: the set cannot be composed under that policy.
            HostChangedError: somebody else moved or wrote the weights; nothing was written now.
            GateError: called inside a forward pass or hold of the same thread.
        """
        self._commit(self._prepare(names, policy, weights))

    def deactivate(self) -> None:
        """Put the base's bits back. Raises as `activate` does."""
        self._commit(NOTHING)

    @contextlib.contextmanager
    def using(
        self,
        *names: str,
        policy: str = "refuse",
        weights: Sequence[float] | None = None,
        hold: bool = False,
    ) -> Iterator[None]:
        """Activate for a block, then put back what was live before, also on an exception. Nests.

        The live set is the whole host's, whichever thread or task changes it. A block that ends
        while a later one is open leaves that one's set live; the later one then puts back what this
        one would have.

        Args:
            names, policy, weights: as in `activate`, which says what is raised too.
            hold: `hold` in the block as well, with no commit between: it is this set in all of it.
        """
        block, target = Block(), self._prepare(names, policy, weights)
        try:
            if hold:
                self._ledger.prefetch(target)
                with self._gate.holding(functools.partial(self._switch, target, block)):
                    yield
            else:
                self._commit(target, block)
                yield
        finally:
            if block in self._blocks:
                try:
                    self._gate.commit(functools.partial(self._leave, block))
                except GateError:  # inside a hold: nobody could leave it later
                    with self._lock:
                        self._blocks.close(block)
                    raise

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """No commit happens in this block: one generation, one set of weights.

        Commits of other threads wait; one of this thread is a `GateError`. Passes of any thread go
        on meanwhile, so the block may use a thread pool, and a generator may enter it in one thread
        and leave it in another. A commit that waits lets no new hold in, but for those nested in a
        hold or pass of the same thread.
        """
        return self._gate.holding()

    # ---- checking ------------------------------------------------------------------------------

    def verify(self) -> int:
        """Check that every entry of every skill holds what it should; returns how many it checked.

        Where the base's id is known the whole base is checked too, about 1 s a GB, so no write goes
        unseen. When everything holds, commits that were refused for a write go on.

        Raises:
            HostChangedError: naming the tensor, position, found and wanted bits, or the base's id.
        """
        return self._gate.share(self._verify)

    def adopt(self) -> tuple[str, ...]:
        """Make the weights as they are now the new base, with nothing live.

        The base id is unknown from then on. Skills that do not fit the new base are unloaded, with
        an `AdoptWarning`; their names are returned (`Graft.rebase` makes them fit again).

        Raises:
            SkillInUseError: a `using` block is open.
            HostChangedError: a tensor was moved or replaced, not only written.
        """
        self._streams.require_no_capture("adopting")
        misfits = self._gate.commit(self._adopt)
        if misfits:
            warnings.warn(
                f"unloaded because they do not fit the adopted base: {', '.join(misfits)}; rebase "
                "their grafts and load them again",
                AdoptWarning,
                stacklevel=2,
            )
        return tuple(misfits)

    def detach(self, *, force: bool = False) -> None:
        """Take the gate away and let go of the model, which holds the base's bits.

        Raises:
            SkillInUseError: skills are live; `force=True` deactivates them first, or, where the
                weights were moved or written meanwhile, leaves them as they are.
        """
        self._gate.commit(functools.partial(self._detach, force))

    # ---- inside ----------------------------------------------------------------------------------

    def _require_attached(self) -> None:
        if not self._remove_gates:
            raise HotgraftError("this host was detached; attach the model again")

    def _skill(self, name: str) -> Skill:
        try:
            return self._skills[name]
        except (KeyError, TypeError):  # a list of names is no name
            known = ", ".join(self._skills) or "none yet"
            raise UnknownSkillError(f"no skill {name!r} is loaded; loaded are: {known}") from None

    def _require_free(self, name: str, replace: bool) -> None:
        self._require_attached()
        if name in self._skills and not replace:
            raise SkillInUseError(f"a skill {name!r} is loaded already; replace=True replaces it")
        self._require_not_put_back(name)
        self._require_not_live(name)

    def _require_not_live(self, name: str) -> None:
        if name in self.active:
            raise SkillInUseError(f"{name!r} is live; deactivate first, or unload(force=True)")

    def _require_not_put_back(self, name: str) -> None:
        if self._blocks.put_back(name):
            raise SkillInUseError(f"an open `using` block will put {name!r} back; leave it first")

    def _retire(self, skill: Skill) -> None:
        self._ledger.stop_watching(skill.plan.watch)
        self._composer.forget(skill)
        skill.forget_alone()

    def _prepare(
        self, names: Sequence[str], policy: str, weights: Sequence[float] | None
    ) -> LiveSet:
        self._require_attached()
        self._streams.require_no_capture("the switch")
        if not names:
            return NOTHING
        if len(names) == 1 and weights is None and policy in POLICIES:
            return self._skill(names[0]).alone
        skills = tuple(self._skill(name) for name in names)
        if len(set(names)) != len(names):
            raise GraftError(f"a skill is named twice: {', '.join(names)}")
        grafts = [skill.plan.graft for skill in skills]
        # -0.0 becomes 0.0: the two are equal as keys, but not as factors.
        given = tuple(w + 0.0 for w in checked_weights(grafts, policy, weights))
        if given == (1.0,):
            return skills[0].alone
        return self._composer.prepare(LiveSet(skills, given, policy if len(skills) > 1 else ""))

    def _commit(self, target: LiveSet, block: Block | None = None) -> None:
        self._ledger.prefetch(target)
        self._gate.commit(functools.partial(self._switch, target, block))

    def _switch(self, target: LiveSet, block: Block | None) -> None:
        with self._lock:
            self._require_attached()
            for skill in target.skills:
                if self._skills.get(skill.name) is not skill:
                    raise UnknownSkillError(f"{skill.name!r} was unloaded or replaced meanwhile")
            if block is not None:
                self._blocks.open(block, self._ledger.live)
            self._ledger.commit(target)

    def _leave(self, block: Block) -> None:
        with self._lock:
            if self._blocks.close(block) and self._ledger.live is not block.before:
                self._ledger.commit(block.before)

    def _verify(self) -> int:
        with self._lock:
            self._require_attached()
            plans = {f"skill {name!r}": skill.plan for name, skill in self._skills.items()}
            return self._ledger.verify(plans, self._base_id)

    def _adopt(self) -> list[str]:
        with self._lock:
            self._require_attached()
            if self._blocks:
                raise SkillInUseError(
                    "adopt() inside a `using` block would have nothing to go back to"
                )
            self._ledger.settle()
            skills = self._skills.values()
            misfits = [s.name for s in skills if not self._ledger.fits_memory(s.plan)]
            self._base_id = None
            self._ledger.forget()
            for name in misfits:
                self._retire(self._skills.pop(name))
            self._ledger.trust(skill.plan for skill in skills)
            return misfits

    def _detach(self, force: bool) -> None:
        with self._lock:
            if self.active and not force:
                raise SkillInUseError(
                    f"{', '.join(self.active)} is live; deactivate first, or detach(force=True)"
                )
            failure = None
            try:
                self._ledger.commit(NOTHING)
            except HostChangedError:
                pass  # they stay as they are
            except Exception as error:
                if not force:
                    raise
                failure = error
            for remove in self._remove_gates:
                remove()
            self._remove_gates.clear()
            self._blocks.clear()
            self._skills.clear()
            self._composer.forget()
            self._ledger.forget()
            if failure is not None:
                raise HotgraftError(
                    f"detached, but the way back failed ({failure}): the weights may hold a part "
                    "of a switch; load them anew"
                ) from failure

    @gates.untraced
    def _settle(self) -> None:
        if not self._ledger.settled:
            with self._lock:
                self._ledger.settle()


def attach(
    model: torch.nn.Module,
    *,
    base_id: str | None = None,
    backend: str | None = None,
    stream: torch.cuda.Stream | None = None,
) -> Host:
    """Make a model a host for grafts.

    The model keeps its addresses; its root `forward` gets a gate. Attach once, and after the model
    is where it should be (`model.to(...)` moves storage).

    Args:
        model: any module, a `torch.compile`d one included, on the CPU or on one or more devices.
        base_id: `hotgraft.fingerprint` of its weights, needed only for `host.digest`.
        backend: a backend's name (`hotgraft doctor` lists them), to use it and no other.
        stream: the CUDA stream that commits are enqueued on; by default the one that is current
            at each. Passes on other streams are put into order by events.

    Raises:
        BackendError: the backend asked for, or one for the model's device, is not there; or the
            stream is another device's.
        GateError: a host is attached to the model already.
        GraftError: it has no parameters.
        LayoutError: somebody put its elements into another order (`hotgraft.placement.Order`), so
            that grafts need a trace: `hotgraft.serve.rank.Rank` has one.
    """
    placement.refuse_rearranged(model)
    return Host(model, base_id=base_id, backend=backend, stream=stream)
