"""The stand-in for the Hub answers the real client as the Hub does, and fails when it is told to."""

import json
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

from tests.hub_stand_in import Fault, HubStandIn, Response, run_python


# What one process does with the real client; it prints what it saw, and the tests below look at it.
ROUND_TRIP = """
import json, sys, time
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

work = Path(sys.argv[1])
api = HfApi()
seen = {"whoami": api.whoami()["name"]}

def outcome(act):
    try:
        return ["returned", str(act())]
    except Exception as error:
        return [type(error).__name__, str(error)]

folder = work / "folder"
(folder / "unet").mkdir(parents=True)
(folder / "config.json").write_text('{"a": 1}')
(folder / "empty.txt").write_text("")
(folder / "unet" / "weights.safetensors").write_bytes(bytes(range(256)) * 500)
url = api.create_repo("org/first")
seen["repo_id"] = url.repo_id
seen["again"] = outcome(lambda: api.create_repo("org/first"))
seen["exist_ok"] = api.create_repo("org/first", exist_ok=True).repo_id
seen["own"] = api.create_repo("mine", private=True).repo_id
first = api.upload_folder(repo_id="org/first", folder_path=folder, commit_message="Upload it")
seen["first"] = first.oid
seen["unchanged"] = api.upload_folder(repo_id="org/first", folder_path=folder).oid
second = api.create_commit("org/first", commit_message="Change it", parent_commit=first.oid, operations=[
    CommitOperationAdd("config.json", b'{"a": 2}'), CommitOperationDelete("empty.txt")])
seen["second"] = second.oid
seen["late"] = outcome(lambda: api.create_commit("org/first", commit_message="Late", parent_commit=first.oid,
    operations=[CommitOperationAdd("late.txt", b"late")]))
pull = api.create_commit("org/first", commit_message="Suggest", create_pr=True,
    operations=[CommitOperationAdd("new.txt", b"new")])
seen["pull"] = [pull.pr_num, pull.pr_revision]

info = api.model_info("org/first", files_metadata=True)
seen["sha"] = info.sha
seen["siblings"] = {s.rfilename: [s.size, s.lfs is not None] for s in info.siblings}
seen["tree"] = sorted([e.path, type(e).__name__] for e in api.list_repo_tree("org/first"))
seen["files"] = sorted(api.list_repo_files("org/first", revision=first.oid))
seen["paths"] = [p.path for p in api.get_paths_info("org/first", ["config.json", "none"])]
seen["titles"] = [c.title for c in api.list_repo_commits("org/first")]
api.create_branch("org/first", branch="side/branch", revision=first.oid)
api.create_tag("org/first", tag="v1", revision=first.oid)
refs = api.list_repo_refs("org/first", include_pull_requests=True)
seen["branches"] = {b.name: b.target_commit for b in refs.branches}
seen["tags"] = {t.name: t.target_commit for t in refs.tags}
seen["pulls"] = [p.ref for p in refs.pull_requests]
api.upload_file(path_or_fileobj=b"on the side", path_in_repo="side.txt", repo_id="org/first", revision="side/branch")
seen["side"] = Path(hf_hub_download("org/first", "side.txt", revision="side/branch")).read_text()

seen["now"] = Path(hf_hub_download("org/first", "config.json")).read_text()
seen["then"] = Path(hf_hub_download("org/first", "config.json", revision=first.oid)).read_text()
seen["tagged"] = Path(hf_hub_download("org/first", "config.json", revision="v1")).read_text()
path = Path(hf_hub_download("org/first", "weights.safetensors", subfolder="unet"))
seen["large"] = path.read_bytes() == bytes(range(256)) * 500
seen["in snapshot of"] = path.parts[-3]
snapshot = Path(snapshot_download("org/first"))
seen["snapshot"] = sorted(str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file())
seen["private"] = [api.model_info("tester/mine").private, outcome(lambda: api.model_info("tester/mine", token=False))]

seen["no repository"] = outcome(lambda: hf_hub_download("org/none", "config.json"))
seen["no file"] = outcome(lambda: hf_hub_download("org/first", "none.json"))
seen["no revision"] = outcome(lambda: hf_hub_download("org/first", "config.json", revision="none"))
seen["no branch"] = outcome(lambda: api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/first",
    revision="none"))
seen["no token"] = outcome(lambda: api.create_repo("org/second", token=False))
seen["bad card"] = outcome(lambda: api.upload_file(path_or_fileobj=b"---\\nbase_model: /local/x\\n---\\n",
    path_in_repo="README.md", repo_id="org/first"))
api.delete_repo("tester/mine")
seen["deleted"] = outcome(lambda: api.model_info("tester/mine"))

# From here on the stand-in misbehaves; it recognises the repository by its name.
api.create_repo("org/faulty")
api.upload_file(path_or_fileobj=b"x" * 100000, path_in_repo="cut.txt", repo_id="org/faulty")
seen["cut"] = Path(hf_hub_download("org/faulty", "cut.txt")).read_text() == "x" * 100000
seen["down"] = outcome(lambda: api.list_repo_refs("org/faulty"))
seen["up again"] = [b.name for b in api.list_repo_refs("org/faulty").branches]
start = time.monotonic()
api.model_info("org/faulty")
seen["delayed"] = time.monotonic() - start
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as hub:
        hub.faults += [
            Fault(lambda r: r.method == "GET" and r.path.endswith("/cut.txt"), keep_bytes=40_000),
            Fault(lambda r: r.path == "/api/models/org/faulty/refs", Response(500, {"error": "full"})),
            Fault(lambda r: r.path == "/api/models/org/faulty" and r.method == "GET", delay=0.5),
        ]
        yield hub


@pytest.fixture(scope="module")
def seen(hub, tmp_path_factory):
    work = tmp_path_factory.mktemp("hub")
    output = run_python(ROUND_TRIP, hub.environment(work / "cache"), arguments=[str(work)])
    return json.loads(output.splitlines()[-1])


def test_client_is_known_by_its_token(seen):
    assert seen["whoami"] == "tester"
    assert seen["no token"][0] in ("HfHubHTTPError", "RepositoryNotFoundError")


def test_repository_is_created_once(seen):
    assert seen["repo_id"] == seen["exist_ok"] == "org/first"
    assert seen["again"][0] == "HfHubHTTPError" and "already created" in seen["again"][1]
    assert seen["own"] == "tester/mine"
    assert seen["deleted"][0] == "RepositoryNotFoundError"


def test_private_repository_is_hidden_from_who_has_no_token(seen):
    assert seen["private"] == [True, ["RepositoryNotFoundError", seen["private"][1][1]]]


def test_uploaded_folder_arrives_whole(hub, seen):
    expected = {"config.json": b'{"a": 1}', "empty.txt": b"", "unet/weights.safetensors": bytes(range(256)) * 500}
    assert hub.files("org/first", seen["first"]) == expected
    stored = hub.repos["org/first"].resolve(seen["first"]).files
    assert {path for path, file in stored.items() if file.lfs} == {"unet/weights.safetensors"}


def test_commits_have_ids_and_history(hub, seen):
    assert all(len(seen[name]) == 40 and int(seen[name], 16) for name in ("first", "second"))
    assert seen["first"] == seen["unchanged"] != seen["second"]
    assert seen["titles"] == ["Change it", "Upload it", "initial commit"]
    assert hub.files("org/first") == {"config.json": b'{"a": 2}', "unet/weights.safetensors": bytes(range(256)) * 500}
    assert hub.repos["org/first"].commits[seen["second"]].parent == seen["first"]
    assert seen["late"][0] == "HfHubHTTPError" and "parent commit" in seen["late"][1]


def test_pull_request_leaves_main_as_it_was(hub, seen):
    assert seen["pull"] == [1, "refs/pr/1"] and seen["pulls"] == ["refs/pr/1"]
    assert "new.txt" in hub.files("org/first", "refs/pr/1") and "new.txt" not in hub.files("org/first")


def test_client_reads_the_description_of_a_repository(seen):
    assert seen["sha"] == seen["second"]
    assert seen["siblings"]["config.json"] == [8, False]
    assert seen["siblings"]["unet/weights.safetensors"] == [128_000, True]
    assert seen["tree"] == [[".gitattributes", "RepoFile"], ["config.json", "RepoFile"], ["unet", "RepoFolder"]]
    assert seen["files"] == [".gitattributes", "config.json", "empty.txt", "unet/weights.safetensors"]
    assert seen["paths"] == ["config.json"]


def test_branches_and_tags(seen):
    assert seen["branches"] == {"main": seen["second"], "side/branch": seen["first"]}
    assert seen["tags"] == {"v1": seen["first"]}
    assert seen["side"] == "on the side"


def test_downloads_are_those_of_the_revision(seen):
    assert (seen["now"], seen["then"], seen["tagged"]) == ('{"a": 2}', '{"a": 1}', '{"a": 1}')
    assert seen["large"] and seen["in snapshot of"] == seen["second"]
    assert seen["snapshot"] == [".gitattributes", "config.json", "unet/weights.safetensors"]


def test_large_files_come_from_another_origin_which_is_sent_no_token(hub, seen):
    fetched = [request for request in hub.requests if request.path.startswith("/objects/") and request.method == "GET"]
    assert fetched and all(request.origin == hub.cdn != hub.endpoint for request in fetched)
    assert all("authorization" not in request.headers for request in fetched)
    commits = [request for request in hub.requests if "/commit/" in request.path]
    assert commits and all(request.headers["authorization"] == "Bearer hf_dummy" for request in commits)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("no repository", "RepositoryNotFoundError", "org/none"),
        ("no file", "RemoteEntryNotFoundError", "none.json"),
        ("no revision", "RevisionNotFoundError", "none"),
        ("no branch", "RevisionNotFoundError", "none"),
        ("bad card", "ValueError", '"base_model" with value "/local/x" is not valid'),
    ],
)
def test_client_raises_the_error_of_its_own_for_what_is_missing(seen, what, error, message):
    assert seen[what][0] == error and message in seen[what][1]


def test_download_that_breaks_off_is_tried_again(hub, seen):
    assert seen["cut"]
    fetched = [request for request in hub.requests if request.method == "GET" and request.path.endswith("/cut.txt")]
    assert len(fetched) == 2


def test_injected_error_and_delay_reach_the_client(seen):
    assert seen["down"][0] == "HfHubHTTPError" and "full" in seen["down"][1]
    assert seen["up again"] == ["main"]
    assert seen["delayed"] >= 0.5


def test_part_of_a_file_can_be_asked_for(hub, seen):
    address = f"{hub.endpoint}/org/first/resolve/{seen['second']}/config.json"
    with urlopen(Request(address, headers={"Range": "bytes=1-3"}), timeout=5) as answer:
        assert (answer.status, answer.read(), answer.headers["Content-Range"]) == (206, b'"a"', "bytes 1-3/8")
    with urlopen(Request(address, headers={"Range": "bytes=5-"}), timeout=5) as answer:
        assert answer.read() == b" 2}"
    with pytest.raises(HTTPError, match="416"):
        urlopen(Request(address, headers={"Range": "bytes=8-"}), timeout=5)


def test_every_request_was_understood(hub, seen):
    assert seen
    strange = [(r.method, r.path) for r in hub.requests if r.status in (404, 500)]
    missing = ("org/none", "none.json", "/none", "tester/mine", "org/faulty/refs")
    assert [entry for entry in strange if not any(part in entry[1] for part in missing)] == []


def test_only_loopback_is_served_and_only_while_open():
    with HubStandIn() as hub:
        address = hub.endpoint
        assert address.startswith("http://127.0.0.1:") and hub.cdn.startswith("http://127.0.0.1:")
        assert all(server.server_address[0] == "127.0.0.1" for server in hub._servers)
    with pytest.raises(URLError, match="refused"):
        urlopen(address, timeout=1)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        _ = HubStandIn().endpoint


def test_process_that_fails_shows_its_error_and_one_that_hangs_is_ended():
    with pytest.raises(AssertionError, match=r"ended with 1(.|\n)*ValueError: the reason"):
        run_python("raise ValueError('the reason')", {})
    with pytest.raises(AssertionError, match=r"more than 0\.5 s"):
        run_python("import time; time.sleep(30)", {}, timeout=0.5)


def test_script_runs_with_arguments_environment_and_the_repository_in_reach(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, diffusers_ext, tests\nprint(os.environ['GIVEN'], *sys.argv[1:])", encoding="utf-8"
    )
    assert run_python(script, {"GIVEN": "here"}, arguments=["a", "b c"]).split("\n")[0] == "here a b c"
