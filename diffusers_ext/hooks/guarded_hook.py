"""The base class of every hook of the collection: a hook that does not let itself be copied unnoticed."""

from typing import Any, NoReturn

from ._compat import ModelHook


class GuardedHook(ModelHook):
    """A `ModelHook` that refuses deep copies and pickling of the module that it is on.

    A deep copy of a hooked module holds the *original's* forward: it computes with the original's weights, silently.
    Pickling would lose the hook or fail deep inside. Both raise a `TypeError` that says what to do instead.

    Subclasses set:
        method: what is applied, as a user calls it ("a learned cache").
        removed_by: the call that takes it off ("remove_learned_cache").
    """

    method: str
    removed_by: str

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError(
            f"A module with {self.method} applied cannot be deep-copied: the copy would compute with the weights of "
            f"the original. Call `{self.removed_by}` first, copy, then apply it to each."
        )

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            f"A module with {self.method} applied cannot be pickled: its hooks hold running state. Call "
            f"`{self.removed_by}` first; `save_pretrained` and `state_dict` work as they are."
        )
