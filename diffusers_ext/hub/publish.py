"""Publish a custom pipeline of this collection as a repository that `custom_pipeline="org/name"` loads.

diffusers loads the code of a custom pipeline from a file named `pipeline.py`, takes the one pipeline class that it
finds in it, and needs no weights beside it. So a repository is two files, the code and its card.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from .model_card import validate_model_card


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


_CODE_NAME = "pipeline.py"
_CARD_NAME = "README.md"
# Classes imported from these packages never count as the file's own pipeline.
_UNCOUNTED_PACKAGES = frozenset({"diffusers", "transformers"})


def pipelines_folder() -> Path:
    """Return the folder that holds the custom pipelines and their cards.

    In a clone and in an editable install it stands beside the package; a wheel puts it under `share/`.

    Raises:
        FileNotFoundError: If none of these places has it; the message names them.
    """
    root = Path(__file__).resolve().parents[2]
    # The second is that of `pip install --user`.
    prefixes = [sysconfig.get_path("data"), sysconfig.get_path("data", sysconfig.get_preferred_scheme("user"))]
    installed = [Path(prefix, "share", "diffusers_ext", "pipelines") for prefix in prefixes]
    # Beside an installed package lie all others, and one of them may be called `pipelines`.
    if (root / "pyproject.toml").is_file() and (root / "pipelines").is_dir():
        return root / "pipelines"
    for folder in installed:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"The custom pipelines are neither in {root / 'pipelines'} (a clone or an editable install) nor in "
        f"{' or '.join(map(str, installed))} (an installed wheel). Pass `folder=`, or install diffusers-ext again."
    )


def list_pipelines(folder: str | os.PathLike[str] | None = None) -> list[str]:
    """Return the names of the custom pipelines in `folder`, by default those of this collection.

    Raises:
        FileNotFoundError: If the folder does not exist.
    """
    folder = pipelines_folder() if folder is None else Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    return sorted(path.stem for path in folder.glob("*.py"))


def publish_pipeline(
    name: str,
    repo_id: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    extra_files: Mapping[str, str | os.PathLike[str] | bytes] | None = None,
) -> CommitInfo:
    """Upload a custom pipeline and its card to the Hub in one commit.

    `<name>.py` becomes `pipeline.py` and `<name>.md` becomes `README.md`. Everything is checked before the first
    request, so a mistake leaves no empty repository behind. The repository is created when it does not exist.

    Args:
        name: Which pipeline, one of [`list_pipelines`].
        repo_id: Where to, `"org/name"`, or `"name"` for your own namespace.
        folder: Where `<name>.py` and `<name>.md` lie. By default [`pipelines_folder`].
        token: A token with write access. By default the one of `hf auth login`.
        private: Whether a new repository is private. By default as the namespace has it; without effect on a
            repository that exists.
        revision: The branch to commit to, which must exist. By default `main`.
        commit_message: By default names the pipeline.
        extra_files: Further files, path in the repository to a local path or to the content as bytes. A pipeline with
            a component whose class is ours needs `<component>/<module>.py` there, since diffusers loads such a class
            from a Hub repository only through that file.

    Returns:
        The commit: a string with its address, and `oid`, the revision to pin (`custom_revision=commit.oid`).

    Raises:
        FileNotFoundError: If the folder, the card or an extra file does not exist.
        TypeError: If an argument has the wrong type.
        ValueError: If the name is unknown, the code or the card is not fit to be loaded, or an argument is not valid.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"`repo_id` must be 'org/name', got {repo_id!r}: {error}") from error
    if not repo_id:
        raise ValueError(f"`repo_id` must be 'org/name', got {repo_id!r}.")
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"`revision` must be a branch, got {revision!r}: a commit cannot be committed to.")
    if commit_message is not None and not commit_message.strip():
        raise ValueError("`commit_message` must not be empty.")

    extras = _read_extra_files(extra_files or {})
    code, card = _read_pipeline(name, folder, extras)
    # The very bytes that were checked are uploaded, whatever happens to the files meanwhile.
    contents: dict[str, bytes | str] = {_CODE_NAME: code, _CARD_NAME: card, **extras}
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=data) for path, data in contents.items()]

    api = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True)
    return api.create_commit(
        repository.repo_id,
        operations=operations,
        commit_message=commit_message or f"Publish the pipeline {name}",
        revision=revision,
    )


def pipeline_class_name(source: str, filename: str, shipped: Sequence[str] = ()) -> str:
    """Find the one pipeline class that diffusers would load from the code of a custom pipeline, without running it.

    diffusers takes the only class in the module's namespace that is a `DiffusionPipeline` and does not come from
    diffusers. It refuses a module with two, imported ones counted, and only when somebody loads it. The text can be
    checked before: a class counts as a pipeline when a base of its is called `...Pipeline`, or is such a class of the
    same file.

    Args:
        source: The code.
        filename: What the messages call it.
        shipped: Paths of the files that will lie beside it, which it may import relatively.

    Returns:
        The name of the class.

    Raises:
        ValueError: If the code does not parse, if it holds no such class or several, if the class is not at the top
            level of the module, or if an import would bring another one or is missing from `shipped`.
    """
    tree = _parse(source, filename)
    _check_imports(tree, filename, shipped)

    pipelines: dict[str, ast.ClassDef] = {}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for node in sorted(classes, key=lambda node: node.lineno):
        bases = [_base_name(base) for base in node.bases]
        if any(base.endswith("Pipeline") or base in pipelines for base in bases):
            if node.name in pipelines:
                raise ValueError(f"{filename}, line {node.lineno}: the class {node.name} is defined twice.")
            pipelines[node.name] = node
    if not pipelines:
        raise ValueError(
            f"{filename} defines no pipeline: it needs one class with a base whose name ends in 'Pipeline'."
        )
    if len(pipelines) > 1:
        listed = ", ".join(f"{node.name} (line {node.lineno})" for node in pipelines.values())
        raise ValueError(
            f"{filename} must define exactly one pipeline, since diffusers refuses more. It has {listed}."
        )
    (node,) = pipelines.values()
    if node not in tree.body:
        raise ValueError(
            f"{filename}, line {node.lineno}: the class {node.name} must stand at the top level of the file, not in a "
            "function, a class or a condition."
        )
    return node.name


def _read_pipeline(
    name: str, folder: str | os.PathLike[str] | None, extras: Mapping[str, object]
) -> tuple[bytes, bytes]:
    """Read and check the code and the card of a pipeline."""
    folder = pipelines_folder() if folder is None else Path(folder)
    names = list_pipelines(folder)
    if name not in names:
        raise ValueError(f"`name` must be one of {', '.join(names) or '(none)'} in {folder}, got {name!r}.")
    code_path, card_path = folder / f"{name}.py", folder / f"{name}.md"
    if not card_path.is_file():
        raise FileNotFoundError(f"The pipeline {name!r} has no card: there is no {card_path}.")
    code, card = code_path.read_bytes(), card_path.read_bytes()
    pipeline_class_name(_decode(code, code_path.name), code_path.name, list(extras))
    try:
        validate_model_card(_decode(card, card_path.name))
    except ValueError as error:
        raise ValueError(f"{card_path}: {error}") from error
    return code, card


def _read_extra_files(extra_files: Mapping[str, str | os.PathLike[str] | bytes]) -> dict[str, bytes | str]:
    """Check the extra files. Python code is read to be checked; anything else stays a path until the upload."""
    if not isinstance(extra_files, Mapping):
        raise TypeError(f"`extra_files` must map paths in the repository to files, got {extra_files!r}.")
    extras: dict[str, bytes | str] = {}
    for path_in_repo, content in extra_files.items():
        if not isinstance(path_in_repo, str):
            raise TypeError(f"`extra_files` must have strings for keys, got {path_in_repo!r}.")
        path = PurePosixPath(path_in_repo)
        plain = str(path) == path_in_repo and path.name and "\\" not in path_in_repo
        if not plain or path.is_absolute() or ".." in path.parts:
            raise ValueError(
                "`extra_files` must have plain relative paths for keys, such as 'unet/unet_3d.py', got "
                f"{path_in_repo!r}."
            )
        if path_in_repo.lower() in (_CODE_NAME.lower(), _CARD_NAME.lower()):
            raise ValueError(f"`extra_files` must not replace {path_in_repo!r}, which is the pipeline's own.")
        if not isinstance(content, (str, os.PathLike, bytes)):
            raise TypeError(f"`extra_files[{path_in_repo!r}]` must be a path or bytes, got {type(content).__name__}.")
        if not isinstance(content, bytes):
            if not Path(content).is_file():
                raise FileNotFoundError(f"`extra_files[{path_in_repo!r}]`: there is no file {content}.")
            content = Path(content).read_bytes() if path.suffix == ".py" else os.fspath(content)
        if isinstance(content, bytes) and path.suffix == ".py":
            _parse(_decode(content, path_in_repo), path_in_repo)
        extras[path_in_repo] = content
    return extras


def _check_imports(tree: ast.Module, filename: str, shipped: Sequence[str]) -> None:
    """Refuse imports that bring a second pipeline class into the namespace, or that the repository cannot serve."""
    for node in _statements_at_import(tree.body):
        if not isinstance(node, ast.ImportFrom):
            continue
        where = f"{filename}, line {node.lineno}"
        if node.level:
            file = f"{(node.module or '').replace('.', '/')}.py"
            if node.level > 1 or not node.module or file not in shipped:
                raise ValueError(
                    f"{where}: the relative import {ast.unparse(node)!r} has no file in the repository. Import from "
                    "an installed package, or ship the module through `extra_files`."
                )
        if not node.level and (node.module or "").partition(".")[0] in _UNCOUNTED_PACKAGES:
            continue
        for alias in node.names:
            if alias.name == "*" or alias.name.endswith("Pipeline"):
                raise ValueError(
                    f"{where}: {ast.unparse(node)!r} may bring a second pipeline class into the file, and diffusers "
                    "refuses a file with two. Import the module instead of the class."
                )


def _statements_at_import(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that an import of the module may run in the module's own namespace."""
    for node in body:
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _statements_at_import(node.orelse)
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from _statements_at_import(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements_at_import(handler.body)


def _base_name(base: ast.expr) -> str:
    if isinstance(base, ast.Subscript):
        base = base.value
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")


def _parse(source: str, filename: str) -> ast.Module:
    try:
        return ast.parse(source, filename)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{filename} is not valid Python: {error}") from error


def _decode(data: bytes, filename: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{filename} is not a text in UTF-8: {error}") from error
