"""What our models do beyond `ModelMixin`: their own card, their origin, and files that appear whole."""

from __future__ import annotations

import os
import tempfile
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
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save config, weights (safetensors with their origin) and model card.

        Args:
            save_directory: folder, created when missing.
            push_to_hub: also upload the folder; `repo_id` (default: the folder's name), `commit_message`, `private`,
                `token` and `create_pr` are passed on to `push_to_hub`.
            **kwargs: of diffusers' `save_pretrained`: `is_main_process`, `variant`, `max_shard_size`.

        Raises:
            ValueError: `safe_serialization=False`; pickled weights are not written.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("`safe_serialization` must be True: only safetensors are saved.")
        upload = {key: kwargs.pop(key) for key in _UPLOAD_ARGUMENTS if key in kwargs}
        if upload and not push_to_hub:
            raise TypeError(f"{sorted(upload)} belong to `push_to_hub=True`.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
            super().save_pretrained(unfinished, **kwargs)
            if self.origin is not None:
                for weights in Path(unfinished).glob("*.safetensors"):
                    stamp_safetensors(weights, self.origin)
            if kwargs.get("is_main_process", True):
                write_model_card(unfinished, **self.model_card())
            files = {file.name for file in Path(unfinished).iterdir()}
            for name in files:
                os.replace(Path(unfinished, name), folder / name)
            if kwargs.get("is_main_process", True):
                _remove_old_weights(folder, files)
        if push_to_hub:
            upload.setdefault("repo_id", folder.resolve().name)
            self.push_to_hub(**upload, variant=kwargs.get("variant"))

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Upload config, weights and our card in one commit; returns its URL.

        Args:
            repo_id: `"org/name"`, created when missing.
            commit_message: default: "Upload <class name>".
            private: of a new repository; None leaves the owner's default.
            token: default: the one stored by `hf auth login`.
            create_pr: open a pull request instead of committing.
            variant: weights are named `diffusion_pytorch_model.<variant>.safetensors`.
            subfolder: of the repository, without a card then.
        """
        from huggingface_hub import create_repo, upload_folder

        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            return upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                path_in_repo=subfolder,
                ignore_patterns=["README.md"] if subfolder else None,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                token=token,
                create_pr=create_pr,
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


_UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr")


def _remove_old_weights(folder: Path, written: set[str]) -> None:
    """Shards of an earlier save, which would be uploaded and found along with the new weights."""
    variants = {name.partition(".")[2] for name in written if name.endswith(".safetensors")}
    for path in folder.glob("diffusion_pytorch_model*-of-*.safetensors"):
        if path.name not in written and path.name.partition(".")[2] in variants:
            path.unlink()


def _find_weights(name_or_path: str | os.PathLike[str], options: dict[str, Any]) -> Path | None:
    """The file that `from_pretrained` has just read (the first shard of several), without a request."""
    variant = f".{options['variant']}" if options.get("variant") else ""
    name = f"diffusion_pytorch_model{variant}.safetensors"
    subfolder = options.get("subfolder") or ""
    folder = Path(name_or_path) / subfolder
    if folder.is_dir():
        return next((path for path in (folder / name, *sorted(folder.glob("*.safetensors"))) if path.is_file()), None)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        str(name_or_path),
        f"{subfolder}/{name}" if subfolder else name,
        cache_dir=options.get("cache_dir"),
        revision=options.get("revision"),
    )
    return Path(found) if isinstance(found, str) else None
