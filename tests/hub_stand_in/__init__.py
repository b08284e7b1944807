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

from .hub import HubStandIn
from .messages import Fault, HubError, Request, Response
from .python_process import run_python
from .repository import Commit, Repository, StoredFile
from .repository_answers import ORGANIZATIONS, USER


__all__ = [
    "ORGANIZATIONS",
    "USER",
    "Commit",
    "Fault",
    "HubError",
    "HubStandIn",
    "Repository",
    "Request",
    "Response",
    "StoredFile",
    "run_python",
]
