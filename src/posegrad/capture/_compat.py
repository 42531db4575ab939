"""The only place that imports names PyTorch does not promise to keep."""

from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["BatchNorm", "StorageWeakRef", "TorchDispatchMode", "tree_leaves"]
