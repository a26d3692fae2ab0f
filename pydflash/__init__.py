"""Speculative decoding of Qwen3.5/3.6-class hybrid models from Python: the public names.

They are listed in ``__init__.pyi`` and resolved when they are first used, so that importing the package loads no native
code.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
