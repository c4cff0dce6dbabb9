"""A model cut among the processes that train it (torch's fully_shard), for models that one device does not hold.

Each process keeps a part of every weight, of its gradient and of its moments. A block's weights are gathered when it
is computed; `gradients` keeps them until the backward is over (ZeRO-2), `weights` drops them at once and gathers them
again there (ZeRO-3). All processes have to make as many passes as each other, or one waits for the others for ever.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from rwkvpipe.base.errors import Parted
from rwkvpipe.train.dist import Rank
from rwkvpipe.weights.rounded import in_few_bits

LOST = ("Connection closed", "Connection reset", "closed by peer", "gloo", "NCCL")  # what a process that is gone is


def shard(model: nn.Module, rank: Rank, kind: str) -> Rank:
    """Cut a model in place, `kind` says how; returns the process with its passes counted. Alone it stays whole."""
    if rank.count == 1:
        return rank
    from torch.distributed.device_mesh import init_device_mesh  # a second that only those who cut wait for
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(rank.device.type, (rank.count,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=kind == "weights")
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for unit in (*model.blocks, model):
        unit.set_force_sum_reduction_for_comms(True)  # the loss is divided already, and gloo knows no other sum
        unit.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(model, "features")
    if hasattr(model, "base_tensors"):  # what adapters go back to takes the place of parts
        model.base_tensors = {
            name: part_of(value, model.get_parameter(name)) for name, value in model.base_tensors.items()
        }
    return replace(rank, lockstep=True)


def parted(model: nn.Module) -> None:
    """Give back what a forward gathered: what optimizer and resume points see are the parts."""
    if hasattr(model, "set_gradient_divide_factor"):
        for unit in (*model.blocks, model):
            unit.reshard()


def hollow(model: nn.Module) -> nn.Module:
    """The same model without its weights, for `gathered` to fill; what is rounded is shared."""
    shared = [model.base_tensors] if hasattr(model, "base_tensors") else []
    shared += in_few_bits(model)
    empty = {id(value): nn.Parameter(value.detach().to("meta"), requires_grad=False) for value in model.parameters()}
    empty |= {id(value): value.to("meta") for value in model.buffers()}
    return copy.deepcopy(model, empty | {id(value): value for value in shared}).eval()


@contextmanager
def gathered(model: nn.Module, into: nn.Module) -> Iterator[nn.Module]:
    """`into`, which `hollow` gave, with all weights of a model that is cut: inside, each process does with it what it
    likes, for as long as it likes. All have to come in."""
    parted(model)
    empty = into.state_dict()
    with torch.no_grad():
        tensors = {name: _full(value) for name, value in model.state_dict().items()}
    into.load_state_dict(tensors, assign=True)
    del tensors
    try:
        yield into
    finally:
        into.load_state_dict(empty, assign=True)


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this process has, in its place; all of one that is not cut."""
    return value.to_local() if hasattr(value, "full_tensor") else value


def whole(tensors: Mapping[str, Tensor], rank: Rank) -> dict[str, Tensor]:
    """Tensors put together for the first process, one after the other; to the others none. All have to call it."""
    found = {}
    for name, value in tensors.items():
        value = value.full_tensor().cpu() if hasattr(value, "full_tensor") else value
        if not rank.index:
            found[name] = value
    return found


def pieces(tensors: Mapping[str, Tensor], rank: Rank) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What one process has to write for all to be written: its rows of tensors that are cut, and how many rows these
    have in all; the first one the others, too."""
    own, cut = {}, {}
    for name, value in tensors.items():
        if hasattr(value, "full_tensor"):
            size = -(-len(value) // rank.count)  # as torch cuts them: each as many, the last ones fewer
            local, cut[name] = value.to_local(), len(value)
            assert len(local) == min(size, max(0, len(value) - rank.index * size)), name
            own[name] = local
        elif not rank.index:
            own[name] = value
    return own, cut


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as a parameter is: this process's part of it, if that is cut, on its device."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def watched(rank: Rank) -> Iterator[None]:
    """Inside, a process that is gone is told in one line. Raises Parted."""
    try:
        yield
    except RuntimeError as error:
        if rank.lockstep and any(word in str(error) for word in LOST):
            line = f"process {rank.index + 1} of {rank.count}: another of them is gone; this one stops"
            raise Parted(line) from None
        raise
