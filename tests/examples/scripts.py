"""Running the example scripts as a user runs them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).parents[2]


def run_script(
    script: str, *arguments: str, folder: Path, launch: int = 0, launcher: str = "accelerate", timeout: float = 300
) -> str:
    """What a script prints (both streams); raises with it when the script fails.

    Args:
        script: path from the repository's root.
        *arguments: of the script.
        folder: working directory.
        launch: processes under the launcher; 0 runs plain Python.
        launcher: "accelerate" or "torchrun".
        timeout: seconds.
    """
    options: list[str] = []
    if launch and launcher == "torchrun":
        options = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(launch)]
    elif launch:
        # `--multi_gpu` only means "through torchrun"; without a GPU the processes talk through gloo.
        several = ["--multi_gpu"] if launch > 1 else ["--cpu"]
        options = [*_accelerate(several, launch), "--num_machines", "1"]
        options += ["--main_process_port", "0"] if launch > 1 else []
    result = subprocess.run(
        [sys.executable, *options, str(ROOT / script), *arguments],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if result.returncode:
        raise AssertionError(f"{script} ended with {result.returncode}:\n{result.stdout[-6000:]}")
    return result.stdout


def run_on_machines(
    script: str, *arguments: str, folders: Sequence[Path], launcher: str = "accelerate", timeout: float = 300
) -> list[str]:
    """What a script prints on each of several "machines": launchers of one process each, on loopback addresses.

    Args:
        script: path from the repository's root.
        *arguments: of the script, the same on all.
        folders: working directory of each machine; the first is the main one, at 127.0.0.2.
        launcher: "accelerate" or "torchrun".
        timeout: seconds for all.
    """
    number, main, port = len(folders), "127.0.0.2", str(_free_port("127.0.0.2"))
    environment = {**_environment(), "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    for rank, folder in enumerate(folders):
        if launcher == "torchrun":
            options = ["-m", "torch.distributed.run", "--nnodes", str(number), "--nproc_per_node", "1"]
            options += ["--node_rank", str(rank), "--master_addr", main, "--master_port", port]
            options += ["--local_addr", main if rank == 0 else "127.0.0.1"]
        else:
            options = [*_accelerate(["--multi_gpu"], number), "--num_machines", str(number)]
            options += ["--machine_rank", str(rank), "--main_process_ip", main, "--main_process_port", port]
        processes.append(
            subprocess.Popen(
                [sys.executable, *options, str(ROOT / script), *arguments],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    deadline = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()  # a launcher ends its processes then; nothing happens to one that has ended
        for process in processes:
            process.wait()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        if process.returncode:
            raise AssertionError(f"{script} ended with {process.returncode} on machine {rank}:\n{output[-6000:]}")
    return outputs


def _accelerate(several: list[str], processes: int) -> list[str]:
    options = ["-m", "accelerate.commands.launch", *several, "--num_processes", str(processes)]
    return [*options, "--mixed_precision", "no", "--dynamo_backend", "no"]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def _free_port(host: str) -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        return listener.getsockname()[1]
