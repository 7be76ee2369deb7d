"""A few activations on the 7 B shape, for `ncu` to look at: `python -m bench.gpu.profile`."""

from __future__ import annotations

from bench import shapes
from bench.gpu import work
from bench.gpu.lab import Lab

ROUNDS = 3


def main() -> None:
    """Activate and deactivate on each backend that runs here."""
    lab = Lab()
    shape = shapes.SHAPES["7B"]
    tensors = work.weights(shape, lab.device)
    graft = shapes.graft(tensors, shapes.entries_at(1e-4, shape), 1)
    for name, reason in lab.backends.items():
        if reason is not None:
            print(f"{name}: not profiled: {reason}")
            continue
        host = lab.attach(work.model(tensors), name)
        host.load(graft, "A")
        for _ in range(ROUNDS):
            host.activate("A")
            host.deactivate()
        lab.synchronize()
        host.detach()
        print(f"{name}: {ROUNDS} rounds")


if __name__ == "__main__":
    main()
