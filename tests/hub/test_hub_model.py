"""A saved model is the one that loads, with its own origin and card, whatever was saved or uploaded there before."""

import inspect
import itertools
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from diffusers_ext.hub import HubModelMixin, Origin, read_origin, validate_model_card
from tests.hub_stand_in import HubStandIn, run_python


WEIGHTS = "diffusion_pytorch_model"
# Each of the three layers holds 256 bytes: one file, two shards, three shards.
LAYOUTS = {1: "10GB", 2: 600, 3: 300}


class TinyModel(HubModelMixin, ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = torch.nn.Linear(width, width, bias=False)
        self.second = torch.nn.Linear(width, width, bias=False)
        self.third = torch.nn.Linear(width, width, bias=False)

    def model_card(self):
        return {"title": "A tiny model", "summary": f"{self.config.width} wide.", "base_model": self.origin.base_model}


class PicturedModel(TinyModel):
    """Its card shows a picture, whose bytes say the model's value."""

    def model_card(self):
        picture = b"\x89PNG\r\n\x1a\n" + str(self.origin.base_model).encode()
        return {**super().model_card(), "sections": {"Plot": "![plot](plot.png)"}, "pictures": {"plot.png": picture}}


def tiny_model(value, cls=TinyModel):
    """A model whose weights and origin both say `value`."""
    model = cls()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    model.origin = Origin(method="tiny", package_version="1.0", base_model=f"org/base-{value}")
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def is_model(model, value):
    return all((parameter == value).all() for parameter in model.parameters()) and model.origin == Origin(
        method="tiny", package_version="1.0", base_model=f"org/base-{value}"
    )


def weight_names(shards, variant=None):
    """What diffusers calls the files: the variant stands before the shard's number, and last in the index."""
    dot = f".{variant}" if variant else ""
    if shards == 1:
        return {f"{WEIGHTS}{dot}.safetensors"}
    names = {f"{WEIGHTS}{dot}-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)}
    return names | {f"{WEIGHTS}.safetensors.index{dot}.json"}


@pytest.fixture
def no_upload(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an upload was started")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)


# The arguments.


@pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
def test_arguments_have_the_order_of_diffusers(method):
    ours, theirs = (list(inspect.signature(getattr(cls, method)).parameters) for cls in (HubModelMixin, ModelMixin))
    assert ours == [name for name in theirs if name != "use_flashpack"]


def test_second_positional_argument_is_the_main_process_and_uploads_nothing(tmp_path, no_upload):
    tiny_model(1).save_pretrained(tmp_path, True)
    assert set(contents(tmp_path)) == {"README.md", "config.json", f"{WEIGHTS}.safetensors"}


def test_pickled_weights_are_refused_everywhere(tmp_path, no_upload):
    with pytest.raises(ValueError, match="only safetensors"):
        tiny_model(1).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="only safetensors"):
        tiny_model(1).push_to_hub("org/tiny", safe_serialization=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"varient": "fp16"}, "unknown arguments: varient"), ({"repo_id": "org/tiny"}, "repo_id.*push_to_hub=True")],
)
def test_arguments_without_effect_are_refused(tmp_path, arguments, message):
    with pytest.raises(TypeError, match=message):
        tiny_model(1).save_pretrained(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


# Several processes.


def test_other_processes_write_weights_only(tmp_path, no_upload):
    tiny_model(1).save_pretrained(tmp_path, is_main_process=False, push_to_hub=True)
    assert set(contents(tmp_path)) == weight_names(1)
    assert read_origin(tmp_path / f"{WEIGHTS}.safetensors") == tiny_model(1).origin


def test_other_processes_leave_what_lies_there_to_the_main_process(tmp_path):
    tiny_model(1).save_pretrained(tmp_path, max_shard_size=300)
    before = contents(tmp_path)
    model = tiny_model(2)
    model.save_pretrained(tmp_path, is_main_process=False)
    after = contents(tmp_path)
    assert after.keys() - before.keys() == weight_names(1)
    assert {name: after[name] for name in before} == before
    model.save_pretrained(tmp_path, is_main_process=True)
    assert set(contents(tmp_path)) == {"README.md", "config.json"} | weight_names(1)
    assert is_model(TinyModel.from_pretrained(tmp_path), 2)


# What an earlier save left.


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(("before", "after"), itertools.product(LAYOUTS, LAYOUTS))
def test_second_save_into_a_folder_is_the_one_that_loads(tmp_path, before, after, variant):
    tiny_model(1).save_pretrained(tmp_path, max_shard_size=LAYOUTS[before], variant=variant)
    tiny_model(2).save_pretrained(tmp_path, max_shard_size=LAYOUTS[after], variant=variant)
    assert set(contents(tmp_path)) == {"README.md", "config.json"} | weight_names(after, variant)
    assert is_model(TinyModel.from_pretrained(tmp_path, variant=variant), 2)


@pytest.mark.parametrize("shards", LAYOUTS)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_pickled_weights_of_diffusers_are_replaced(tmp_path, shards, variant):
    ModelMixin.save_pretrained(
        tiny_model(1), tmp_path, safe_serialization=False, max_shard_size=LAYOUTS[shards], variant=variant
    )
    assert any(".bin" in name for name in contents(tmp_path))
    tiny_model(2).save_pretrained(tmp_path, variant=variant)
    assert set(contents(tmp_path)) == {"README.md", "config.json"} | weight_names(1, variant)


def test_shards_of_a_variant_under_their_older_names_are_replaced(tmp_path):
    tiny_model(1).save_pretrained(tmp_path, max_shard_size=600, variant="fp16")
    index = json.loads((tmp_path / f"{WEIGHTS}.safetensors.index.fp16.json").read_text())
    for old in set(index["weight_map"].values()):
        new = old.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors")
        (tmp_path / old).rename(tmp_path / new)
        index["weight_map"] = {key: new if name == old else name for key, name in index["weight_map"].items()}
    (tmp_path / f"{WEIGHTS}.safetensors.fp16.index.json").write_text(json.dumps(index))
    (tmp_path / f"{WEIGHTS}.safetensors.index.fp16.json").unlink()
    tiny_model(2).save_pretrained(tmp_path, variant="fp16")
    assert set(contents(tmp_path)) == {"README.md", "config.json"} | weight_names(1, "fp16")
    assert is_model(TinyModel.from_pretrained(tmp_path, variant="fp16"), 2)


@pytest.mark.parametrize(("plain", "fp16"), itertools.product(LAYOUTS, LAYOUTS))
def test_variants_stay_beside_each_other(tmp_path, plain, fp16):
    tiny_model(2).save_pretrained(tmp_path, max_shard_size=LAYOUTS[fp16], variant="fp16")
    tiny_model(1).save_pretrained(tmp_path, max_shard_size=LAYOUTS[plain])
    tiny_model(3).save_pretrained(tmp_path, variant="fp8")
    assert is_model(TinyModel.from_pretrained(tmp_path), 1)
    assert is_model(TinyModel.from_pretrained(tmp_path, variant="fp16"), 2)
    assert is_model(TinyModel.from_pretrained(tmp_path, variant="fp8"), 3)


@pytest.mark.parametrize("shards", LAYOUTS)
def test_foreign_files_stay(tmp_path, shards):
    names = [
        "notes.txt",
        "other.safetensors",
        "other-00001-of-00002.safetensors",
        f"{WEIGHTS}-old.safetensors",
        f"{WEIGHTS}-1-of-2.safetensors",
        f"{WEIGHTS}-00001-of-00002.safetensors.backup",
        f"my-{WEIGHTS}-00001-of-00002.safetensors",
        f"{WEIGHTS}.non_ema.safetensors",
        f"{WEIGHTS}.safetensors.index.json.orig",
    ]
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / f"{WEIGHTS}.safetensors").write_text("of another model")
    tiny_model(1).save_pretrained(tmp_path, max_shard_size=LAYOUTS[shards])
    after = contents(tmp_path)
    assert {name: after.pop(name) for name in names} == {name: name.encode() for name in names}
    assert set(after) == {"README.md", "config.json"} | weight_names(shards)
    assert (tmp_path / "unet" / f"{WEIGHTS}.safetensors").read_text() == "of another model"


def test_interrupted_save_leaves_the_old_files_whole(tmp_path, monkeypatch):
    tiny_model(1).save_pretrained(tmp_path, max_shard_size=300)
    before = contents(tmp_path)

    def write_half(self, save_directory, **kwargs):
        for name in ("config.json", *weight_names(3)):
            with open(f"{save_directory}/{name}", "wb") as file:
                file.write(before[name][:20])
        raise OSError("no space left")

    monkeypatch.setattr(ModelMixin, "save_pretrained", write_half)
    with pytest.raises(OSError, match="no space left"):
        tiny_model(2).save_pretrained(tmp_path, max_shard_size=300)
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_failing_card_leaves_the_old_files_whole(tmp_path, monkeypatch):
    tiny_model(1).save_pretrained(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(TinyModel, "model_card", HubModelMixin.model_card)
    with pytest.raises(TypeError, match="TinyModel must define `model_card`"):
        tiny_model(2).save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_cards_picture_is_saved_before_it_and_by_the_main_process_alone(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(Path(target)) or replace(source, target))
    for value in (1, 2):
        tiny_model(value, PicturedModel).save_pretrained(tmp_path)
        assert set(contents(tmp_path)) == {"README.md", "config.json", "plot.png"} | weight_names(1)
        assert contents(tmp_path)["plot.png"].endswith(f"org/base-{value}".encode())
    assert [path.name for path in moved if path.parent == tmp_path][-1] == "README.md"
    tiny_model(1, PicturedModel).save_pretrained(tmp_path / "other", is_main_process=False)
    assert set(contents(tmp_path / "other")) == weight_names(1)


# The origin.


@pytest.mark.parametrize("shards", LAYOUTS)
def test_every_file_carries_the_origin_and_a_subfolder_gives_it(tmp_path, shards):
    tiny_model(1).save_pretrained(tmp_path / "part", max_shard_size=LAYOUTS[shards])
    files = list((tmp_path / "part").glob("*.safetensors"))
    assert len(files) == shards
    assert all(read_origin(file) == tiny_model(1).origin for file in files)
    assert is_model(TinyModel.from_pretrained(tmp_path, subfolder="part"), 1)


def test_loading_info_comes_with_the_model_and_its_origin(tmp_path):
    tiny_model(1).save_pretrained(tmp_path)
    model, info = TinyModel.from_pretrained(tmp_path, output_loading_info=True)
    assert is_model(model, 1)
    assert info["missing_keys"] == [] and info["unexpected_keys"] == []


def test_origin_is_never_that_of_a_file_that_was_not_loaded(tmp_path):
    tiny_model(1).save_pretrained(tmp_path)
    ModelMixin.save_pretrained(tiny_model(2), tmp_path, safe_serialization=False)
    assert is_model(TinyModel.from_pretrained(tmp_path), 1)
    assert TinyModel.from_pretrained(tmp_path, use_safetensors=False).origin is None

    ModelMixin.save_pretrained(tiny_model(2), tmp_path / "foreign", safe_serialization=False)
    (tmp_path / f"{WEIGHTS}.safetensors").rename(tmp_path / "foreign" / "other.safetensors")
    assert TinyModel.from_pretrained(tmp_path / "foreign").origin is None


# Through the real client.

HUB = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi
from tests.hub.test_hub_model import PicturedModel, TinyModel, is_model, tiny_model

work = Path(sys.argv[1])
sharded = work / "sharded"
sharded.mkdir()
(sharded / "notes.txt").write_text("mine")
tiny_model(1).push_to_hub("org/single", "First", True)
tiny_model(2).save_pretrained(sharded, max_shard_size=300, push_to_hub=True, repo_id="org/sharded")
tiny_model(2).save_pretrained(work / "default-name", push_to_hub=True, commit_message="Saved")
tiny_model(3, PicturedModel).push_to_hub("org/parts", subfolder="part")
tiny_model(3, PicturedModel).push_to_hub("org/pictured")
HfApi().upload_folder(repo_id="org/parts", folder_path=sharded, path_in_repo="sharded")
for variant in (None, "fp16"):
    tiny_model(1).save_pretrained(
        work / "changed", variant=variant, max_shard_size=300, push_to_hub=True, repo_id="org/changed"
    )
first = HfApi().model_info("org/changed").sha
tiny_model(4).push_to_hub("org/changed")
tiny_model(5).push_to_hub("org/changed", variant="fp16")
single = HfApi().model_info("org/changed").sha
tiny_model(6).save_pretrained(work / "again", max_shard_size=600, push_to_hub=True, repo_id="org/changed")

load = TinyModel.from_pretrained
print("RESULT" + json.dumps({
    "single": is_model(load("org/single"), 1),
    "single, cached": is_model(load("org/single", local_files_only=True), 1),
    "sharded": is_model(load("org/sharded"), 2),
    "sharded, cached": is_model(load("org/sharded", local_files_only=True), 2),
    "sharded, other cache": is_model(load("org/sharded", cache_dir=work / "other"), 2),
    "subfolder": is_model(load("org/parts", subfolder="part"), 3),
    "sharded subfolder": is_model(load("org/parts", subfolder="sharded"), 2),
    "sharded variant": is_model(load("org/changed", variant="fp16", revision=first), 1),
    "sharded before": is_model(load("org/changed", revision=first), 1),
    "single after sharded": is_model(load("org/changed", revision=single), 4),
    "sharded after single": is_model(load("org/changed"), 6),
    "variant": is_model(load("org/changed", variant="fp16"), 5),
}))
"""


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    work = tmp_path_factory.mktemp("hub-model")
    with HubStandIn() as hub:
        output = run_python(HUB, hub.environment(work / "cache"), arguments=[str(work)])
        files = {repo_id: hub.files(repo_id) for repo_id in hub.repos}
        titles = {repo_id: [c.title for c in repo.history("main")] for repo_id, repo in hub.repos.items()}
        private = {repo_id for repo_id, repo in hub.repos.items() if repo.private}
    return json.loads(output.split("RESULT")[1]), files, titles, private


def test_models_on_the_hub_load_with_the_origin_of_the_loaded_weights(uploaded):
    loaded = uploaded[0]
    assert loaded == dict.fromkeys(loaded, True)


def test_our_card_is_the_one_uploaded(uploaded):
    files = uploaded[1]
    for repo_id, value in [("org/single", 1), ("org/sharded", 2), ("tester/default-name", 2), ("org/changed", 6)]:
        card = files[repo_id]["README.md"].decode()
        assert validate_model_card(card)["base_model"] == f"org/base-{value}"
        assert "# A tiny model\n\n8 wide." in card


def test_only_what_was_saved_is_uploaded_in_the_layout_it_was_saved_in(uploaded):
    files = uploaded[1]
    ours = {"README.md", "config.json"}
    assert set(files["org/single"]) == set(files["tester/default-name"]) == ours | weight_names(1)
    assert set(files["org/sharded"]) == ours | weight_names(3)


def test_a_card_is_uploaded_with_its_picture(uploaded):
    files = uploaded[1]["org/pictured"]
    assert set(files) == {"README.md", "config.json", "plot.png"} | weight_names(1)
    assert files["plot.png"] == b"\x89PNG\r\n\x1a\norg/base-3"
    assert "![plot](plot.png)" in files["README.md"].decode()


def test_upload_into_a_subfolder_has_no_card_and_no_picture(uploaded):
    files = uploaded[1]["org/parts"]
    assert {name for name in files if not name.startswith("sharded/")} == {
        "part/config.json",
        f"part/{WEIGHTS}.safetensors",
    }


def test_upload_deletes_weights_of_its_variant_that_it_does_not_replace(uploaded):
    files = uploaded[1]["org/changed"]
    assert set(files) == {"README.md", "config.json"} | weight_names(2) | weight_names(1, "fp16")


def test_each_upload_is_one_commit_with_its_message(uploaded):
    _, _, titles, private = uploaded
    assert titles["org/single"] == ["First", "initial commit"]
    assert titles["tester/default-name"] == ["Saved", "initial commit"]
    assert titles["org/sharded"] == ["Upload TinyModel", "initial commit"]
    assert titles["org/changed"] == ["Upload TinyModel"] * 5 + ["initial commit"]
    assert private == {"org/single"}
