"""State dicts whose tensors are made when they are asked for: a large model is written and compared in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import Tensor


class LazyWeights(Mapping[str, Tensor]):
    """name -> tensor, made by a function of the name at every access and not kept.

    Iterating over `items()` therefore holds one tensor at a time; ask for a tensor once where making it is expensive.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:  # the inherited one makes the tensor
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def mapped(weights: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> LazyWeights:
    """`weights` with `change(name, tensor)` in the place of each tensor."""

    def changed(name: str) -> Tensor:
        return change(name, weights[name])

    return LazyWeights({name: partial(changed, name) for name in weights})
