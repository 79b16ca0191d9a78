"""``python -m ran_ext.info``: the older name of ``python -m ran_ext info``."""

from ran_ext._info import info

if __name__ != "__main__":  # imported, it would take the place of the package's function
    raise ImportError("ran_ext.info is a function: call ran_ext.info(), or run python -m ran_ext info")

info()
