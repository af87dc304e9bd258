"""Counts the bytes of the tensors that a process gives to collectives."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's c10d operators -> the collective. Their tensors: the whole result of an all-gather, what goes into a
# reduce-scatter, else what is sent.
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
}


class CollectiveBytes(TorchDispatchMode):
    """Within it, `total` has the bytes by collective: also of those that DDP starts in C++."""

    def __init__(self):
        super().__init__()
        self.total = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket._qualified_op_name.partition("::")[2]
            kind = COLLECTIVES.get(name, name)
            # all-gather: its results are the first argument; reduce-scatter: its inputs the second
            tensors = tree_leaves(args[1] if kind == "reduce_scatter" else args[0])
            self.total[kind] += sum(t.numel() * t.element_size() for t in tensors if hasattr(t, "numel"))
        return func(*args, **(kwargs or {}))
