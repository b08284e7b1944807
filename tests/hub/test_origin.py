"""The origin of saved files: it survives the file, it does not touch the tensors, and differences have names."""

import hashlib
import json
import os
import stat

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from diffusers_ext.hub import Origin, describe_base, origin_difference, read_origin, stamp_safetensors


class Block(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.to_q = torch.nn.Linear(width, width)
        self.convolution = torch.nn.Conv2d(1, 2, 3)
        self.embedding = torch.nn.Embedding(5, width)
        self.norm = torch.nn.BatchNorm1d(width)

    def forward(self, hidden_states):
        return self.to_q(hidden_states)


@pytest.fixture
def full_origin():
    return Origin("learning_to_cache", "0.1.0", "org/base", "Block", "ab" * 32, 9, 123456)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(7, dtype=torch.float16), "b": torch.randn(3, 5), "ü": torch.tensor([True, False])}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "note": "kept"})
    return path


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def data_section(path):
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_origin_survives_metadata(full_origin):
    metadata = full_origin.to_metadata()
    assert metadata["diffusers_ext.method"] == "learning_to_cache"
    assert all(key.startswith("diffusers_ext.") and isinstance(value, str) for key, value in metadata.items())
    assert Origin.from_metadata(metadata | {"format": "pt", "diffusers_ext.of_a_later_version": "x"}) == full_origin


def test_unknown_parts_are_left_out_and_stay_unknown():
    origin = Origin("careg", "0.1.0")
    assert origin.to_metadata() == {"diffusers_ext.method": "careg", "diffusers_ext.package_version": "0.1.0"}
    assert Origin.from_metadata(origin.to_metadata()) == origin


def test_metadata_without_origin_gives_none():
    assert Origin.from_metadata(None) is None
    assert Origin.from_metadata({"format": "pt"}) is None


def test_number_that_is_none_is_refused_by_its_key(full_origin):
    metadata = full_origin.to_metadata() | {"diffusers_ext.base_num_tensors": "many"}
    with pytest.raises(ValueError, match=r"`diffusers_ext\.base_num_tensors`.*'many'"):
        Origin.from_metadata(metadata)


def test_describe_base_counts_the_state_dict_and_digests_names_and_shapes():
    import diffusers_ext

    module = Block()
    origin = describe_base(module, "vico", "org/base")
    state = module.state_dict()
    # Independently of the code: one line of JSON a tensor, in order of the names.
    lines = "".join(f"{json.dumps([key, list(state[key].shape)], separators=(',', ':'))}\n" for key in sorted(state))
    assert origin == Origin(
        method="vico",
        package_version=diffusers_ext.__version__,
        base_model="org/base",
        base_class="Block",
        base_digest=hashlib.sha256(lines.encode()).hexdigest(),
        base_num_tensors=len(state),
        base_num_parameters=sum(tensor.numel() for tensor in state.values()),
    )


def test_digest_ignores_values_dtype_and_device_and_notices_shapes_and_names():
    expected = describe_base(Block(), "vico").base_digest
    assert describe_base(Block().half(), "vico").base_digest == expected
    assert describe_base(Block().to("meta"), "vico").base_digest == expected
    assert describe_base(Block(width=6), "vico").base_digest != expected
    renamed = Block()
    renamed.to_k = renamed.to_q
    del renamed.to_q
    assert describe_base(renamed, "vico").base_digest != expected


def test_compiled_module_has_the_origin_of_the_module():
    assert describe_base(torch.compile(Block()), "vico") == describe_base(Block(), "vico")
    parent = torch.nn.ModuleDict({"block": Block()})
    expected = describe_base(parent, "vico")
    parent["block"] = torch.compile(parent["block"])
    assert describe_base(parent, "vico") == expected


def test_quantized_module_has_no_digest():
    module = Block()
    module.hf_quantizer = object()
    origin = describe_base(module, "vico")
    assert (origin.base_class, origin.base_digest) == ("Block", None)
    assert (origin.base_num_tensors, origin.base_num_parameters) == (None, None)


@pytest.mark.parametrize("base_model", ["/home/someone/model", "./model", None])
def test_local_base_model_is_not_recorded(base_model):
    assert describe_base(Block(), "vico", base_model).base_model is None


def test_something_else_than_a_module_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        describe_base({}, "vico")


def peft_configurations():
    peft = pytest.importorskip("peft")
    targets = ["to_q", "convolution"]
    return {
        "lora": peft.LoraConfig(target_modules=[*targets, "embedding"]),
        "dora": peft.LoraConfig(target_modules=targets, use_dora=True),
        "saved module": peft.LoraConfig(target_modules=["to_q"], modules_to_save=["convolution"]),
        "ia3": peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]),
        "loha": peft.LoHaConfig(target_modules=targets),
        "oft": peft.OFTConfig(target_modules=["to_q"], r=2, oft_block_size=0),
    }


@pytest.mark.parametrize("method", ["lora", "dora", "saved module", "ia3", "loha", "oft"])
def test_adapters_of_peft_do_not_change_the_digest(method):
    peft = pytest.importorskip("peft")
    module = Block()
    expected = describe_base(module, "vico")
    configuration = peft_configurations()[method]
    if method == "saved module":  # only a whole PEFT model wraps modules to save
        module = peft.get_peft_model(module, configuration).base_model.model
    else:
        peft.inject_adapter_in_model(configuration, module, adapter_name="first")
        peft.inject_adapter_in_model(configuration, module, adapter_name="second")
    assert set(module.state_dict()) != set(Block().state_dict())
    assert describe_base(module, "vico") == expected


def test_stamp_keeps_tensors_and_metadata_and_can_be_read(weights, full_origin):
    before, tensors = data_section(weights), safetensors.torch.load_file(weights)
    stamp_safetensors(weights, full_origin)

    assert data_section(weights) == before
    loaded = safetensors.torch.load_file(weights)
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[key], tensors[key]) and loaded[key].dtype == tensors[key].dtype for key in tensors)
    assert metadata_of(weights) == {"format": "pt", "note": "kept", **full_origin.to_metadata()}
    assert read_origin(weights) == full_origin
    assert int.from_bytes(weights.read_bytes()[:8], "little") % 8 == 0
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]


def test_second_stamp_replaces_the_first(weights, full_origin):
    stamp_safetensors(weights, full_origin)
    stamp_safetensors(weights, Origin("careg", "0.2.0"))
    assert read_origin(weights) == Origin("careg", "0.2.0")
    assert metadata_of(weights) == {"format": "pt", "note": "kept", **Origin("careg", "0.2.0").to_metadata()}


def test_file_without_metadata_can_be_stamped(tmp_path, full_origin):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3)}, path)
    assert read_origin(path) is None
    stamp_safetensors(path, full_origin)
    assert metadata_of(path) == full_origin.to_metadata()


def test_file_without_tensors_can_be_stamped(tmp_path, full_origin):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({}, path)
    stamp_safetensors(path, full_origin)
    assert safetensors.torch.load_file(path) == {} and read_origin(path) == full_origin


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_stamp_keeps_the_permissions(weights, full_origin):
    weights.chmod(0o640)
    stamp_safetensors(weights, full_origin)
    assert stat.S_IMODE(weights.stat().st_mode) == 0o640


def test_failed_stamp_leaves_the_file_as_it_was(weights, full_origin, monkeypatch):
    before = weights.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        stamp_safetensors(weights, full_origin)
    assert weights.read_bytes() == before
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]


def test_what_is_no_complete_safetensors_file_is_refused_and_kept(weights, full_origin):
    whole = weights.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    broken = {
        "empty": b"",
        "a pickle": b"\x80\x02}q\x00." * 20,
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "truncated": whole[:-1],
        "too long": whole + b"\0",
        "header cut": whole[: 8 + length // 2],
        "header no JSON": whole[:8] + b"x" * length + whole[8 + length :],
        "header a list": (2).to_bytes(8, "little") + b"[]",
        "entry without offsets": (8).to_bytes(8, "little") + b'{"a":{}}',
    }
    for what, content in broken.items():
        weights.write_bytes(content)
        for act in (read_origin, lambda path: stamp_safetensors(path, full_origin)):
            with pytest.raises(ValueError, match=r"model\.safetensors is not a (complete )?safetensors file"):
                act(weights)
        assert weights.read_bytes() == content, what
    assert [path.name for path in weights.parent.iterdir()] == [weights.name]


def test_missing_file_is_a_missing_file(tmp_path, full_origin):
    with pytest.raises(FileNotFoundError):
        read_origin(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        stamp_safetensors(tmp_path / "none.safetensors", full_origin)
    assert list(tmp_path.iterdir()) == []


def test_no_difference_between_equal_or_unknown_bases(full_origin):
    assert origin_difference(full_origin, full_origin) is None
    assert origin_difference(None, full_origin) is None
    assert origin_difference(full_origin, None) is None
    assert origin_difference(Origin("vico", "0.1.0"), full_origin) is None
    other = Origin("vico", "9.9", "org/finetuned", *list(vars(full_origin).values())[3:])
    assert origin_difference(full_origin, other) is None


def test_difference_names_what_differs_and_both_values():
    saved, present = describe_base(Block(width=4), "vico"), describe_base(torch.nn.Linear(1000, 2), "vico")
    text = origin_difference(saved, present)
    assert "class: Block when saved, Linear now" in text
    state = Block().state_dict()
    assert f"number of tensors: {len(state)} when saved, 2 now" in text
    assert f"number of parameters: {sum(map(torch.numel, state.values()))} when saved, 2,002 now" in text
    assert f"{saved.base_digest[:12]}… when saved, {present.base_digest[:12]}… now" in text


def test_difference_in_shapes_alone_is_found():
    saved = describe_base(torch.nn.Linear(2, 3, bias=False), "vico")
    present = describe_base(torch.nn.Linear(3, 2, bias=False), "vico")
    text = origin_difference(saved, present)
    assert text.startswith("digest of the tensors' names and shapes") and "class" not in text
