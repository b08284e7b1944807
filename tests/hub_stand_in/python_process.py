"""Python code in a process of its own, where it can import `huggingface_hub` with settings of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


_ROOT = Path(__file__).resolve().parents[2]


def run_python(
    code: str | Path, environment: Mapping[str, str], *, arguments: Sequence[str] = (), timeout: float = 240
) -> str:
    """Run Python code, or a script when `code` is a `Path`, in a fresh process with one thread.

    The process runs in the repository's root and can import both `diffusers_ext` and `tests`.

    Args:
        code: The code itself, or the path of a script.
        environment: What to set beside the present environment.
        arguments: Command-line arguments.
        timeout: Seconds after which the process is killed.

    Returns:
        What the process wrote to its standard output.

    Raises:
        AssertionError: If the process fails or takes too long; the message ends with its standard error.
    """
    command = [sys.executable, str(code)] if isinstance(code, Path) else [sys.executable, "-c", code]
    search = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    present = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **environment}
    try:
        done = subprocess.run(
            [*command, *arguments],
            env=present,
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        stderr = error.stderr or ""
        if isinstance(stderr, bytes):  # which it is on POSIX, in spite of `text=True`
            stderr = stderr.decode(errors="replace")
        raise AssertionError(
            f"The process took more than {timeout} s. Its standard error:\n{stderr[-8000:]}"
        ) from None
    if done.returncode:
        raise AssertionError(f"The process ended with {done.returncode}. Its standard error:\n{done.stderr[-8000:]}")
    return done.stdout
