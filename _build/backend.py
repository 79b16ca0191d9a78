"""PEP 517 backend: setuptools', building against the torch that the target environment has.

pip builds in an isolated environment, without the target's site-packages. A build requirement ``torch`` would download
the newest torch there, of several GB, and build for that one. But pip runs the target's own Python, so ``sysconfig``
still names the folder where torch lies: it goes to the end of ``sys.path``. Only where none lies, the pin is required.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

Settings = dict[str, Any] | None


def target_torch() -> Path | None:
    """The site-packages folder, of the environment being installed into, that holds torch."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists() and "include-system-site-packages = true" in config.read_text():
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        folders += [sysconfig.get_path("purelib", vars=base), site.getusersitepackages()]
    elif not config.exists():
        folders.append(site.getusersitepackages())
    return next((Path(folder) for folder in folders if (Path(folder) / "torch" / "version.py").exists()), None)


def build_requirements() -> list[str]:
    if os.environ.get("RAN_EXT_NO_NATIVE", "") not in ("", "0"):
        return ["setuptools>=77"]
    found = target_torch()
    pin = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["ran_ext"]["torch"]
    return ["setuptools>=77", "ninja", *([] if found else [f"torch=={pin}", "numpy"])]


def _setuptools() -> Any:
    """The backend of setuptools, importable once that requirement is met; torch goes after all else on the path."""
    from setuptools import build_meta

    found = target_torch()
    if found is not None and str(found) not in sys.path:
        sys.path.append(str(found))
    return build_meta


def get_requires_for_build_wheel(settings: Settings = None) -> list[str]:
    return build_requirements()


def get_requires_for_build_editable(settings: Settings = None) -> list[str]:
    return build_requirements()


def get_requires_for_build_sdist(settings: Settings = None) -> list[str]:
    return ["setuptools>=77"]


def prepare_metadata_for_build_wheel(folder: str, settings: Settings = None) -> Any:
    return _setuptools().prepare_metadata_for_build_wheel(folder, settings)


def prepare_metadata_for_build_editable(folder: str, settings: Settings = None) -> Any:
    return _setuptools().prepare_metadata_for_build_editable(folder, settings)


def build_wheel(folder: str, settings: Settings = None, metadata: str | None = None) -> Any:
    return _setuptools().build_wheel(folder, settings, metadata)


def build_editable(folder: str, settings: Settings = None, metadata: str | None = None) -> Any:
    return _setuptools().build_editable(folder, settings, metadata)


def build_sdist(folder: str, settings: Settings = None) -> Any:
    os.environ["RAN_EXT_NO_NATIVE"] = "1"  # the sources, which need no torch
    return _setuptools().build_sdist(folder, settings)
