"""Runs a benchmark as on a processor with fewer instructions; the variables for that must be set before torch loads."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence

from ran_ext._command import Parser

#: All contenders respect them: torch's kernels and ran_ext's the first, oneDNN's (and so torch.compile's) the second.
#: A cache of its own, since Inductor's does not ask what oneDNN may use: graphs compiled for AVX-512 crashed.
CACHE = os.path.join(tempfile.gettempdir(), "torchinductor_avx2")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "TORCHINDUCTOR_CACHE_DIR": CACHE}
VARIABLES = {"native": {}, "avx2": AVX2}


def parse(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with ``--isa``. Where its variables are missing the command starts again with them."""
    parser.add_argument("--isa", choices=VARIABLES, default="native", help="run as on a processor without AVX-512")
    options = parser.parse_args(argv)
    wanted: dict[str, str] = VARIABLES[options.isa]
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return options
