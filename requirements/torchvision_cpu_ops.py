"""Lets PyPI's torchvision, a CUDA build, be imported beside a CPU build of torch.

Its extension does not load there, and torchvision then fails while it describes operators that the extension would have
defined. They are declared here when torchvision is first imported, so that SGLang and transformers find the package;
nothing calls them. Installed with its .pth file into site-packages, since every process that a server starts needs it.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import version

_OPERATORS = ("nms", "qnms")


class _DeclareOperators(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is not None or version("torchvision").endswith("+cpu"):
                return None  # the extension loads, and defines them itself
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in _OPERATORS:
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _DeclareOperators.library = library  # the declarations live as long as this object
        return None


sys.meta_path.insert(0, _DeclareOperators())
