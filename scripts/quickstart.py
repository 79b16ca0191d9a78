"""Everything from a fresh clone to a result, in one command (standard library only, Python 3.11 or later):

    python3 scripts/quickstart.py train     # trains on the CIFAR-10 sample in the package; on the whole set in data/
    python3 scripts/quickstart.py test      # runs the tests

``train`` on the sample takes the largest of three lengths that ends within ten minutes on this machine, and says so;
``quickstart.py train --scale full`` takes the full length. Both make a virtual environment in ``.venv``, install
torch and ran_ext there, and go on; a second run starts at once.
What follows the command goes to the training script or to pytest: ``quickstart.py train --epochs 2``. With ``--system``
before the command the running Python is used, with the torch it has.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
#: A CPU build of torch and what goes with it; the CUDA build is several times larger.
NEEDED_GB, NEEDED_GB_CUDA = 3, 12


#: What each task runs, and the modules it needs beside ran_ext's own.
COMMANDS = {
    "train": (["scripts/train_cifar10.py"], "tensorboard, matplotlib"),
    "test": (["-m", "pytest"], "pytest, hypothesis, pytest_benchmark, xdist"),
}


class Problem(Exception):
    """What went wrong, and what to do next."""


def say(text: str) -> None:
    print(f"quickstart: {text}", flush=True)


def torch_pin() -> str:
    import tomllib

    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ran_ext"]["torch"])


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and not subprocess.run([tool, "-L"], capture_output=True).returncode


def check_machine() -> None:
    """Stop before any download where the build would fail."""
    version = sys.version.split()[0]
    if sys.version_info < (3, 11):  # noqa: UP036  an older Python may be what "python3" means
        raise Problem(f"Python 3.11 or later is needed, this is {version}; name one: python3.12 {sys.argv[0]} ...")
    needed = NEEDED_GB_CUDA if has_nvidia_gpu() else NEEDED_GB
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < needed and not VENV.exists():
        raise Problem(f"{needed} GB of disk are needed under {ROOT}, {free:.1f} GB are free; make room and try again")


def make_venv() -> Path:
    """The Python of ``.venv``, which is made where it is missing or broken."""
    python = VENV / "bin" / "python"
    if python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return python
    say(f"making a virtual environment in {VENV}")
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
    if done.returncode:
        raise Problem(
            f"{done.stdout}{done.stderr}\nno virtual environment could be made; on Debian and Ubuntu: apt install "
            f"python3-venv; or use an environment of your own: {Path(sys.argv[0]).name} --system ..."
        )
    return python


def pip(python: Path, *words: str, **environment: str) -> bool:
    return not subprocess.run(
        [python, "-m", "pip", "install", "--disable-pip-version-check", "-q", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
    ).returncode


def runs(python: Path, code: str) -> bool:
    return not subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True).returncode


@contextlib.contextmanager
def kernels_meanwhile(python: Path) -> Iterator[Callable[[], None]]:
    """Compile the kernels while torch is fetched, of which they know nothing; call what it gives to wait for them.

    A failure is the build's to tell, which compiles what is missing.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))[:1]
    pure = os.environ.get("RAN_EXT_NO_NATIVE", "") not in ("", "0")
    if pure or not all(map(shutil.which, compiler)) or runs(python, "import torch"):
        yield lambda: None
        return
    code = "import os; os.nice(10); from _build import native; native.compile_all(native.cpu_tasks())"
    nowhere = subprocess.DEVNULL
    compiling = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=nowhere, stderr=nowhere)

    def wait() -> None:
        if compiling.poll() is None:
            say("compiling the kernels")
        compiling.wait()

    try:
        yield wait
    finally:
        compiling.terminate()
        compiling.wait()


def install_torch(python: Path) -> None:
    """The pinned torch, unless one that fits is there: with CUDA where there is a GPU, else the CPU's own build."""
    if runs(python, "import torch; v = torch.__version__.split('.'); assert v[0] == '2' and 11 <= int(v[1]) <= 15"):
        return
    wanted = f"torch=={torch_pin()}"
    if has_nvidia_gpu():
        say(f"installing {wanted} with CUDA (a download of 3 GB; some minutes)")
        done = pip(python, wanted)
    elif reaches(CPU_WHEELS):
        say(f"installing {wanted} for the CPU (a download of 200 MB)")
        done = pip(python, f"{wanted}+cpu", "--extra-index-url", CPU_WHEELS)
    else:  # pip itself would try for a minute
        say(f"installing {wanted} from the package index; the CPU builds' own index was not reached")
        done = pip(python, wanted)
    if not done:
        raise Problem(
            "torch could not be installed; pip's message stands above. Without a network: install torch 2.11 to 2.15 "
            f"into an environment of your own, activate it, and run: python {Path(sys.argv[0]).name} --system ..."
        )


def reaches(url: str) -> bool:
    try:
        with socket.create_connection((urlsplit(url).hostname or "", 443), timeout=5):
            return True
    except OSError:
        return False


def sources_digest() -> str:
    """Digest of the names and contents of the extension's sources: it is rebuilt when one has changed."""
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *ROOT.glob("_build/*.py"), *ROOT.glob("csrc/**/*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def install_package(python: Path, extra: str, keep: bool) -> None:
    """Install ran_ext from this folder, with kernels where a compiler makes them; ``keep`` what is installed."""
    stamp = VENV / f"ran_ext-{extra}.txt"
    digest = sources_digest()
    if keep or (stamp.exists() and stamp.read_text() == digest and runs(python, "import ran_ext")):
        return
    say("installing build tools")
    if not pip(python, "setuptools>=77", "ninja", "numpy"):
        raise Problem("the build tools could not be installed; check the network, and run this again")
    say("building ran_ext (some minutes on two cores)")
    target = ("--no-build-isolation", "-e", f".[{extra}]")
    if not pip(python, *target):
        say("the kernels were not built; the reason stands above (a C++ compiler is needed: apt install g++)")
        say("going on with plain PyTorch: all works, more slowly")
        if not pip(python, *target, RAN_EXT_NO_NATIVE="1"):
            raise Problem("ran_ext could not be installed; pip's message stands above")
    elif python.is_relative_to(VENV):
        stamp.write_text(digest)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--system] {train,test} ...",
        allow_abbrev=False,
    )
    parser.add_argument("--system", action="store_true", help="use the running Python instead of .venv")
    parser.add_argument("task", nargs="?", choices=list(COMMANDS), help="what to do")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="for the training script, or for pytest")
    arguments = parser.parse_args(argv)
    if arguments.task is None:
        parser.print_help()
        return 2
    words, needs = COMMANDS[arguments.task]
    try:
        check_machine()
        python = Path(sys.executable) if arguments.system else make_venv()
        with kernels_meanwhile(python) as wait:
            install_torch(python)
            wait()
        install_package(python, arguments.task, keep=arguments.system and runs(python, f"import ran_ext, {needs}"))
    except Problem as problem:
        say(str(problem))
        return 1
    subprocess.run([python, "-m", "ran_ext", "info"], cwd=ROOT)
    try:
        return subprocess.run([python, *words, *arguments.rest], cwd=ROOT).returncode
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
