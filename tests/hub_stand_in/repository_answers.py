"""Accounts and repositories: create, delete, describe, list, branch and tag."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from .messages import REPO_ID, HubError, Request, Response, Route, require_token
from .repository import ATTRIBUTES, Repository, StoredFile, list_tree


if TYPE_CHECKING:
    from .hub import HubStandIn


USER = "tester"
ORGANIZATIONS = ("org",)


def who_am_i(hub: HubStandIn, request: Request) -> Response:
    require_token(request)
    organizations = [{"type": "org", "name": name} for name in ORGANIZATIONS]
    return Response(body={"type": "user", "name": USER, "fullname": USER, "orgs": organizations})


def known_harnesses(hub: HubStandIn, request: Request) -> Response:
    return Response(body={"standardEnvVars": [], "harnesses": {}})


def create_repository(hub: HubStandIn, request: Request) -> Response:
    require_token(request)
    wish = json.loads(request.body)
    if wish.get("type") not in (None, "model"):
        raise HubError(400, "", "The stand-in keeps models only.")
    repo_id = f"{wish.get('organization') or USER}/{wish['name']}"
    body = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
    if repo_id in hub.repos:
        return Response(409, {**body, "error": "You already created this model repo"})
    repository = Repository(repo_id, private=wish.get("visibility") == "private" or bool(wish.get("private")))
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in hub.lfs_suffixes)
    repository.commit("main", "initial commit", {ATTRIBUTES: StoredFile(attributes.encode())})
    hub.repos[repo_id] = repository
    return Response(body=body)


def delete_repository(hub: HubStandIn, request: Request) -> Response:
    require_token(request)
    wish = json.loads(request.body)
    del hub.repos[hub.repository(request, f"{wish.get('organization') or USER}/{wish['name']}").id]
    return Response(body={})


def model_info(hub: HubStandIn, request: Request, repo_id: str, revision: str = "main") -> Response:
    repository = hub.repository(request, repo_id)
    commit = repository.resolve(revision)
    siblings = []
    for path, file in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if request.query.get("blobs"):
            sibling |= {"size": len(file.content), "blobId": file.blob_id}
            if file.lfs:
                sibling["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": 134}
        siblings.append(sibling)
    body = {
        "id": repo_id,
        "modelId": repo_id,
        "author": repo_id.partition("/")[0],
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": next(iter(repository.commits.values())).date,
        "private": repository.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }
    return Response(body=body)


def tree(hub: HubStandIn, request: Request, repo_id: str, revision: str, path: str = "") -> Response:
    commit = hub.repository(request, repo_id).resolve(revision)
    return Response(body=list_tree(commit, path, recursive=request.query.get("recursive", "").lower() == "true"))


def paths_info(hub: HubStandIn, request: Request, repo_id: str, revision: str) -> Response:
    commit = hub.repository(request, repo_id).resolve(revision)
    wanted = parse_qs(request.body.decode()).get("paths", [])
    return Response(body=[entry for entry in list_tree(commit, "", recursive=True) if entry["path"] in wanted])


def references(hub: HubStandIn, request: Request, repo_id: str) -> Response:
    repository = hub.repository(request, repo_id)

    def spell(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in names.items()]

    pulls = {name: commit for name, commit in repository.branches.items() if name.startswith("refs/")}
    branches = {name: commit for name, commit in repository.branches.items() if name not in pulls}
    body = {
        "branches": spell(branches, "refs/heads/"),
        "tags": spell(repository.tags, "refs/tags/"),
        "converts": [],
    }
    return Response(body=body | {"pullRequests": spell(pulls, "")})


def create_branch(hub: HubStandIn, request: Request, repo_id: str, name: str) -> Response:
    require_token(request)
    repository = hub.repository(request, repo_id)
    if name in repository.branches:
        raise HubError(409, "", f"Reference already exists: {name}")
    wish = json.loads(request.body or b"{}")
    repository.branches[name] = repository.resolve(wish.get("startingPoint", "main")).id
    return Response(201, {})


def delete_branch(hub: HubStandIn, request: Request, repo_id: str, name: str) -> Response:
    require_token(request)
    if hub.repository(request, repo_id).branches.pop(name, None) is None:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
    return Response(body={})


def create_tag(hub: HubStandIn, request: Request, repo_id: str, revision: str) -> Response:
    require_token(request)
    repository = hub.repository(request, repo_id)
    name = json.loads(request.body)["tag"]
    if name in repository.tags:
        raise HubError(409, "", f"Tag already exists: {name}")
    repository.tags[name] = repository.resolve(revision).id
    return Response(201, {})


def delete_tag(hub: HubStandIn, request: Request, repo_id: str, revision: str) -> Response:
    require_token(request)
    if hub.repository(request, repo_id).tags.pop(revision, None) is None:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return Response(body={})


def list_commits(hub: HubStandIn, request: Request, repo_id: str, revision: str) -> Response:
    history = hub.repository(request, repo_id).history(revision)
    authors = [{"user": USER}]
    return Response(
        body=[
            {"id": commit.id, "title": commit.title, "message": "", "date": commit.date, "authors": authors}
            for commit in history
        ]
    )


ROUTES: list[Route] = [
    ("GET", r"/api/whoami-v2", who_am_i),
    ("GET", r"/api/agent-harnesses", known_harnesses),
    ("POST", r"/api/repos/create", create_repository),
    ("DELETE", r"/api/repos/delete", delete_repository),
    ("GET", rf"/api/models/{REPO_ID}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", rf"/api/models/{REPO_ID}/paths-info/(?P<revision>[^/]+)", paths_info),
    ("GET", rf"/api/models/{REPO_ID}/commits/(?P<revision>[^/]+)", list_commits),
    ("GET", rf"/api/models/{REPO_ID}/refs", references),
    ("POST", rf"/api/models/{REPO_ID}/branch/(?P<name>[^/]+)", create_branch),
    ("DELETE", rf"/api/models/{REPO_ID}/branch/(?P<name>[^/]+)", delete_branch),
    ("POST", rf"/api/models/{REPO_ID}/tag/(?P<revision>[^/]+)", create_tag),
    ("DELETE", rf"/api/models/{REPO_ID}/tag/(?P<revision>[^/]+)", delete_tag),
    ("GET", rf"/api/models/{REPO_ID}/revision/(?P<revision>[^/]+)", model_info),
    ("GET", rf"/api/models/{REPO_ID}", model_info),
]
