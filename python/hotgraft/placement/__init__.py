"""Placement: where a checkpoint coordinate lives in a host, and a graft compiled for it."""

from hotgraft.placement.fit import fit, refuse_nonfinite
from hotgraft.placement.names import Names
from hotgraft.placement.orders import Order, refuse_rearranged
from hotgraft.placement.overlay import expected_bits, share_cells
from hotgraft.placement.plain import Backends, Launch, Plan, compile_plan, resolve_backends
from hotgraft.placement.regions import Region, View
from hotgraft.placement.slots import Slot, find_slots
from hotgraft.placement.traced import Placed, Trace
from hotgraft.placement.tracing import Loader, trace
from hotgraft.placement.watch import Watch, Wiring, watch

__all__ = [
    "Backends",
    "Launch",
    "Loader",
    "Names",
    "Order",
    "Placed",
    "Plan",
    "Region",
    "Slot",
    "Trace",
    "View",
    "Watch",
    "Wiring",
    "compile_plan",
    "expected_bits",
    "find_slots",
    "fit",
    "refuse_nonfinite",
    "refuse_rearranged",
    "resolve_backends",
    "share_cells",
    "trace",
    "watch",
]
