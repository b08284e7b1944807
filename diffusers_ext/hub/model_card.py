"""The one template of every model card, and the check that a card must pass before it is uploaded.

A card is a Markdown file named `README.md` that opens with front matter, a YAML block between two lines of `---`. The
Hub reads the block for its filters, and refuses a commit whose block it cannot accept, so both functions here refuse
it first and say why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4


BASE_MODEL_RELATIONS = ("adapter", "finetune", "merge", "quantized")

_FRONT_MATTER = re.compile(r"\A---\r?\n.*?^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_PICTURE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.png")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ARXIV_ID = re.compile(r"\d{4}\.\d{4,5}")
_HUB_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_HUB_NAME}(?:/{_HUB_NAME})?")


def write_model_card(
    folder: str | os.PathLike[str],
    *,
    title: str,
    summary: str,
    license: str = "apache-2.0",
    library_name: str = "diffusers",
    tags: Sequence[str] = (),
    base_model: str | os.PathLike[str] | None = None,
    base_model_relation: str | None = None,
    pipeline_tag: str | None = None,
    arxiv_id: str | None = None,
    usage: str | None = None,
    sections: Mapping[str, str] | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `README.md`, a model card with valid front matter, and its pictures into `folder`.

    Each file is written beside its place and then moved there, so a reader or an interrupted run never meets half a
    card. Existing files of these names are replaced; pictures come before the card that shows them.

    Args:
        folder: Where the card goes; created when missing.
        title: The heading, one line.
        summary: Markdown below the heading: what this is, in a few lines.
        license: Identifier of the licence of the saved files, as the Hub spells it.
        library_name: Which library loads the files. It decides the loading snippet that the Hub shows.
        tags: Filters under which the Hub lists the repository.
        base_model: The model on the Hub that these files were made from or belong to. A local path is left out of the
            card, together with `base_model_relation`: the Hub refuses front matter that names one, and a path says
            nothing to a reader elsewhere.
        base_model_relation: How the files stand to `base_model`: `"adapter"`, `"finetune"`, `"merge"` or
            `"quantized"`.
        pipeline_tag: The task under which the Hub lists the repository. It has no default: a wrong task is worse than
            none, since the Hub then offers a widget that cannot work.
        arxiv_id: The paper, such as `"2406.01733"`, linked as its page on the Hub.
        usage: Python code, without a fence around it.
        sections: Further sections in order, heading to Markdown.
        pictures: File name to the bytes of a PNG file. A section shows one by `![what it shows](name)`; each must be
            shown.

    Returns:
        The path of the written file.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that no card can hold; the message names the argument and the value.
    """
    from huggingface_hub import ModelCardData

    _require_line("title", title)
    _require_text("summary", summary)
    _require_line("license", license)
    _require_line("library_name", library_name)
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        raise TypeError(f"`tags` must be a sequence of strings, got {tags!r}.")
    for tag in tags:
        _require_line("tags", tag)
    if base_model_relation is not None:
        if base_model_relation not in BASE_MODEL_RELATIONS:
            raise ValueError(
                f"`base_model_relation` must be one of {', '.join(BASE_MODEL_RELATIONS)}, got {base_model_relation!r}."
            )
        if base_model is None:
            raise ValueError(
                f"`base_model_relation` is {base_model_relation!r}, but `base_model` is None: a relation needs the "
                "model that it points to."
            )
    if pipeline_tag is not None:
        _require_line("pipeline_tag", pipeline_tag)
    if arxiv_id is not None:
        _require_line("arxiv_id", arxiv_id)
        if not _ARXIV_ID.fullmatch(arxiv_id):
            raise ValueError(
                f"`arxiv_id` must be an arXiv identifier without version, such as '2406.01733', got {arxiv_id!r}."
            )
    if usage is not None:
        _require_text("usage", usage)
    if sections is not None and not isinstance(sections, Mapping):
        raise TypeError(f"`sections` must map headings to Markdown, got {sections!r}.")
    for heading, body in (sections or {}).items():
        _require_line("sections", heading)
        _require_text(f"sections[{heading!r}]", body)
    if pictures is not None and not isinstance(pictures, Mapping):
        raise TypeError(f"`pictures` must map file names to bytes, got {pictures!r}.")
    for name, data in (pictures or {}).items():
        _require_picture(name, data)

    hub_model = hub_model_id(base_model)
    metadata = ModelCardData(
        library_name=library_name,
        license=license,
        base_model=hub_model,
        base_model_relation=base_model_relation if hub_model is not None else None,
        pipeline_tag=pipeline_tag,
        tags=list(tags) or None,
    )
    order = ["library_name", "license", "base_model", "base_model_relation", "pipeline_tag", "tags"]
    parts = [f"---\n{metadata.to_yaml(line_break=chr(10), original_order=order)}\n---", f"# {title}", summary.strip()]
    if usage is not None:
        fence = "```"
        while fence in usage:
            fence += "`"
        parts.append(f"## Usage\n\n{fence}python\n{usage.strip()}\n{fence}")
    parts += [f"## {heading}\n\n{body.strip()}" for heading, body in (sections or {}).items()]
    if arxiv_id is not None:
        parts.append(f"## Paper\n\n<https://huggingface.co/papers/{arxiv_id}>")
    text = "\n\n".join(parts) + "\n"
    validate_model_card(text)
    for name in pictures or {}:
        if f"]({name})" not in text:
            raise ValueError(f"`pictures` holds {name!r}, but no section shows it by `![...]({name})`.")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (pictures or {}).items():
        _write_whole(folder / name, data)
    return _write_whole(folder / "README.md", text.encode("utf-8"))


def validate_model_card(text: str) -> dict[str, Any]:
    """Check that `text` is a model card which the Hub accepts, and return its front matter.

    Args:
        text: The whole card.

    Returns:
        The front matter as a dictionary.

    Raises:
        TypeError: If `text` is not a string.
        ValueError: If the front matter is missing, is not a YAML mapping, lacks `library_name` or `license`, names a
            `base_model` that cannot be a model on the Hub, or gives a `base_model_relation` that is unknown or has no
            `base_model`.
    """
    from huggingface_hub import ModelCard

    if not isinstance(text, str):
        raise TypeError(f"A model card must be a string, got {type(text).__name__}.")
    if not _FRONT_MATTER.match(text):
        first_line = text.partition("\n")[0].strip()
        raise ValueError(
            "The model card has no front matter: its first line must be `---`, and a second line of `---` must close "
            f"the YAML block. The first line is {first_line[:60]!r}."
        )
    try:
        metadata = ModelCard(text).data.to_dict()
    except Exception as error:  # YAML errors, TypeError for keys that are no strings, ValueError: all mean a bad block
        raise ValueError(f"The front matter of the model card is not a valid YAML mapping: {error}") from error

    for key in ("library_name", "license"):
        value = metadata.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"The front matter of the model card must hold `{key}` as a string, got {value!r}.")
    base_model = metadata.get("base_model")
    for model in base_model if isinstance(base_model, list) else [base_model]:
        if model is not None and not (isinstance(model, str) and _HUB_ID.fullmatch(model)):
            raise ValueError(
                f"`base_model` in the front matter of the model card must be a model on the Hub such as 'org/name', "
                f"got {model!r}. The Hub refuses a card that names a local path."
            )
    relation = metadata.get("base_model_relation")
    if relation is not None and relation not in BASE_MODEL_RELATIONS:
        raise ValueError(
            f"`base_model_relation` in the front matter of the model card must be one of "
            f"{', '.join(BASE_MODEL_RELATIONS)}, got {relation!r}."
        )
    if relation is not None and not base_model:
        raise ValueError("`base_model_relation` in the front matter of the model card needs a `base_model`.")
    return metadata


def hub_model_id(model: str | os.PathLike[str] | None) -> str | None:
    """Return `model` when it names a model on the Hub, and None when it is a local path.

    `_name_or_path` of a loaded model holds either, and nothing when the model was not loaded. A path is what exists on
    disk, is absolute, starts with `.` or `~`, or has more parts than the two of `org/name`.

    Raises:
        TypeError: If `model` is neither a string, a path nor None.
        ValueError: If `model` is neither a path nor spelt as the Hub spells models.
    """
    if model is None or model == "" or isinstance(model, os.PathLike):
        return None
    if not isinstance(model, str):
        raise TypeError(f"`base_model` must be a string, a path or None, got {model!r}.")
    if model.startswith((".", "~")) or "\\" in model or model.count("/") > 1:
        return None
    if os.path.isabs(model) or os.path.exists(model):
        return None
    if not _HUB_ID.fullmatch(model):
        raise ValueError(
            f"`base_model` must be a model on the Hub such as 'org/name', or a local path, got {model!r}."
        )
    return model


def _write_whole(path: Path, data: bytes) -> Path:
    # Opened by name and not by `tempfile`, whose files are readable by their owner only.
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        unfinished.write_bytes(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _require_picture(name: object, data: object) -> None:
    if not (isinstance(name, str) and _PICTURE_NAME.fullmatch(name)):
        raise ValueError(f"`pictures` must have plain file names such as 'plot.png', got {name!r}.")
    if not (isinstance(data, bytes) and data.startswith(_PNG_SIGNATURE)):
        raise ValueError(f"`pictures[{name!r}]` must hold the bytes of a PNG file.")


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, got {value!r}.")
    if not value.strip():
        raise ValueError(f"`{name}` must not be empty, got {value!r}.")


def _require_line(name: str, value: object) -> None:
    _require_text(name, value)
    if len(str(value).splitlines()) > 1:
        raise ValueError(f"`{name}` must be a single line, got {value!r}.")
