"""Downloads, whole or in parts; what LFS holds comes from the second origin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .messages import REPO_ID, HubError, Request, Response, Route


if TYPE_CHECKING:
    from .hub import HubStandIn


def resolve(hub: HubStandIn, request: Request, repo_id: str, revision: str, path: str) -> Response:
    commit = hub.repository(request, repo_id).resolve(revision)
    headers = {"X-Repo-Commit": commit.id}
    if path not in commit.files:
        error = HubError(404, "EntryNotFound", "Entry not found").response
        return Response(error.status, error.body, {**error.headers, **headers})
    file = commit.files[path]
    headers["Content-Disposition"] = f'inline; filename="{path.rpartition("/")[2]}";'
    if not file.lfs:
        return _ranged(request, file.content, {**headers, "ETag": f'"{file.etag}"'})
    headers |= {
        "Location": f"{hub.cdn}/objects/{file.sha256}",
        "X-Linked-ETag": f'"{file.etag}"',
        "X-Linked-Size": str(len(file.content)),
    }
    return Response(302, b"", headers)


def get_object(hub: HubStandIn, request: Request, sha256: str) -> Response:
    if sha256 not in hub.objects:
        raise HubError(404, "EntryNotFound", "Entry not found")
    return _ranged(request, hub.objects[sha256], {"ETag": f'"{sha256}"'})


def _ranged(request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
    """A download, or the part of it that the request asks for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not match:
        return Response(200, content, headers)
    start, stop = int(match.group(1)), min(int(match.group(2) or len(content) - 1) + 1, len(content))
    if start >= len(content):
        return Response(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    return Response(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


ROUTES: list[Route] = [
    ("GET", r"/objects/(?P<sha256>[0-9a-f]{64})", get_object),
    ("GET", rf"/{REPO_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]
