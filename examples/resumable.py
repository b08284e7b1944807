"""Training that a kill at any moment cannot harm: numbered states, and a record of the arguments that made them.

    start = resume(accelerator, folder, num_steps, arguments)  # after `accelerator.prepare`
    for step in range(start, num_steps):
        ...
        if (step + 1) % checkpointing_steps == 0 or step + 1 == num_steps:
            save_state(accelerator, folder, step + 1)

`folder` then holds `arguments.json` and the two newest states, `step-<n>`, each with an empty file `done` that is
written last.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator


def resume(accelerator: Accelerator, folder: Path, num_steps: int, arguments: Mapping[str, Any]) -> int:
    """Load the newest finished state of `folder` and return its step; 0 when there is none.

    Args:
        accelerator: everything that has state is prepared by it or registered with it.
        folder: where `save_state` writes.
        num_steps: where the training ends.
        arguments: all that changes the result, by the name of the option; processes and precision are added.

    Raises:
        ValueError: the states come from other arguments, or are beyond `num_steps`.
    """
    launched = {"mixed_precision": accelerator.mixed_precision, "num_processes": accelerator.num_processes}
    arguments, record = {**arguments, **launched}, folder / "arguments.json"
    state, step = latest_state(folder)
    if state is None:
        if accelerator.is_main_process:
            write_arguments(record, arguments)
        return 0
    check_arguments(record, arguments)
    if step > num_steps:
        raise ValueError(
            f"{folder} is at step {step}, beyond the {num_steps} that are asked for. "
            "Ask for at least as many, or give another --work_dir."
        )
    accelerator.load_state(str(state))
    return step


def save_state(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write `folder/step-<step>` and remove all but the two newest finished states. Every process calls it."""
    state = folder / f"step-{step}"
    accelerator.save_state(str(state))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (state / "done").touch()
    kept = sorted(_finished_states(folder))[-2:]
    for old in folder.glob("step-*"):
        if old not in [path for _, path in kept]:
            (old / "done").unlink(missing_ok=True)  # first, so that a kill leaves nothing that looks finished
            shutil.rmtree(old)


def latest_state(folder: Path) -> tuple[Path | None, int]:
    """The newest `step-<n>` folder that `save_state` has finished, and n."""
    step, path = max(_finished_states(folder), default=(0, None))
    return path, step


def _finished_states(folder: Path) -> list[tuple[int, Path]]:
    return [(int(done.parent.name.removeprefix("step-")), done.parent) for done in folder.glob("step-*/done")]


def write_arguments(record: Path, arguments: Mapping[str, Any]) -> None:
    """Write the arguments as JSON, before the results that they make."""
    record.parent.mkdir(parents=True, exist_ok=True)
    unfinished = record.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(arguments, indent=2, sort_keys=True, default=str) + "\n")
    os.replace(unfinished, record)


def check_arguments(record: Path, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError`, naming each difference, unless `write_arguments` wrote the same arguments to `record`."""
    way_out = "Repeat the command with the arguments of then, or give another --work_dir."
    if not record.exists():
        raise ValueError(f"{record} is missing, so the arguments behind {record.parent} are unknown. {way_out}")
    then, now = json.loads(record.read_text()), json.loads(json.dumps(arguments, default=str))
    differences = [
        f"--{name} was {then.get(name)}, now is {now.get(name)}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(f"{record.parent} was made with other arguments: {'; '.join(differences)}. {way_out}")


def path_or_hub_id(name: str | Path) -> str:
    """An existing file or folder by its absolute path, so that the way to it does not matter; else as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)
