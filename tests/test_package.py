"""The package as a whole: imports, versions, the environment report, metadata, cards and the README's commands."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import diffusers_ext
from diffusers_ext import versions
from diffusers_ext.hub import list_pipelines, pipelines_folder, validate_model_card


ROOT = Path(__file__).parents[1]
ROOMS = {path.name for path in (ROOT / "diffusers_ext").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
SHARED_ROOMS = {"hooks", "distributed", "gaussians", "hub", "videocrafter"}


def test_importing_the_package_imports_no_heavy_library():
    code = (
        "import sys, diffusers_ext; dir(diffusers_ext); "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert output.stdout.strip() == "[]"


def test_every_public_name_is_there_and_comes_from_its_room():
    for name in diffusers_ext.__all__:
        assert getattr(diffusers_ext, name) is not None
    for name, room in diffusers_ext._ROOMS.items():
        assert name in sys.modules[f"diffusers_ext.{room}"].__all__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = diffusers_ext.no_such_name


def test_no_method_room_imports_another():
    for room in ROOMS - SHARED_ROOMS:
        for path in (ROOT / "diffusers_ext" / room).rglob("*.py"):
            text = path.read_text()
            for other in ROOMS - SHARED_ROOMS - {room}:
                assert not re.search(rf"(from|import) (\.+|diffusers_ext\.){other}\b", text), f"{path} imports {other}"


def test_private_names_of_diffusers_are_imported_in_one_file():
    for path in (ROOT / "diffusers_ext").rglob("*.py"):
        if path.name != "_compat.py":
            assert not re.search(r"from diffusers\.\S* import .*\b_[a-z]|from diffusers\.\S*\._", path.read_text()), (
                path
            )


def test_tested_ranges_are_those_of_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in project["dependencies"])
    assert {name: required[name] for name in versions.TESTED} == versions.TESTED


def test_constraints_pin_every_requirement_within_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        if requirement.name == "diffusers-ext":
            continue
        matching = [pin for pin in pins if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        assert matching, f"{requirement.name} is not pinned"
        for pin in matching:
            assert requirement.specifier.contains(str(pin.specifier)[2:]), f"{pin} lies outside {requirement}"


def test_a_version_outside_the_tested_range_is_named_once(monkeypatch, caplog):
    monkeypatch.setitem(versions.TESTED, "torch", "<1")
    versions.warn_untested_versions.cache_clear()
    versions.warn_untested_versions()
    versions.warn_untested_versions()
    versions.warn_untested_versions.cache_clear()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("diffusers-ext was tested with torch<1, installed is 2")


def test_the_environment_report_says_what_is_missing_and_why():
    output = subprocess.run(
        [sys.executable, "-m", "diffusers_ext.env"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert f"diffusers-ext {diffusers_ext.__version__}" in output
    assert re.search(r"diffusers: 0\.4[23]\S*; >=0\.42,<0\.44", output)
    for package in ("xformers", "gsplat", "mamba_ssm"):
        assert re.search(rf"{package}: (found|off), ", output)


@pytest.mark.parametrize("name", list_pipelines())
def test_each_custom_pipeline_has_a_valid_card_that_shows_the_plain_door_first(name):
    card = (pipelines_folder() / f"{name}.md").read_text()
    metadata = validate_model_card(card)
    assert metadata["library_name"] == "diffusers"
    assert "base_model_relation" not in metadata
    assert "huggingface.co/papers/" in card
    assert 0 < card.index("from diffusers_ext import") < card.index("custom_pipeline=")
    assert "revision=" in card


def test_nothing_else_lies_in_the_pipelines_folder():
    names = list_pipelines()
    allowed = {f"{name}{suffix}" for name in names for suffix in (".py", ".md")}
    assert {path.name for path in pipelines_folder().iterdir() if path.name != "__pycache__"} == allowed


def test_notice_cites_each_method_with_paper_and_repository():
    notice = (ROOT / "NOTICE").read_text()
    assert len(re.findall(r"https://huggingface.co/papers/\d{4}\.\d{5}", notice)) == 10
    assert len(re.findall(r"https://github.com/\S+ \((?:Apache-2.0|MIT|no licence granted)\)", notice)) == 10


def test_the_readme_opens_with_the_two_commands_and_ci_runs_the_second():
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    installs = [line for line in lines if re.match(r"(pip|python -m pip|uv) ", line)]
    assert installs[:2] == [
        "pip install -e . -c constraints.txt && python examples/quickstart.py",
        'pip install -e ".[test]" -c constraints.txt && pytest',
    ]
    assert installs[1] in (ROOT / ".ci" / "run").read_text()


def test_relative_links_of_the_documents_exist():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
