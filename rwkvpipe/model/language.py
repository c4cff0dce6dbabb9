"""A language model but for what makes its family: ids and a state in, logits and the state after them out.

A family is a module with `complete` (fills sizes in), `detect` (finds them in a checkpoint) and a class that gives
`LanguageModel` its time mix and its channel mix. Both have `forward`, and `initialise(layer, n_layer, stream)` for all
that is not a matrix.
"""

import math
from collections.abc import Sequence
from inspect import signature

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.base.errors import ConfigError
from rwkvpipe.kernel.product import one_thread, through
from rwkvpipe.model.layers import Borders, Norm, State

# singular values of the matrices to start with (RWKV-LM); those not named start at zero
GAINS = {"att.receptance": 1.0, "att.key": 0.1, "att.value": 1.0, "att.gate": 0.1, "ffn.key": 1.0}


class Block(nn.Module):
    """Time mix, then channel mix, each on the normalised stream and added to it."""

    def __init__(self, config: RwkvConfig, layer: int, att: nn.Module, ffn: nn.Module):
        super().__init__()
        if layer == 0:
            self.ln0 = Norm(config.n_embd) if config.ln0 else nn.Identity()
        self.ln1 = Norm(config.n_embd)
        self.ln2 = Norm(config.n_embd)
        self.att = att
        if config.time_state:
            heads = config.n_embd // config.head_size
            att.time_state = nn.Parameter(torch.zeros(heads, config.head_size, config.head_size))
        self.ffn = ffn

    def forward(
        self, x: Tensor, first: Tensor | None, state: Sequence[Tensor], lengths=None, borders: Borders | None = None
    ) -> tuple[Tensor, ...]:
        """x (B, T, D), layer 0's values, and this layer's parts of the state (att_x, wkv, ffn_x).

        A wkv of None is the state that the weights say every text starts from.
        Returns the stream, layer 0's values, and the parts of the state after the last token.
        """
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        given = (lengths,) if borders is None else (lengths, borders)
        memory = state[1]
        if memory is None:  # read here, where all of the block's weights are at hand
            memory = self.att.time_state.repeat(len(x), 1, 1, 1)
        y, first, last, memory = self.att(self.ln1(x), first, state[0], memory, *given)
        x = x + y
        y, before = self.ffn(self.ln2(x), state[2], *given)
        return x + y, first, last, memory, before


class LanguageModel(nn.Module):
    """What the families share. They differ in two classes, made as `TimeMix(config, layer)`, `ChannelMix(config)`."""

    TimeMix: type[nn.Module]
    ChannelMix: type[nn.Module]

    def __init__(self, config: RwkvConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether blocks keep their input alone for the backward, and compute the rest again there."""
        if config.vocab_size is None:
            raise ConfigError("model.vocab_size: how many ids there are is not known; name it or give a tokenizer")
        self.emb = embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(
            Block(config, layer, self.TimeMix(config, layer), self.ChannelMix(config))
            for layer in range(config.n_layer)
        )
        self.ln_out = Norm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def start(self, rows: int, device=None) -> State:
        """The state before the first token: zeros, but for the memories that the weights say (`time_state`)."""
        state = State.zeros(self.config, rows, device, self.ln_out.weight.dtype)
        if self.config.time_state:
            state.wkv = [block.att.time_state.repeat(rows, 1, 1, 1) for block in self.blocks]
        return state

    def forward(self, ids: Tensor, state: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, vocab_size), fp32, for ids (B, T), and the state after them.

        With `lengths` (B,) rows are padded on the right: each row's state is that after its own last token, and what
        comes out beyond it means nothing.
        """
        features, state = self.features(ids, state, lengths)
        return self.logits(features), state

    def features(
        self,
        ids: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The stream (B, T, n_embd) before the head, and the state after the ids.

        `starts` (B, T) marks the first tokens of documents: each is read as if nothing had come before it.
        """
        if starts is not None and self.config.time_state:
            raise ConfigError("train.rows: packed begins each document without a memory; this model has a time_state")
        if starts is not None and "borders" not in signature(self.TimeMix.forward).parameters:
            raise ConfigError(f"train.rows: packed: models of {self.config.family} do not begin documents anew")
        borders = None if starts is None else Borders(starts)
        if state is None:
            state = State.zeros(self.config, len(ids), ids.device, self.ln_out.weight.dtype)
            state.wkv = [None] * len(self.blocks) if self.config.time_state else state.wkv
        x, first = self.emb(ids), None
        after = State([], [], [])
        for block, *parts in zip(self.blocks, state.att_x, state.wkv, state.ffn_x, strict=True):
            if self.recompute and torch.is_grad_enabled():
                again = {"use_reentrant": False, "preserve_rng_state": False}  # no block draws from a common stream
                x, first, *found = checkpoint(block, x, first, parts, lengths, borders, **again)
            else:
                x, first, *found = block(x, first, parts, lengths, borders)
            for kept, value in zip((after.att_x, after.wkv, after.ffn_x), found, strict=True):
                kept.append(value)
        return x, after

    def logits(self, features: Tensor) -> Tensor:
        """Logits of a stream (..., n_embd), fp32 (fp64 for fp64 models)."""
        found = through(self.head, self.ln_out(features))
        return found if found.dtype == torch.float64 else found.float()

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """RWKV-LM's initial values for models trained from nothing. Raises ConfigError for a single layer."""
        config = self.config
        if config.n_layer < 2:
            raise ConfigError("model.n_layer: initial values are defined for 2 layers or more")
        stream = torch.Generator().manual_seed(seed)
        self.emb.weight.uniform_(-1e-4, 1e-4, generator=stream)
        V, D = config.vocab_size, config.n_embd
        orthogonal(self.head.weight, 0.5 * math.sqrt(V / D) if V > D else 0.5, stream)
        for layer, block in enumerate(self.blocks):
            for norm in block.children():
                if isinstance(norm, nn.LayerNorm):
                    norm.reset_parameters()
            if hasattr(block.att, "ln_x"):
                block.att.ln_x.weight.fill_(((1 + layer) / config.n_layer) ** 0.7)
                block.att.ln_x.bias.zero_()
            block.att.initialise(layer, config.n_layer, stream)
            block.ffn.initialise(layer, config.n_layer, stream)
            if config.time_state:
                block.att.time_state.zero_()
            for name, matrix in block.named_modules():
                if name in GAINS:
                    orthogonal(matrix.weight, GAINS[name], stream)
                elif isinstance(matrix, nn.Linear):
                    matrix.weight.zero_()
        self.ln_out.reset_parameters()


def embedding(vocab_size: int, n_embd: int) -> nn.Embedding:
    """As `nn.Embedding` makes it, but for device meta: drawing nothing there, torch would import its compiler."""
    weight = torch.empty(vocab_size, n_embd)
    return nn.Embedding(vocab_size, n_embd, _weight=weight if weight.is_meta else nn.init.normal_(weight))


@one_thread()
def orthogonal(matrix: Tensor, gain: float, stream: torch.Generator) -> None:
    """All singular values `gain`; the same bits at any number of threads, which torch does not promise."""
    if matrix.device.type != "meta":
        nn.init.orthogonal_(matrix, gain, generator=stream)


def outline(tensors: dict[str, Tensor]) -> dict:
    """The sizes of a checkpoint that are found alike in every family. Raises KeyError or ValueError for half a one."""
    V, D = tensors["emb.weight"].shape
    numbers = [int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")]
    return {
        "n_layer": 1 + max(numbers),
        "n_embd": D,
        "vocab_size": V,
        "dim_ffn": tensors["blocks.0.ffn.key.weight"].shape[0],
    }
