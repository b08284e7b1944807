"""Repositories in memory: files as git and LFS name them, commits, branches and tags."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from .messages import HubError


# The Hub puts it into each new repository.
ATTRIBUTES = ".gitattributes"


@dataclass(frozen=True)
class StoredFile:
    """A file of a repository. `lfs` says that git holds a pointer to it and not the content."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """What git calls the file: SHA-1 over a header and the content, or over the pointer of an LFS file."""
        data = self.content
        if self.lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n"
            data = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def describe(self, path: str) -> dict[str, Any]:
        """The file as an entry of the tree listing."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.blob_id, "size": len(self.content)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    id: str
    parent: str | None
    title: str
    date: str
    files: Mapping[str, StoredFile]


@dataclass
class Repository:
    """A model repository with its history."""

    id: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a commit id names."""
        commit_id = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit_id not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[commit_id]

    def commit(self, branch: str, title: str, files: Mapping[str, StoredFile]) -> Commit:
        """Move a branch on to a new commit that holds `files`."""
        parent = self.branches.get(branch)
        tree = sorted((path, file.blob_id) for path, file in files.items())
        commit_id = hashlib.sha1(json.dumps([self.id, parent, title, len(self.commits), tree]).encode()).hexdigest()
        # One second later than the one before, so that the order shows and no clock is needed.
        date = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=len(self.commits))
        commit = Commit(commit_id, parent, title, date.strftime("%Y-%m-%dT%H:%M:%S.000Z"), dict(files))
        self.commits[commit_id] = commit
        self.branches[branch] = commit_id
        return commit

    def history(self, revision: str) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        commit_id: str | None = self.resolve(revision).id
        while commit_id is not None:
            yield self.commits[commit_id]
            commit_id = self.commits[commit_id].parent


def list_tree(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders below `folder`, as the Hub lists them."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    inside = {path: file for path, file in sorted(commit.files.items()) if path.startswith(prefix)}
    if prefix and not inside:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist on this revision")
    entries: dict[str, dict[str, Any]] = {}
    for path, file in inside.items():
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            parent = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(f"{commit.id} {parent}".encode()).hexdigest()
            entries[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
            if not recursive:
                break
        if recursive or len(parts) == 1:
            entries[path] = file.describe(path)
    return list(entries.values())
