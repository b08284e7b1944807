"""The stand-in itself: it holds the repositories, serves them, and finds who answers a request."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from urllib.parse import unquote

from . import download_answers, repository_answers, upload_answers
from .messages import Fault, HubError, Request, Response
from .repository import ATTRIBUTES, Repository
from .server import Handler, Server


_LFS_SUFFIXES = (".bin", ".ckpt", ".npz", ".ply", ".pt", ".pth", ".safetensors")
_ROUTES = [*repository_answers.ROUTES, *upload_answers.ROUTES, *download_answers.ROUTES]


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
        self.objects: dict[str, bytes] = {}  # what was uploaded through LFS, by SHA-256
        self._lock = threading.RLock()
        self._servers: list[Server] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> HubStandIn:
        for _ in range(2):  # the Hub and its CDN: a client must not send its token to the second
            server = Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
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
            return {path: file.content for path, file in files.items() if path != ATTRIBUTES}

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

    def repository(self, request: Request, repo_id: str) -> Repository:
        """The repository that a request asks for, when it may see it."""
        repository = self.repos.get(repo_id)
        if repository is None or (repository.private and "authorization" not in request.headers):
            # Who has no token is not told whether a repository is missing or private.
            status = 404 if "authorization" in request.headers else 401
            raise HubError(status, "RepoNotFound", "Repository not found")
        return repository
