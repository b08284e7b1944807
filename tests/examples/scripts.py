"""Running the example scripts as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def run_script(script: str, *arguments: str, folder: Path, launch: int = 0, timeout: float = 300) -> str:
    """What a script prints (both streams); raises with it when the script fails.

    Args:
        script: path from the repository's root.
        *arguments: of the script.
        folder: working directory.
        launch: processes under `accelerate launch`; 0 runs plain Python.
        timeout: seconds.
    """
    command = [sys.executable]
    if launch:
        # `--multi_gpu` only means "through torchrun"; without a GPU the processes talk through gloo.
        several = ["--multi_gpu"] if launch > 1 else ["--cpu"]
        command += ["-m", "accelerate.commands.launch", *several, "--num_processes", str(launch)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0"] if launch > 1 else []
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [*command, str(ROOT / script), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if result.returncode:
        raise AssertionError(f"{script} ended with {result.returncode}:\n{result.stdout[-6000:]}")
    return result.stdout
