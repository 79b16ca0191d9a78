"""``python -m ran_ext.info`` prints what ``ran_ext.info()`` prints.

The function lives in another file: imported with the package, this one would make ``python -m`` warn.
"""

import sys
from types import ModuleType

from ran_ext._info import info

if __name__ == "__main__":
    info()


class _CallableModule(ModuleType):
    """``import ran_ext.info`` puts this module in the place of the package's function, so it can be called like it."""

    def __call__(self) -> None:
        info()


sys.modules[__name__].__class__ = _CallableModule
