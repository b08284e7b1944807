"""Publishing: mistakes are found before the first request, and what was published loads with the real libraries."""

import json
from pathlib import Path

import pytest

from diffusers_ext.hub import (
    list_pipelines,
    pipeline_class_name,
    pipelines_folder,
    publish,
    publish_pipeline,
    validate_model_card,
)
from tests.hub_stand_in import HubStandIn, run_python


ROOT = Path(__file__).resolve().parents[2]
CARD = "---\nlibrary_name: diffusers\nlicense: apache-2.0\n---\n\n# A pipeline\n"
CODE = """
from diffusers import DDPMPipeline


class NumberedPipeline(DDPMPipeline):
    number = 1
"""


@pytest.fixture
def folder(tmp_path):
    return write_pipelines(tmp_path / "pipelines")


def write_pipelines(folder):
    """Three pipelines: one to publish, one whose card is bad, and one without a card."""
    folder.mkdir()
    for name in ("numbered_ddpm", "bad_card", "no_card"):
        (folder / f"{name}.py").write_text(CODE, encoding="utf-8")
    (folder / "numbered_ddpm.md").write_text(CARD, encoding="utf-8")
    (folder / "bad_card.md").write_text("# No front matter\n", encoding="utf-8")
    return folder


# Checks that need no request.

MISTAKES = [
    ({"name": "unknown"}, ValueError, r"`name` must be one of bad_card, no_card, numbered_ddpm in .*'unknown'"),
    ({"name": "../numbered_ddpm"}, ValueError, "`name` must be one of"),
    ({"name": "no_card"}, FileNotFoundError, r"'no_card' has no card.*no_card\.md"),
    ({"name": "bad_card"}, ValueError, r"bad_card\.md.*no front matter"),
    ({"folder": "/nowhere"}, FileNotFoundError, "/nowhere"),
    ({"repo_id": "a/b/c"}, ValueError, "`repo_id`.*'a/b/c'"),
    ({"repo_id": "org/with space"}, ValueError, "`repo_id`.*'org/with space'"),
    ({"repo_id": ""}, ValueError, "`repo_id`"),
    ({"repo_id": None}, ValueError, "`repo_id`.*None"),
    ({"revision": "0" * 40}, ValueError, "`revision` must be a branch"),
    ({"commit_message": " "}, ValueError, "`commit_message`"),
    ({"extra_files": ["unet/a.py"]}, TypeError, "`extra_files` must map"),
    ({"extra_files": {"../a.py": b""}}, ValueError, r"relative paths.*'\.\./a\.py'"),
    ({"extra_files": {"/a.py": b""}}, ValueError, "relative paths.*'/a.py'"),
    ({"extra_files": {"unet//a.py": b""}}, ValueError, "relative paths.*'unet//a.py'"),
    ({"extra_files": {"unet\\a.py": b""}}, ValueError, "relative paths"),
    ({"extra_files": {"": b""}}, ValueError, "relative paths"),
    ({"extra_files": {"README.md": b""}}, ValueError, "must not replace 'README.md'"),
    ({"extra_files": {"Pipeline.py": b""}}, ValueError, "must not replace 'Pipeline.py'"),
    ({"extra_files": {"unet/a.py": 3}}, TypeError, "path or bytes, got int"),
    ({"extra_files": {"unet/a.py": "/nowhere.py"}}, FileNotFoundError, "unet/a.py.*/nowhere.py"),
    ({"extra_files": {"unet/a.py": b"def"}}, ValueError, "unet/a.py is not valid Python"),
]

# (code, a part of the message)
BAD_CODE = [
    ("def f(:\n", "not valid Python"),
    ("x = 1\n", "defines no pipeline"),
    ("class A(Mixin):\n    pass\n", "defines no pipeline"),
    (CODE + "class B(NumberedPipeline):\n    pass\n", r"exactly one.*NumberedPipeline \(line 5\), B \(line 7\)"),
    (CODE + "class B(NumberedPipeline):\n    pass\nclass C(B):\n    pass\n", r"B \(line 7\), C \(line 9\)"),
    (CODE + CODE, "NumberedPipeline is defined twice"),
    ("import x\nif x:\n    class A(x.DDPMPipeline):\n        pass\n", "line 3: the class A must stand at the top"),
    ("def f():\n    class A(DDPMPipeline):\n        pass\n", "must stand at the top level"),
    (CODE + "from diffusers_ext.mvgamba import MVGambaPipeline\n", "line 7.*second pipeline class"),
    (CODE + "try:\n    from other import SomePipeline\nexcept ImportError:\n    pass\n", "second pipeline class"),
    (CODE + "from other import *\n", "second pipeline class"),
    (CODE + "from .block import Block\n", r"relative import 'from \.block import Block' has no file"),
    (CODE + "from . import block\n", "relative import"),
    (CODE + "from ..block import Block\n", "relative import"),
]

GOOD_CODE = [
    (CODE, "NumberedPipeline"),
    ("import diffusers\nclass A(diffusers.DiffusionPipeline):\n    pass\n", "A"),
    ("from diffusers_ext import vico\nclass A(vico.VicoMixin, DiTPipeline):\n    pass\n", "A"),
    ("from diffusers.pipelines import *\nclass A(DiTPipeline):\n    pass\nclass Helper:\n    pass\n", "A"),
    ("from typing import *\nclass A(DiTPipeline):\n    pass\n".replace("typing", "diffusers"), "A"),
    ("class A(BasePipeline[int]):\n    pass\n", "A"),
    (CODE + "def f():\n    from other import SomePipeline\n", "NumberedPipeline"),
    (CODE + "if TYPE_CHECKING:\n    from other import SomePipeline\n", "NumberedPipeline"),
]


@pytest.mark.parametrize(("code", "message"), BAD_CODE)
def test_code_that_diffusers_would_refuse_or_misread_is_refused(code, message):
    with pytest.raises(ValueError, match=message) as raised:
        pipeline_class_name(code, "some_name.py")
    assert str(raised.value).startswith("some_name.py")


@pytest.mark.parametrize(("code", "name"), GOOD_CODE)
def test_the_one_pipeline_class_is_found(code, name):
    assert pipeline_class_name(code, "some_name.py") == name


def test_relative_import_of_a_shipped_file_is_allowed():
    assert pipeline_class_name(CODE + "from .block import Block\n", "a.py", ["block.py"]) == "NumberedPipeline"
    assert pipeline_class_name(CODE + "from .unet.block import Block\n", "a.py", ["unet/block.py"])


def test_names_are_listed_in_order(folder):
    assert list_pipelines(folder) == ["bad_card", "no_card", "numbered_ddpm"]


def test_folder_of_a_clone_of_a_wheel_and_of_neither(tmp_path, monkeypatch):
    site, data = tmp_path / "site", tmp_path / "data"
    monkeypatch.setattr(publish, "__file__", str(site / "diffusers_ext" / "hub" / "publish.py"))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(data))
    clone, wheel = site / "pipelines", data / "share" / "diffusers_ext" / "pipelines"

    clone.mkdir(parents=True)  # somebody else's package of that name, beside an installed one
    with pytest.raises(FileNotFoundError) as raised:
        pipelines_folder()
    assert str(clone) in str(raised.value) and str(wheel) in str(raised.value)

    wheel.mkdir(parents=True)
    assert pipelines_folder() == wheel
    (site / "pyproject.toml").touch()
    assert pipelines_folder() == clone


@pytest.mark.parametrize("name", sorted({path.stem for path in ROOT.glob("pipelines/*.*")}))
def test_pipeline_of_the_collection_is_fit_to_be_published(name):
    code, card = (ROOT / "pipelines" / f"{name}{suffix}" for suffix in (".py", ".md"))
    assert pipeline_class_name(code.read_text(encoding="utf-8"), code.name)
    assert validate_model_card(card.read_text(encoding="utf-8"))["library_name"] == "diffusers"


# What makes no request, seen from the other end of the connection.

MAKE_MISTAKES = """
import json, sys
from diffusers_ext.hub import publish_pipeline
from tests.hub.test_publish import MISTAKES

seen = {"heavy": sorted({"torch", "diffusers", "transformers"} & set(sys.modules)), "outcomes": []}
for changes, _, _ in MISTAKES:
    arguments = {"name": "numbered_ddpm", "repo_id": "org/published", "folder": sys.argv[1]} | changes
    try:
        publish_pipeline(**arguments)
        seen["outcomes"].append(["returned", ""])
    except Exception as error:
        seen["outcomes"].append([type(error).__name__, str(error)])
print(json.dumps(seen))
"""


def test_no_mistake_makes_a_request(folder, tmp_path):
    with HubStandIn() as hub:
        output = run_python(MAKE_MISTAKES, hub.environment(tmp_path / "cache"), arguments=[str(folder)])
        assert hub.requests == [] and hub.repos == {}
    seen = json.loads(output.splitlines()[-1])
    assert seen["heavy"] == []  # publishing loads neither torch nor diffusers
    assert [kind for kind, _ in seen["outcomes"]] == [error.__name__ for _, error, _ in MISTAKES]


@pytest.mark.parametrize(("changes", "error", "message"), MISTAKES)
def test_mistake_is_named(folder, changes, error, message, monkeypatch):
    def refuse(**_):
        raise AssertionError("A request was about to be made.")

    monkeypatch.setattr("huggingface_hub.HfApi", refuse)
    with pytest.raises(error, match=message):
        publish_pipeline(**({"name": "numbered_ddpm", "repo_id": "org/published", "folder": folder} | changes))


# What was published and pushed, loaded by the real libraries in one process.

LOAD = """
import json, sys, tempfile
from pathlib import Path
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from huggingface_hub import HfApi, create_repo, upload_folder
from diffusers_ext.hub import publish_pipeline, write_model_card

work = Path(sys.argv[1])
pipelines = work / "pipelines"
seen = {}

def outcome(act):
    try:
        return ["returned", type(act()).__name__]
    except Exception as error:
        return [type(error).__name__, str(error)]

def tiny(kind=UNet2DModel):
    return kind(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4)

def equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

# Models.
first, second = tiny(), tiny()
seen["pushed"] = str(first.push_to_hub("org/unet"))
old = HfApi().model_info("org/unet").sha
second.push_to_hub("org/unet")
loaded = UNet2DModel.from_pretrained("org/unet")
seen["loads the newest"] = equal(loaded, second) and not equal(loaded, first)
seen["loads the revision"] = equal(UNet2DModel.from_pretrained("org/unet", revision=old), first)
seen["no repository"] = outcome(lambda: UNet2DModel.from_pretrained("org/none"))
seen["no revision"] = outcome(lambda: UNet2DModel.from_pretrained("org/unet", revision="none"))

# Cards of models: what diffusers does to the card that a model wrote, and what a model has to do about it.
class Carded(UNet2DModel):
    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        upload = {key: kwargs.pop(key) for key in ("repo_id", "token", "private", "commit_message") if key in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        base_model = self.config.get("_name_or_path")
        write_model_card(save_directory, title="Our card", summary="Ours.", base_model=base_model)
        if push_to_hub:
            self.push_to_hub(upload.pop("repo_id", Path(save_directory).name), **upload)

class Ours(Carded):
    def push_to_hub(self, repo_id, commit_message=None, private=None, token=None, create_pr=False, variant=None):
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, variant=variant)
            return upload_folder(repo_id=repo_id, folder_path=folder, token=token, create_pr=create_pr,
                commit_message=commit_message or f"Upload {type(self).__name__}")

tiny(Carded).push_to_hub("org/overwritten")
tiny(Ours).push_to_hub("org/kept")
tiny(Ours).save_pretrained(work / "saved", push_to_hub=True, repo_id="org/kept-too")
based = Ours.from_pretrained("org/unet")
based.push_to_hub("org/based")
based.push_to_hub("org/based")

# Pipelines.
DDPMPipeline(first, DDPMScheduler(num_train_timesteps=10)).save_pretrained(work / "base")
DDPMPipeline(first, DDPMScheduler(num_train_timesteps=10)).push_to_hub("org/base")
component = work / "component.py"
component.write_text("from diffusers import UNet2DModel\\n")
published = publish_pipeline("numbered_ddpm", "org/numbered", folder=pipelines, private=True,
    extra_files={"unet/ours.py": component, "notes/a.txt": b"a"})
seen["published"] = [str(published), published.oid]
seen["again"] = publish_pipeline("numbered_ddpm", "org/numbered", folder=pipelines).oid
code = pipelines / "numbered_ddpm.py"
code.write_text(code.read_text().replace("number = 1", "number = 2"))
seen["changed"] = publish_pipeline("numbered_ddpm", "org/numbered", folder=pipelines, commit_message="Two").oid

def load(base=str(work / "base"), custom="org/numbered", **kwargs):
    return DiffusionPipeline.from_pretrained(base, custom_pipeline=custom, **kwargs)

def describe(pipeline):
    return [type(pipeline).__name__, pipeline.number, equal(pipeline.unet, first), isinstance(pipeline, DDPMPipeline)]

trusted = load(trust_remote_code=True)
seen["trusted"] = describe(trusted)
seen["image"] = list(trusted(num_inference_steps=2, output_type="np").images.shape)
seen["pinned"] = describe(load(trust_remote_code=True, custom_revision=published.oid))
seen["base from the Hub"] = describe(load("org/base", trust_remote_code=True))
seen["untrusted"] = outcome(load)
seen["untrusted base from the Hub"] = outcome(lambda: load("org/base"))
seen["no pipeline"] = outcome(lambda: load(custom="org/none", trust_remote_code=True))
try:
    publish_pipeline("numbered_ddpm", "org/numbered", folder=pipelines, revision="none")
except Exception as error:
    seen["no branch"] = [type(error).__name__, str(error)]

# Why an imported pipeline class is refused: diffusers counts it.
api = HfApi()
api.create_repo("org/two")
api.upload_file(repo_id="org/two", path_in_repo="pipeline.py", path_or_fileobj=(
    "from diffusers import DDPMPipeline\\nfrom tests.hub.imported_pipeline import OtherPipeline\\n"
    "class TwoPipeline(DDPMPipeline):\\n    pass\\n").encode())
import types
imported = types.ModuleType("tests.hub.imported_pipeline")
imported.OtherPipeline = type("OtherPipeline", (DDPMPipeline,), {"__module__": imported.__name__})
sys.modules[imported.__name__] = imported
seen["two"] = outcome(lambda: load(custom="org/two", trust_remote_code=True))
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as hub:
        yield hub


@pytest.fixture(scope="module")
def seen(hub, tmp_path_factory):
    work = tmp_path_factory.mktemp("publish")
    write_pipelines(work / "pipelines")
    output = run_python(LOAD, hub.environment(work / "cache"), arguments=[str(work)])
    return json.loads(output.splitlines()[-1])


def test_pushed_model_loads_with_equal_weights_at_each_revision(hub, seen):
    assert seen["loads the newest"] and seen["loads the revision"]
    assert set(hub.files("org/unet")) == {"config.json", "diffusion_pytorch_model.safetensors", "README.md"}


def test_missing_repository_and_revision_are_told_by_name(seen):
    assert seen["no repository"][0] == "OSError"
    assert "org/none is not a local folder and is not a valid model identifier" in seen["no repository"][1]
    assert seen["no revision"][0] == "OSError" and "none is not a valid git identifier" in seen["no revision"][1]
    assert seen["no pipeline"][0] == "RepositoryNotFoundError" and "org/none" in seen["no pipeline"][1]


def test_push_of_diffusers_replaces_the_card_that_the_model_wrote(hub, seen):
    assert seen
    card = hub.files("org/overwritten")["README.md"].decode()
    assert "Our card" not in card
    with pytest.raises(ValueError, match="`license`"):
        validate_model_card(card)


@pytest.mark.parametrize("repo_id", ["org/kept", "org/kept-too", "org/based"])
def test_model_that_overrides_push_to_hub_uploads_its_own_card(hub, seen, repo_id):
    assert seen
    card = hub.files(repo_id)["README.md"].decode()
    assert "# Our card" in card and validate_model_card(card)["license"] == "apache-2.0"
    assert validate_model_card(card).get("base_model") == ("org/unet" if repo_id == "org/based" else None)
    assert "diffusion_pytorch_model.safetensors" in hub.files(repo_id)


def test_pipeline_is_published_in_one_commit(hub, seen):
    address, commit = seen["published"]
    repository = hub.repos["org/numbered"]
    assert address == f"{hub.endpoint}/org/numbered/commit/{commit}" and repository.private
    assert [entry.title for entry in repository.history(commit)] == [
        "Publish the pipeline numbered_ddpm",
        "initial commit",
    ]
    assert hub.files("org/numbered", commit) == {
        "pipeline.py": CODE.encode(),
        "README.md": CARD.encode(),
        "unet/ours.py": b"from diffusers import UNet2DModel\n",
        "notes/a.txt": b"a",
    }


def test_publishing_the_same_again_makes_no_commit_and_a_change_makes_one(hub, seen):
    assert seen["again"] == seen["published"][1] != seen["changed"]
    changed = hub.repos["org/numbered"].resolve("main")
    assert (changed.id, changed.parent, changed.title) == (seen["changed"], seen["published"][1], "Two")
    assert b"number = 2" in hub.files("org/numbered")["pipeline.py"]


def test_published_pipeline_loads_over_a_local_base_and_over_one_from_the_hub(seen):
    assert seen["trusted"] == seen["base from the Hub"] == ["NumberedPipeline", 2, True, True]
    assert seen["image"] == [1, 8, 8, 1]


def test_pinned_revision_loads_the_code_of_then(seen):
    assert seen["pinned"] == ["NumberedPipeline", 1, True, True]


@pytest.mark.parametrize("what", ["untrusted", "untrusted base from the Hub"])
def test_code_is_not_run_without_trust(seen, what):
    kind, message = seen[what]
    assert kind == "ValueError" and "org/numbered" in message and "trust_remote_code=True" in message


def test_missing_branch_is_the_error_of_the_client(seen):
    assert seen["no branch"][0] == "RevisionNotFoundError"


def test_diffusers_refuses_a_file_that_imports_a_second_pipeline_class(seen):
    assert seen["two"][0] == "ValueError" and "Multiple classes" in seen["two"][1]
