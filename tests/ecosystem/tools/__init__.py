"""The tools, a module for each kind; importing this fills ``ecosystem.harness.TOOLS``, in the order of the table."""

from importlib import import_module

KINDS = (
    "parameters",
    "normalisation",
    "quantisation",
    "memory",
    "functional",
    "features",
    "counters",
    "copies",
    "export",
    "compile",
    "contexts",
    "processes",
    "trainers",
)
for kind in KINDS:
    import_module(f"ecosystem.tools.{kind}")
