"""The tools, a module for each kind; importing this fills ``ecosystem.harness.TOOLS`` in the table's order."""

from ecosystem.tools import (
    parameters,
    normalisation,
    quantisation,
    memory,
    functional,
    features,
    counters,
    copies,
    export,
    compile,
    contexts,
    processes,
    trainers,
)
