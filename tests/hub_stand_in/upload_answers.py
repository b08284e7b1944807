"""Uploads: the check of the card, LFS, and the commit."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import yaml

from .messages import REPO_ID, HubError, Request, Response, Route, require_token
from .repository import StoredFile


if TYPE_CHECKING:
    from .hub import HubStandIn


def validate_yaml(hub: HubStandIn, request: Request) -> Response:
    """Check a card's front matter for what the Hub is known to refuse."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(?:\n|$)", json.loads(request.body)["content"], re.DOTALL)
    if not match:
        return Response(body={"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    errors = []
    try:
        metadata = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        metadata, errors = {}, [f"YAML Metadata Error: {error}"]
    base_models = metadata.get("base_model") or []
    for model in base_models if isinstance(base_models, list) else [base_models]:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(model)):
            errors.append(f'"base_model" with value "{model}" is not valid. Use a model id from https://hf.co/models.')
    if metadata.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    return Response(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})


def preupload(hub: HubStandIn, request: Request, repo_id: str, revision: str) -> Response:
    require_token(request)
    present = hub.repository(request, repo_id).resolve(revision).files
    answers = []
    for file in json.loads(request.body)["files"]:
        path = file["path"]
        answer = {
            "path": path,
            "uploadMode": "lfs" if path.endswith(hub.lfs_suffixes) else "regular",
            "shouldIgnore": False,
        }
        if path in present:
            answer["oid"] = present[path].etag
        answers.append(answer)
    return Response(body={"files": answers})


def lfs_batch(hub: HubStandIn, request: Request, repo_id: str) -> Response:
    require_token(request)
    hub.repository(request, repo_id)
    answers = []
    for entry in json.loads(request.body)["objects"]:
        answer = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] not in hub.objects:
            answer["actions"] = {"upload": {"href": f"{hub.cdn}/objects/{entry['oid']}", "header": {}}}
        answers.append(answer)
    return Response(body={"transfer": "basic", "objects": answers})


def put_object(hub: HubStandIn, request: Request, sha256: str) -> Response:
    if hashlib.sha256(request.body).hexdigest() != sha256:
        raise HubError(400, "", "The content does not have the SHA-256 it was announced with.")
    hub.objects[sha256] = request.body
    return Response()


def create_commit(hub: HubStandIn, request: Request, repo_id: str, revision: str) -> Response:
    require_token(request)
    repository = hub.repository(request, repo_id)
    if revision not in repository.branches:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = repository.branches[revision]
    if "parentCommit" in header and not head.startswith(header["parentCommit"]):
        raise HubError(412, "", "The repository has changed since the given parent commit.")
    files = dict(repository.commits[head].files)
    for line in lines:
        kind, value = line["key"], line["value"]
        path = value.get("path", "")
        if kind == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            if value["oid"] not in hub.objects:
                raise HubError(400, "", f"The LFS object of {path} was not uploaded.")
            files[path] = StoredFile(hub.objects[value["oid"]], lfs=True)
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
        elif kind == "deletedFolder":
            files = {name: file for name, file in files.items() if not name.startswith(path.rstrip("/") + "/")}
        elif kind != "header":
            raise HubError(400, "", f"The stand-in does not know the operation {kind!r}.")
    body: dict[str, Any] = {"success": True}
    branch = revision
    if request.query.get("create_pr"):
        number = sum(name.startswith("refs/pr/") for name in repository.branches) + 1
        branch = f"refs/pr/{number}"
        repository.branches[branch] = head
        body["pullRequestUrl"] = f"{hub.endpoint}/{repo_id}/discussions/{number}"
    commit = repository.commit(branch, header["summary"], files)
    body |= {"commitOid": commit.id, "commitUrl": f"{hub.endpoint}/{repo_id}/commit/{commit.id}"}
    return Response(body=body)


ROUTES: list[Route] = [
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", rf"/api/models/{REPO_ID}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", rf"/api/models/{REPO_ID}/commit/(?P<revision>[^/]+)", create_commit),
    ("POST", rf"/{REPO_ID}\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/objects/(?P<sha256>[0-9a-f]{64})", put_object),
]
