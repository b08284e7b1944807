"""A stand-in for the Hugging Face Hub on loopback, to which the real `huggingface_hub` client talks.

It keeps repositories in memory and speaks as much of the Hub's protocol as models need: create, upload (in the commit
itself and through LFS), commit with history, branches, tags and pull requests, model info, tree, and download with
ETag, commit and range headers. Large files are redirected to a second origin, as the Hub redirects to its CDN.

`huggingface_hub` reads `HF_ENDPOINT` once, at import, so what talks to the stand-in runs in a process of its own:

    with HubStandIn() as hub:
        output = run_python("from huggingface_hub import whoami; print(whoami()['name'])", hub.environment(folder))
        assert output.strip() == "tester"
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "tester"
ORGANIZATIONS = ("org",)
_ROOT = Path(__file__).resolve().parents[1]
_ATTRIBUTES = ".gitattributes"
_LFS_SUFFIXES = (".bin", ".ckpt", ".npz", ".ply", ".pt", ".pth", ".safetensors")
_REPOSITORY = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"


def run_python(
    code: str | Path, environment: Mapping[str, str], *, arguments: Sequence[str] = (), timeout: float = 240
) -> str:
    """Run Python code, or a script when `code` is a `Path`, in a fresh process with one thread.

    The process runs in the repository's root and can import both `diffusers_ext` and `tests`.

    Args:
        code: The code itself, or the path of a script.
        environment: What to set beside the present environment.
        arguments: Command-line arguments.
        timeout: Seconds after which the process is killed.

    Returns:
        What the process wrote to its standard output.

    Raises:
        AssertionError: If the process fails or takes too long; the message ends with its standard error.
    """
    command = [sys.executable, str(code)] if isinstance(code, Path) else [sys.executable, "-c", code]
    search = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    present = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **environment}
    try:
        done = subprocess.run(
            [*command, *arguments],
            env=present,
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        stderr = error.stderr or ""
        if isinstance(stderr, bytes):  # which it is on POSIX, in spite of `text=True`
            stderr = stderr.decode(errors="replace")
        raise AssertionError(
            f"The process took more than {timeout} s. Its standard error:\n{stderr[-8000:]}"
        ) from None
    if done.returncode:
        raise AssertionError(f"The process ended with {done.returncode}. Its standard error:\n{done.stderr[-8000:]}")
    return done.stdout


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


@dataclass
class Request:
    """A request that the stand-in received. `path` is as it was sent, without query."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    origin: str
    status: int | None = None


@dataclass
class Response:
    """An answer; a `body` that is neither bytes nor None is sent as JSON."""

    status: int = 200
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with the requests that match, at most `times` times (None: always).

    Args:
        matches: Which requests.
        response: Sent instead of the true answer.
        delay: Seconds to wait before the answer.
        keep_bytes: Close the connection after so many bytes of the body.
    """

    matches: Callable[[Request], bool]
    response: Response | None = None
    delay: float = 0.0
    keep_bytes: int | None = None
    times: int | None = 1


class HubError(Exception):
    """An error that the Hub answers with, by status and its own code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.response = Response(
            status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        )


class HubStandIn:
    """The stand-in; a context manager that serves while it is open.

    Args:
        lfs_suffixes: Files with these endings are stored through LFS, all others in git.

    Attributes:
        repos: The repositories by id.
        requests: Every request so far, in order of arrival.
        faults: Add a [`Fault`] to make requests fail.
    """

    def __init__(self, lfs_suffixes: tuple[str, ...] = _LFS_SUFFIXES) -> None:
        self.lfs_suffixes = lfs_suffixes
        self.repos: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.closing = threading.Event()
        self._objects: dict[str, bytes] = {}  # what was uploaded through LFS, by SHA-256
        self._lock = threading.RLock()
        self._servers: list[_Server] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> HubStandIn:
        for _ in range(2):  # the Hub and its CDN: a client must not send its token to the second
            server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            self._servers.append(server)
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join(timeout=10)

    @property
    def endpoint(self) -> str:
        """The address of the Hub, for `HF_ENDPOINT`."""
        return self._origin(0)

    @property
    def cdn(self) -> str:
        """The address that large files are downloaded from."""
        return self._origin(1)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a revision, path to content.

        `.gitattributes`, which the Hub puts into each new repository, is left out.
        """
        with self._lock:
            files = self.repos[repo_id].resolve(revision).files
            return {path: file.content for path, file in files.items() if path != _ATTRIBUTES}

    def environment(self, cache_dir: str | Path) -> dict[str, str]:
        """What to set in a process that shall talk to the stand-in, with all its caches below `cache_dir`."""
        cache = Path(cache_dir)
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_MODULES_CACHE": str(cache / "modules"),
            "HF_TOKEN": "hf_dummy",
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def handle(self, request: Request) -> tuple[Response, Fault | None]:
        """Answer a request; the fault, when one applies, is left for the handler to carry out."""
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.times != 0 and fault.matches(request)), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
            if fault is not None and fault.response is not None:
                response = fault.response
            else:
                try:
                    response = self._route(request)
                except HubError as error:
                    response = error.response
                except Exception as error:  # told to the client, whose process the test is looking at
                    response = Response(500, {"error": f"The stand-in failed: {error!r}"})
            request.status = response.status
        return response, fault

    def _origin(self, index: int) -> str:
        if not self._servers:
            raise RuntimeError("The stand-in serves only inside its `with` block.")
        return f"http://127.0.0.1:{self._servers[index].server_address[1]}"

    def _route(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        for expected_method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and method == expected_method:
                # Unquoted only now: a branch may have a slash in its name, which is sent quoted.
                values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                return answer(self, request, **values)
        raise HubError(404, "", f"The stand-in does not know {request.method} {request.path}")

    def _authorize(self, request: Request) -> None:
        if not request.headers.get("authorization", "").startswith("Bearer "):
            raise HubError(401, "", "Invalid username or password.")

    def _repository(self, request: Request, repo_id: str) -> Repository:
        repository = self.repos.get(repo_id)
        if repository is None or (repository.private and "authorization" not in request.headers):
            # Who has no token is not told whether a repository is missing or private.
            status = 404 if "authorization" in request.headers else 401
            raise HubError(status, "RepoNotFound", "Repository not found")
        return repository

    def _who_am_i(self, request: Request) -> Response:
        self._authorize(request)
        organizations = [{"type": "org", "name": name} for name in ORGANIZATIONS]
        return Response(body={"type": "user", "name": USER, "fullname": USER, "orgs": organizations})

    def _known_harnesses(self, request: Request) -> Response:
        return Response(body={"standardEnvVars": [], "harnesses": {}})

    def _create_repository(self, request: Request) -> Response:
        self._authorize(request)
        wish = json.loads(request.body)
        if wish.get("type") not in (None, "model"):
            raise HubError(400, "", "The stand-in keeps models only.")
        repo_id = f"{wish.get('organization') or USER}/{wish['name']}"
        body = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.repos:
            return Response(409, {**body, "error": "You already created this model repo"})
        repository = Repository(repo_id, private=wish.get("visibility") == "private" or bool(wish.get("private")))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in self.lfs_suffixes)
        repository.commit("main", "initial commit", {_ATTRIBUTES: StoredFile(attributes.encode())})
        self.repos[repo_id] = repository
        return Response(body=body)

    def _delete_repository(self, request: Request) -> Response:
        self._authorize(request)
        wish = json.loads(request.body)
        del self.repos[self._repository(request, f"{wish.get('organization') or USER}/{wish['name']}").id]
        return Response(body={})

    def _validate_yaml(self, request: Request) -> Response:
        """Check a card's front matter for what the Hub is known to refuse."""
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(?:\n|$)", json.loads(request.body)["content"], re.DOTALL)
        if not match:
            return Response(
                body={"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
            )
        errors = []
        try:
            metadata = yaml.safe_load(match.group(1)) or {}
        except yaml.YAMLError as error:
            metadata, errors = {}, [f"YAML Metadata Error: {error}"]
        base_models = metadata.get("base_model") or []
        for model in base_models if isinstance(base_models, list) else [base_models]:
            if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(model)):
                errors.append(
                    f'"base_model" with value "{model}" is not valid. Use a model id from https://hf.co/models.'
                )
        if metadata.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
            errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
        return Response(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Response:
        self._authorize(request)
        present = self._repository(request, repo_id).resolve(revision).files
        answers = []
        for file in json.loads(request.body)["files"]:
            path = file["path"]
            answer = {
                "path": path,
                "uploadMode": "lfs" if path.endswith(self.lfs_suffixes) else "regular",
                "shouldIgnore": False,
            }
            if path in present:
                answer["oid"] = present[path].etag
            answers.append(answer)
        return Response(body={"files": answers})

    def _lfs_batch(self, request: Request, repo_id: str) -> Response:
        self._authorize(request)
        self._repository(request, repo_id)
        answers = []
        for entry in json.loads(request.body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self._objects:
                answer["actions"] = {"upload": {"href": f"{self.cdn}/objects/{entry['oid']}", "header": {}}}
            answers.append(answer)
        return Response(body={"transfer": "basic", "objects": answers})

    def _put_object(self, request: Request, sha256: str) -> Response:
        if hashlib.sha256(request.body).hexdigest() != sha256:
            raise HubError(400, "", "The content does not have the SHA-256 it was announced with.")
        self._objects[sha256] = request.body
        return Response()

    def _get_object(self, request: Request, sha256: str) -> Response:
        if sha256 not in self._objects:
            raise HubError(404, "EntryNotFound", "Entry not found")
        return _ranged(request, self._objects[sha256], {"ETag": f'"{sha256}"'})

    def _commit(self, request: Request, repo_id: str, revision: str) -> Response:
        self._authorize(request)
        repository = self._repository(request, repo_id)
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
                if value["oid"] not in self._objects:
                    raise HubError(400, "", f"The LFS object of {path} was not uploaded.")
                files[path] = StoredFile(self._objects[value["oid"]], lfs=True)
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
            body["pullRequestUrl"] = f"{self.endpoint}/{repo_id}/discussions/{number}"
        commit = repository.commit(branch, header["summary"], files)
        body |= {"commitOid": commit.id, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{commit.id}"}
        return Response(body=body)

    def _model_info(self, request: Request, repo_id: str, revision: str = "main") -> Response:
        repository = self._repository(request, repo_id)
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

    def _tree(self, request: Request, repo_id: str, revision: str, path: str = "") -> Response:
        commit = self._repository(request, repo_id).resolve(revision)
        return Response(body=_list_tree(commit, path, recursive=request.query.get("recursive", "").lower() == "true"))

    def _paths_info(self, request: Request, repo_id: str, revision: str) -> Response:
        commit = self._repository(request, repo_id).resolve(revision)
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return Response(body=[entry for entry in _list_tree(commit, "", recursive=True) if entry["path"] in wanted])

    def _references(self, request: Request, repo_id: str) -> Response:
        repository = self._repository(request, repo_id)

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

    def _create_branch(self, request: Request, repo_id: str, name: str) -> Response:
        self._authorize(request)
        repository = self._repository(request, repo_id)
        if name in repository.branches:
            raise HubError(409, "", f"Reference already exists: {name}")
        wish = json.loads(request.body or b"{}")
        repository.branches[name] = repository.resolve(wish.get("startingPoint", "main")).id
        return Response(201, {})

    def _delete_branch(self, request: Request, repo_id: str, name: str) -> Response:
        self._authorize(request)
        if self._repository(request, repo_id).branches.pop(name, None) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return Response(body={})

    def _create_tag(self, request: Request, repo_id: str, revision: str) -> Response:
        self._authorize(request)
        repository = self._repository(request, repo_id)
        name = json.loads(request.body)["tag"]
        if name in repository.tags:
            raise HubError(409, "", f"Tag already exists: {name}")
        repository.tags[name] = repository.resolve(revision).id
        return Response(201, {})

    def _delete_tag(self, request: Request, repo_id: str, revision: str) -> Response:
        self._authorize(request)
        if self._repository(request, repo_id).tags.pop(revision, None) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return Response(body={})

    def _history(self, request: Request, repo_id: str, revision: str) -> Response:
        history = self._repository(request, repo_id).history(revision)
        authors = [{"user": USER}]
        return Response(
            body=[
                {"id": commit.id, "title": commit.title, "message": "", "date": commit.date, "authors": authors}
                for commit in history
            ]
        )

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        commit = self._repository(request, repo_id).resolve(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            error = HubError(404, "EntryNotFound", "Entry not found").response
            return Response(error.status, error.body, {**error.headers, **headers})
        file = commit.files[path]
        headers["Content-Disposition"] = f'inline; filename="{path.rpartition("/")[2]}";'
        if not file.lfs:
            return _ranged(request, file.content, {**headers, "ETag": f'"{file.etag}"'})
        headers |= {
            "Location": f"{self.cdn}/objects/{file.sha256}",
            "X-Linked-ETag": f'"{file.etag}"',
            "X-Linked-Size": str(len(file.content)),
        }
        return Response(302, b"", headers)


_ROUTES: list[tuple[str, str, Callable[..., Response]]] = [
    ("GET", r"/api/whoami-v2", HubStandIn._who_am_i),
    ("GET", r"/api/agent-harnesses", HubStandIn._known_harnesses),
    ("POST", r"/api/validate-yaml", HubStandIn._validate_yaml),
    ("POST", r"/api/repos/create", HubStandIn._create_repository),
    ("DELETE", r"/api/repos/delete", HubStandIn._delete_repository),
    ("POST", rf"/api/models/{_REPOSITORY}/preupload/(?P<revision>[^/]+)", HubStandIn._preupload),
    ("POST", rf"/api/models/{_REPOSITORY}/commit/(?P<revision>[^/]+)", HubStandIn._commit),
    ("GET", rf"/api/models/{_REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", HubStandIn._tree),
    ("POST", rf"/api/models/{_REPOSITORY}/paths-info/(?P<revision>[^/]+)", HubStandIn._paths_info),
    ("GET", rf"/api/models/{_REPOSITORY}/commits/(?P<revision>[^/]+)", HubStandIn._history),
    ("GET", rf"/api/models/{_REPOSITORY}/refs", HubStandIn._references),
    ("POST", rf"/api/models/{_REPOSITORY}/branch/(?P<name>[^/]+)", HubStandIn._create_branch),
    ("DELETE", rf"/api/models/{_REPOSITORY}/branch/(?P<name>[^/]+)", HubStandIn._delete_branch),
    ("POST", rf"/api/models/{_REPOSITORY}/tag/(?P<revision>[^/]+)", HubStandIn._create_tag),
    ("DELETE", rf"/api/models/{_REPOSITORY}/tag/(?P<revision>[^/]+)", HubStandIn._delete_tag),
    ("GET", rf"/api/models/{_REPOSITORY}/revision/(?P<revision>[^/]+)", HubStandIn._model_info),
    ("GET", rf"/api/models/{_REPOSITORY}", HubStandIn._model_info),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", HubStandIn._lfs_batch),
    ("PUT", r"/objects/(?P<sha256>[0-9a-f]{64})", HubStandIn._put_object),
    ("GET", r"/objects/(?P<sha256>[0-9a-f]{64})", HubStandIn._get_object),
    ("GET", rf"/{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubStandIn._resolve),
]


def _list_tree(commit: Commit, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
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


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # `HTTPServer` asks the name service for the host's full name, which can take seconds without a network.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when a client hangs up, which it may."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _answer(self) -> None:
        target = urlsplit(self.path)
        request = Request(
            method=self.command,
            path=target.path,
            query={name: values[-1] for name, values in parse_qs(target.query).items()},
            headers={name.lower(): value for name, value in self.headers.items()},
            body=self._read_body(),
            origin=f"http://{self.headers.get('Host', '')}",
        )
        response, fault = self.hub.handle(request)
        if fault is not None and fault.delay:
            self.hub.closing.wait(fault.delay)
        headers = dict(response.headers)
        body = response.body
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json; charset=utf-8")
        body = body or b""
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            if fault is not None and fault.keep_bytes is not None:
                body = body[: fault.keep_bytes]
                self.close_connection = True
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the requests are recorded."""
