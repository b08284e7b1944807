"""The model card template: what it writes can be read back, and what it refuses leaves nothing behind."""

import os
import stat

import pytest
import yaml

from diffusers_ext.hub import hub_model_id, validate_model_card, write_model_card


PNG = b"\x89PNG\r\n\x1a\n"


def front_matter(text):
    opening, block, _ = text.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(block)


def write(folder, **changes):
    path = write_model_card(folder, **({"title": "A title", "summary": "A summary."} | changes))
    return path.read_text(encoding="utf-8")


def test_every_given_fact_is_in_the_card(tmp_path):
    text = write(
        tmp_path,
        license="mit",
        library_name="diffusers-ext",
        tags=["learning-to-cache", "yes", "1.0"],
        base_model="org/base",
        base_model_relation="adapter",
        pipeline_tag="unconditional-image-generation",
        arxiv_id="2406.01733",
        usage="import torch\n\nprint(torch.ones(2))\n",
        sections={"How it was made": "With *care*.", "Limits": "| a | b |\n|---|---|\n| 1 | 2 |"},
    )
    assert front_matter(text) == {
        "library_name": "diffusers-ext",
        "license": "mit",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["learning-to-cache", "yes", "1.0"],  # still strings: YAML alone would read a boolean and a number
    }
    parts = [
        "\n# A title\n\nA summary.\n",
        "\n## Usage\n\n```python\nimport torch\n\nprint(torch.ones(2))\n```\n",
        "\n## How it was made\n\nWith *care*.\n",
        "\n## Limits\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
        "https://huggingface.co/papers/2406.01733",
    ]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)


def test_defaults_claim_nothing_that_was_not_said(tmp_path):
    text = write(tmp_path)
    assert front_matter(text) == {"library_name": "diffusers", "license": "apache-2.0"}
    assert "## " not in text


def test_written_card_is_valid_and_the_client_reads_the_same_metadata(tmp_path):
    from huggingface_hub import ModelCard

    text = write(tmp_path, tags=["a: b", "# c", "ü"], base_model="org/base")
    metadata = validate_model_card(text)
    assert metadata == ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert metadata["tags"] == ["a: b", "# c", "ü"]


@pytest.mark.parametrize(
    "base_model", ["/models/base", "./base", "../base", "~/base", "a/b/c", "C:\\models", "here/base"]
)
def test_local_base_model_and_its_relation_are_left_out(tmp_path, monkeypatch, base_model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    text = write(tmp_path, base_model=base_model, base_model_relation="finetune")
    assert front_matter(text) == {"library_name": "diffusers", "license": "apache-2.0"}
    assert hub_model_id(base_model) is None


def test_path_object_and_empty_string_are_no_base_model(tmp_path):
    assert "base_model" not in front_matter(write(tmp_path, base_model=tmp_path))
    assert "base_model" not in front_matter(write(tmp_path, base_model=""))


def test_usage_with_a_fence_of_its_own_does_not_end_the_code_block(tmp_path):
    usage = 'text = """\n```\nfenced\n```\n"""'
    text = write(tmp_path, usage=usage)
    assert f"````python\n{usage}\n````" in text


def test_card_is_replaced_and_nothing_else_is_left_in_the_folder(tmp_path):
    folder = tmp_path / "new" / "folder"
    write(folder, title="First")
    text = write(folder, title="Second")
    assert "# Second" in text and "First" not in text
    assert [path.name for path in folder.iterdir()] == ["README.md"]


def test_a_failed_write_leaves_the_old_card_and_no_rest(tmp_path, monkeypatch):
    write(tmp_path, title="First")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, title="Second")
    assert "# First" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_pictures_lie_whole_beside_the_card_that_shows_them(tmp_path, monkeypatch):
    sections = {"Plots": "![one](one.png) and ![two](two-b.png)"}
    for data in (PNG + b"first", PNG + b"second"):
        text = write(tmp_path, sections=sections, pictures={"one.png": data, "two-b.png": PNG})
        assert "![one](one.png)" in text
        assert {path.name for path in tmp_path.iterdir()} == {"README.md", "one.png", "two-b.png"}
        assert (tmp_path / "one.png").read_bytes() == data

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, sections=sections, pictures={"one.png": PNG + b"third", "two-b.png": PNG})
    assert (tmp_path / "one.png").read_bytes() == PNG + b"second"
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "one.png", "two-b.png"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_card_has_the_permissions_of_any_new_file(tmp_path):
    write(tmp_path)
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE((tmp_path / "README.md").stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_linked_card_is_replaced_and_its_target_is_not_written_through(tmp_path):
    target = tmp_path / "blob"
    target.write_text("shared", encoding="utf-8")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "README.md").symlink_to(target)
    write(folder)
    assert target.read_text(encoding="utf-8") == "shared"
    assert not (folder / "README.md").is_symlink()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"title": ""}, ValueError, "`title`.*''"),
        ({"title": "two\nlines"}, ValueError, "`title`.*single line.*two"),
        ({"title": None}, TypeError, "`title`.*None"),
        ({"summary": "  "}, ValueError, "`summary`"),
        ({"license": None}, TypeError, "`license`.*None"),
        ({"library_name": ""}, ValueError, "`library_name`"),
        ({"tags": "tag"}, TypeError, "`tags`.*sequence.*'tag'"),
        ({"tags": ["good", 3]}, TypeError, "`tags`.*3"),
        ({"base_model": 3}, TypeError, "`base_model`.*3"),
        ({"base_model": "not a model"}, ValueError, "`base_model`.*org/name.*'not a model'"),
        ({"base_model_relation": "adapter"}, ValueError, "`base_model_relation`.*`base_model` is None"),
        ({"base_model": "a/b", "base_model_relation": "lora"}, ValueError, "one of adapter, finetune.*'lora'"),
        ({"pipeline_tag": ""}, ValueError, "`pipeline_tag`"),
        ({"arxiv_id": "2406.01733v2"}, ValueError, "`arxiv_id`.*2406.01733v2"),
        ({"arxiv_id": "https://arxiv.org/abs/2406.01733"}, ValueError, "`arxiv_id`"),
        ({"usage": ""}, ValueError, "`usage`"),
        ({"sections": ["a"]}, TypeError, "`sections`"),
        ({"sections": {"two\nlines": "a"}}, ValueError, "`sections`.*single line"),
        ({"sections": {"Limits": ""}}, ValueError, r"`sections\['Limits'\]`"),
        ({"pictures": ["plot.png"]}, TypeError, "`pictures`.*plot.png"),
        ({"pictures": {"../plot.png": PNG}}, ValueError, "`pictures`.*plain file names.*'../plot.png'"),
        ({"pictures": {"README.md": PNG}}, ValueError, "`pictures`.*'README.md'"),
        ({"pictures": {"plot.png": b"GIF89a"}}, ValueError, r"`pictures\['plot.png'\]`.*PNG"),
        ({"pictures": {"plot.png": "text"}}, ValueError, r"`pictures\['plot.png'\]`.*PNG"),
        ({"pictures": {"plot.png": PNG}}, ValueError, "`pictures` holds 'plot.png', but no section shows it"),
    ],
)
def test_bad_argument_is_named_and_nothing_is_written(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        write(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


GOOD = "---\nlibrary_name: diffusers\nlicense: mit\n---\n\n# Title\n"


def test_validate_returns_the_front_matter():
    assert validate_model_card(GOOD) == {"library_name": "diffusers", "license": "mit"}
    assert validate_model_card(GOOD.replace("\n", "\r\n")) == {"library_name": "diffusers", "license": "mit"}
    assert validate_model_card(GOOD.replace("mit", "mit\nbase_model:\n- org/a\n- b"))["base_model"] == ["org/a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Title\n", "no front matter.*'# Title'"),
        ("", "no front matter"),
        ("<!-- made by a tool -->\n" + GOOD, "no front matter.*made by a tool"),
        ("---\nlibrary_name: diffusers\nlicense: mit\n# Title\n", "no front matter"),
        ("---\n---\n# Title\n", "`library_name`"),
        ("---\nlibrary_name: diffusers\n---\n", "`license`.*None"),
        ("---\nlicense: mit\n---\n", "`library_name`.*None"),
        ("---\nlibrary_name: diffusers\nlicense: 3\n---\n", "`license`.*3"),
        ("---\nlibrary_name: [unclosed\nlicense: mit\n---\n", "valid YAML"),
        ("---\n- a\n- b\n---\n", "valid YAML mapping"),
        (GOOD.replace("mit", "mit\nbase_model: /home/me/model"), "`base_model`.*'/home/me/model'"),
        (GOOD.replace("mit", "mit\nbase_model:\n- a/b\n- ./c"), "`base_model`.*'./c'"),
        (GOOD.replace("mit", "mit\nbase_model_relation: adapter"), "needs a `base_model`"),
        (GOOD.replace("mit", "mit\nbase_model: a/b\nbase_model_relation: lora"), "`base_model_relation`.*'lora'"),
    ],
)
def test_validate_refuses_and_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        validate_model_card(text)


def test_validate_wants_text():
    with pytest.raises(TypeError, match="bytes"):
        validate_model_card(GOOD.encode())
