"""What our models do beyond `ModelMixin`: their own card, their origin, and files that appear whole."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .model_card import write_model_card
from .origin import Origin, read_origin, stamp_safetensors


class HubModelMixin:
    """`save_pretrained`, `from_pretrained` and `push_to_hub` of our models: `class X(HubModelMixin, ModelMixin, ...)`.

    diffusers saves weights without their origin, and writes an empty card over `README.md` after a model has saved its
    own. Here the card comes from `model_card`, the origin goes into the safetensors metadata and comes back with
    `from_pretrained`, and files are written elsewhere and then moved into place.

    Attributes:
        origin: the base model that this one was made for, or None. Set it before saving.
    """

    origin: Origin | None = None

    def model_card(self) -> dict[str, Any]:
        """Keyword arguments of `write_model_card` (all but `folder`). Every model writes its own."""
        raise TypeError(f"{type(self).__name__} must define `model_card`.")

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save config, weights (safetensors with their origin) and model card with its pictures.

        Weights of the same variant that an earlier save left in the folder, and that this one has not replaced, are
        removed: they would be loaded instead of the new ones. Every other file stays.

        Args:
            save_directory: folder, created when missing.
            is_main_process: False writes weights only, and neither cleans up nor uploads: of several processes that
                save into one folder, one does that.
            save_function: as diffusers' `save_pretrained` has it.
            safe_serialization: must be True.
            variant: weights are named `diffusion_pytorch_model.<variant>.safetensors`.
            max_shard_size: weights beyond this size, such as `"5GB"` or a number of bytes, are split.
            push_to_hub: also upload the files that were written.
            **kwargs: with `push_to_hub`, its `repo_id` (default: the folder's name), `commit_message`, `private`,
                `token` and `create_pr`.

        Raises:
            TypeError: an unknown argument, or an argument of the upload without `push_to_hub=True`.
            ValueError: `safe_serialization=False`; pickled weights are not written.
        """
        _require_safetensors(safe_serialization)
        if unknown := kwargs.keys() - _UPLOAD_ARGUMENTS:
            raise TypeError(f"`save_pretrained` got unknown arguments: {', '.join(sorted(unknown))}.")
        if kwargs and not push_to_hub:
            raise TypeError(f"{sorted(kwargs)} belong to `push_to_hub=True`.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
            super().save_pretrained(
                unfinished,
                is_main_process=is_main_process,
                save_function=save_function,
                variant=variant,
                max_shard_size=max_shard_size,
            )
            if self.origin is not None:
                for weights in Path(unfinished).glob("*.safetensors"):
                    stamp_safetensors(weights, self.origin)
            if is_main_process:
                write_model_card(unfinished, **self.model_card())
            # An index comes after the shards that it names, and goes before them; a card comes after its pictures.
            written = sorted(os.listdir(unfinished), key=lambda name: (name == "README.md", name.endswith(".json")))
            for name in written:
                os.replace(Path(unfinished, name), folder / name)
        if not is_main_process:
            return
        old = _weight_files(os.listdir(folder), variant) - set(written)
        for name in sorted(old, key=lambda name: not name.endswith(".json")):
            (folder / name).unlink()
        if push_to_hub:
            kwargs.setdefault("repo_id", folder.resolve().name)
            kwargs["commit_message"] = kwargs.get("commit_message") or f"Upload {type(self).__name__}"
            _upload(folder, written, variant, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Upload config, weights and our card in one commit; returns its URL.

        The commit deletes weights of the same variant that it does not replace.

        Args:
            repo_id: `"org/name"`, created when missing.
            commit_message: default: "Upload <class name>".
            private: of a new repository; None leaves the owner's default.
            token: default: the one stored by `hf auth login`.
            create_pr: open a pull request instead of committing.
            safe_serialization: must be True.
            variant: weights are named `diffusion_pytorch_model.<variant>.safetensors`.
            subfolder: of the repository, without a card then.

        Raises:
            ValueError: `safe_serialization=False`; pickled weights are not uploaded.
        """
        _require_safetensors(safe_serialization)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            card = {"README.md", *(self.model_card().get("pictures") or {})} if subfolder else set()
            names = [name for name in os.listdir(folder) if name not in card]
            return _upload(
                Path(folder),
                names,
                variant,
                repo_id=repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                create_pr=create_pr,
                subfolder=subfolder,
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As diffusers' `from_pretrained`, and `origin` is read from the weights' metadata."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        weights = _find_weights(pretrained_model_name_or_path, kwargs)
        if weights is not None:
            model.origin = read_origin(weights)
        return loaded


_UPLOAD_ARGUMENTS = {"repo_id", "commit_message", "private", "token", "create_pr"}
_WEIGHTS = "diffusion_pytorch_model"
_SHARD = "-of-".join(["[0-9]" * 5] * 2)


def _require_safetensors(safe_serialization: bool) -> None:
    if not safe_serialization:
        raise ValueError("`safe_serialization` must be True: only safetensors are saved.")


def _weight_patterns(variant: str | None) -> list[str]:
    """`fnmatch` patterns of all weight and index files that diffusers writes, or once wrote, for one variant."""
    dot = "" if variant is None else f".{glob.escape(variant)}"
    patterns = []
    for suffix in ("safetensors", "bin"):
        patterns += [
            f"{_WEIGHTS}{dot}.{suffix}",
            f"{_WEIGHTS}{dot}-{_SHARD}.{suffix}",
            f"{_WEIGHTS}.{suffix}.index{dot}.json",
            # Its older names with a variant, which it still loads; without one they are the same.
            f"{_WEIGHTS}-{_SHARD}{dot}.{suffix}",
            f"{_WEIGHTS}.{suffix}{dot}.index.json",
        ]
    return patterns


def _weight_files(names: Iterable[str], variant: str | None) -> set[str]:
    patterns = _weight_patterns(variant)
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}


def _upload(
    folder: Path,
    names: Iterable[str],
    variant: str | None,
    *,
    repo_id: str,
    commit_message: str,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Commit the named files of `folder`, and the deletion of the variant's weights that are not among them."""
    from huggingface_hub import create_repo, upload_folder

    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    return upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=subfolder,
        allow_patterns=[glob.escape(name) for name in names],
        delete_patterns=_weight_patterns(variant),
        commit_message=commit_message,
        token=token,
        create_pr=create_pr,
    )


def _find_weights(name_or_path: str | os.PathLike[str], options: dict[str, Any]) -> Path | None:
    """The file that `from_pretrained` has just read (the first shard of several), without a request."""
    if options.get("use_safetensors") is False:
        return None
    variant = options.get("variant")
    dot = "" if variant is None else f".{variant}"
    index = _find_file(f"{_WEIGHTS}.safetensors.index{dot}.json", name_or_path, options)
    if index is None:
        return _find_file(f"{_WEIGHTS}{dot}.safetensors", name_or_path, options)
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return _find_file(min(shards), name_or_path, options)


def _find_file(name: str, name_or_path: str | os.PathLike[str], options: dict[str, Any]) -> Path | None:
    """A file of the local folder, or of the repository as it lies in the Hub's cache."""
    subfolder = options.get("subfolder") or ""
    if os.path.isdir(name_or_path):
        path = Path(name_or_path, subfolder, name)
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        str(name_or_path),
        f"{subfolder}/{name}" if subfolder else name,
        cache_dir=options.get("cache_dir"),
        revision=options.get("revision"),
    )
    return Path(found) if isinstance(found, str) else None
