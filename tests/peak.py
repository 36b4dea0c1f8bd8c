"""The most memory that tensors take at one time: every result is counted until it is freed."""
import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Peak(TorchDispatchMode):
    """`with Peak() as peak: …`, then `peak.bytes`; without what was there before, or kernels take inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.live = 0
        self.seen  = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in self._new((args, kwargs)):           # was there before; a result may be a view of it
            self.seen[storage] = True
        result = func(*args, **(kwargs or {}))
        for storage in self._new(result):
            self.seen[storage] = True
            self.live += storage.nbytes()
            self.bytes = max(self.bytes, self.live)
            weakref.finalize(storage, self._free, storage.nbytes())
        return result

    def _new(self, tree: Any) -> list[UntypedStorage]:
        storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        return [storage for storage in storages if storage not in self.seen]

    def _free(self, size: int) -> None:
        self.live -= size
