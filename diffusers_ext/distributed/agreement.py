"""Do all ranks mean the same thing? Digests are gathered, and who differs is named."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from .channel import Channel
from .errors import CommunicationError


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_SIZE = 16  # bytes of a digest


def digest_of(*values: Any) -> bytes:
    """16 bytes that depend on every tensor's bits, shape and type, on plain values, and on other objects' class."""
    digest = hashlib.blake2b(digest_size=_SIZE)
    leaves, spec = tree_flatten(values)
    digest.update(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
            # A copy: a tensor of one element may count as contiguous with a stride of 0, which no other type can view.
            whole = leaf.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
            digest.update(whole.view(torch.uint8).numpy().tobytes())
        else:
            plain = isinstance(leaf, _PLAIN)
            digest.update((repr(leaf) if plain else type(leaf).__qualname__).encode())  # a repr may hold an address
    return digest.digest()


def check_agreement(channel: Channel, digests: Mapping[str, bytes]) -> None:
    """Raise on every rank unless all ranks have the same digests; one message for all of them.

    Args:
        channel: of the ranks.
        digests: by what they are of, the same names in the same order on all ranks.

    Raises:
        CommunicationError: naming the first thing that differs and the ranks that differ from the majority.
    """
    row = torch.frombuffer(bytearray(b"".join(digests.values())), dtype=torch.uint8)
    rows = [bytes(part.numpy()) for part in channel.gather(row, "digests of " + ", ".join(digests))]
    for index, name in enumerate(digests):
        found = [row[index * _SIZE : (index + 1) * _SIZE] for row in rows]
        if len(set(found)) > 1:
            usual = Counter(found).most_common(1)[0][0]
            others = [rank for rank, digest in enumerate(found) if digest != usual]
            raise CommunicationError(
                f"The ranks disagree about the {name}: rank{'s' * (len(others) > 1)} {', '.join(map(str, others))} "
                f"of {len(rows)} differ{'s' * (len(others) == 1)} from the others.",
                rank=channel.members.rank,
                peer=others[0],
                what=name,
            )
