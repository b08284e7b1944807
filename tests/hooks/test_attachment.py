"""Sets of hooks come and go as one, whatever else is on the modules."""

import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook

from diffusers_ext.hooks import GuardedHook, attach, attached_hooks, detach, find_hook, is_linked


class Double(ModelHook):
    """Replaces the forward: twice what the inner one gives."""

    def new_forward(self, module, *args, **kwargs):
        return 2 * self.fn_ref.original_forward(*args, **kwargs)


class AddOne(ModelHook):
    def post_forward(self, module, output):
        return output + 1


class Offload(AccelerateHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


class Broken(ModelHook):
    def initialize_hook(self, module):
        raise RuntimeError("cannot be initialised")


@pytest.fixture
def model():
    return torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())


X = torch.ones(3)


def state(model):
    return [dict(vars(module)) for module in model.modules()]


def test_hooks_run_and_leave_no_trace(model):
    before = state(model)
    attach(model, "a", [(model, AddOne()), (model[0], Double()), (model[1], Double())])
    assert torch.equal(model(X), 4 * X + 1)
    assert [module for module, _ in attached_hooks(model, "a")] == [model, model[0], model[1]]
    assert detach(model, "a") == 3
    assert state(model) == before
    assert torch.equal(model(X), X)
    assert detach(model, "a") == 0


def test_a_failing_hook_rolls_all_back(model):
    before = state(model)
    with pytest.raises(RuntimeError, match="cannot be initialised"):
        attach(model, "a", [(model[0], Double()), (model[1], Broken())])
    assert state(model) == before
    attach(model, "a", [(model[0], Double())])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: [(m[0], Double()), (m[0], Double())], ValueError, "twice"),
        (lambda m: [(m[0], Double()), (torch.nn.Linear(1, 1), Double())], ValueError, "Linear that is not part"),
        (lambda m: [(m[0], "hook")], TypeError, "got str"),
    ],
)
def test_a_bad_set_is_refused_before_anything_changes(model, make, error, message):
    before = state(model)
    with pytest.raises(error, match=message):
        attach(model, "a", make(model))
    assert state(model) == before


def test_a_name_that_is_taken_anywhere_below_is_refused(model):
    attach(model, "a", [(model[0], Double())])
    with pytest.raises(ValueError, match="already carries hooks named 'a'"):
        attach(model, "a", [(model[1], Double())])


@pytest.mark.parametrize("first_removed", ["a", "b"])
def test_two_sets_on_one_module_go_in_any_order(model, first_removed):
    before = state(model)
    attach(model, "a", [(model[0], Double())])
    attach(model, "b", [(model[0], AddOne())])
    assert torch.equal(model(X), 2 * X + 1)
    detach(model, first_removed)
    assert torch.equal(model(X), X + 1 if first_removed == "a" else 2 * X)
    detach(model, "b" if first_removed == "a" else "a")
    assert state(model) == before


def test_the_hook_above_keeps_its_new_forward(model):
    """diffusers' own `remove_hook` would make the upper hook a silent no-op here."""
    attach(model, "a", [(model[0], AddOne())])
    attach(model, "b", [(model[0], Double())])
    assert torch.equal(model(X), 2 * (X + 1))
    detach(model, "a")
    assert torch.equal(model(X), 2 * X)


def test_a_hook_and_a_registry_of_others_stay(model):
    registry = HookRegistry.check_if_exists_or_initialize(model[0])
    empty = HookRegistry.check_if_exists_or_initialize(model[1])
    registry.register_hook(AddOne(), "stock")
    before = state(model)
    attach(model, "a", [(model[0], Double()), (model[1], Double())])
    assert torch.equal(model(X), 2 * (2 * X + 1))  # below the hook that is not ours
    detach(model, "a")
    assert state(model) == before
    assert model[0]._diffusers_hook is registry and model[1]._diffusers_hook is empty
    assert torch.equal(model(X), X + 1)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_an_offload_hook_of_accelerate_survives_in_both_orders(model, hooked_first):
    offload = Offload()
    if hooked_first:
        attach(model, "a", [(model[0], Double())])
    add_hook_to_module(model[0], offload)
    if not hooked_first:
        attach(model, "a", [(model[0], Double())])
    assert torch.equal(model(X), 2 * X) and offload.calls == 1
    assert is_linked(model[0], "a")
    detach(model, "a")
    assert torch.equal(model(X), X) and offload.calls == 2
    remove_hook_from_module(model[0])
    assert torch.equal(model(X), X) and offload.calls == 2


def test_a_pipeline_that_takes_offload_off_and_on_again_keeps_the_hook(model):
    """As `maybe_free_model_hooks` does after each call."""
    first, second = Offload(), Offload()
    add_hook_to_module(model[0], first)
    attach(model, "a", [(model[0], Double())])
    model(X)
    remove_hook_from_module(model[0])
    assert torch.equal(model(X), 2 * X) and is_linked(model[0], "a")
    add_hook_to_module(model[0], second)
    assert torch.equal(model(X), 2 * X) and (first.calls, second.calls) == (1, 1)
    detach(model, "a")
    assert torch.equal(model(X), X) and second.calls == 2


class Replace(ModelHook):
    """Computes without the forward below it."""

    def new_forward(self, module, x):
        return 3 * x


@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("foreign", ["accelerate", "stock"])
def test_hooks_of_others_run_around_one_that_replaces_the_forward(model, foreign, hooked_first):
    before = state(model)
    offload = Offload()
    stock = AddOne()
    if hooked_first:
        attach(model, "a", [(model[0], Replace())])
    if foreign == "accelerate":
        add_hook_to_module(model[0], offload)
    else:
        HookRegistry.check_if_exists_or_initialize(model[0]).register_hook(stock, "stock")
    if not hooked_first:
        attach(model, "a", [(model[0], Replace())])
    assert torch.equal(model(X), 3 * X if foreign == "accelerate" else 3 * X + 1)
    assert offload.calls == (foreign == "accelerate")
    if foreign == "accelerate":
        remove_hook_from_module(model[0])
    else:
        model[0]._diffusers_hook.remove_hook("stock")
    assert torch.equal(model(X), 3 * X)
    detach(model, "a")
    assert torch.equal(model(X), X)
    if hooked_first:
        assert state(model) == before


def test_sets_of_ours_stack_under_hooks_of_others(model):
    HookRegistry.check_if_exists_or_initialize(model[0]).register_hook(AddOne(), "stock")
    add_hook_to_module(model[0], Offload())
    before = state(model)
    attach(model, "a", [(model[0], Replace())])
    attach(model, "b", [(model[0], Double())])
    assert torch.equal(model(X), 6 * X + 1)
    detach(model, "a")
    assert torch.equal(model(X), 2 * X + 1)
    attach(model, "a", [(model[0], Replace())])
    assert torch.equal(model(X), 3 * X + 1)
    detach(model, "b")
    detach(model, "a")
    assert state(model) == before and torch.equal(model(X), X + 1)


def test_a_hook_cut_off_by_another_tool_is_noticed(model, caplog):
    attach(model, "a", [(model[0], Double())])
    model[0].forward = lambda x: x
    assert not is_linked(model[0], "a")
    detach(model, "a")
    assert "does nothing from now on" in caplog.text
    assert torch.equal(model(X), X)
    assert "_diffusers_hook" not in vars(model[0])


def test_a_forward_wrapped_by_another_tool_goes_on_after_removal(model):
    attach(model, "a", [(model[0], Double())])
    inner = model[0].forward
    model[0].forward = lambda x: inner(x) + 1
    assert torch.equal(model(X), 2 * X + 1)
    detach(model, "a")
    assert torch.equal(model(X), X + 1)


def test_registry_caches_are_rebuilt(model):
    root = HookRegistry.check_if_exists_or_initialize(model)
    assert root._get_child_registries() == []
    attach(model, "a", [(model[1], Double())])
    assert root._get_child_registries() == [model[1]._diffusers_hook]
    detach(model, "a")
    assert root._get_child_registries() == []


def test_a_compiled_wrapper_is_looked_through(model):
    compiled = torch.compile(model, backend="eager")
    attach(compiled, "a", [(model[0], Double())])
    assert find_hook(model[0], "a") is not None
    assert detach(compiled, "a") == 1


def test_guarded_hooks_name_the_method_and_the_way_out(model):
    import copy
    import pickle

    class Guarded(GuardedHook):
        method = "a test method"
        removed_by = "remove_test_method"

    attach(model, "a", [(model[0], Guarded())])
    for action in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a test method applied.*`remove_test_method`"):
            action(model)
