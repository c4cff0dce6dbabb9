"""What RWKV blocks are built of, and the state that a model carries from token to token."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from rwkvpipe.base.config import RwkvConfig
from rwkvpipe.kernel.blend import mix, norm, squared_relu
from rwkvpipe.kernel.gate import gate, sift
from rwkvpipe.kernel.product import through
from rwkvpipe.kernel.wkv5 import wkv5
from rwkvpipe.kernel.wkv6 import wkv6

HEAD_EPS = 64e-5  # group norm's, whatever the head size
GATED = (  # matrices of a block of RWKV-5 and RWKV-6
    *(f"att.{name}" for name in ("receptance", "key", "value", "gate", "output")),
    *("ffn.key", "ffn.value", "ffn.receptance"),
)
FORGET = 8.0  # w of a token behind which nothing is left: exp(-exp(8)) is 0 even in fp64


class Norm(nn.LayerNorm):
    """That of the stream, whose gradients have the same bits at any number of threads."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D), normalised."""
        return norm(x, self.weight, self.bias, self.eps)


@dataclass
class State:
    """What a model knows of the tokens it has read: for every layer l and row.

    `att_x[l]`, `ffn_x[l]` (rows, n_embd): the last inputs of time mix and channel mix. `wkv[l]` (rows, heads,
    head_size, head_size), [value, key]: the memory, in fp32 (fp64 for fp64 models).
    """

    att_x: list[Tensor]
    wkv: list[Tensor]
    ffn_x: list[Tensor]

    @classmethod
    def zeros(cls, config: RwkvConfig, rows: int, device=None, dtype: torch.dtype = torch.float32) -> "State":
        """The state before the first token."""
        N, H = config.head_size, config.n_embd // config.head_size

        def zeros(*shape: int) -> list[Tensor]:
            return [torch.zeros(rows, *shape, device=device, dtype=dtype) for _ in range(config.n_layer)]

        return cls(zeros(config.n_embd), zeros(H, N, N), zeros(config.n_embd))

    def _map(self, change) -> "State":
        return State(*([change(x) for x in getattr(self, field.name)] for field in fields(self)))

    def take(self, rows) -> "State":
        """A copy of these rows (a list or a tensor of indices)."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.wkv[0].device)
        return self._map(lambda x: x.index_select(0, index))

    def put(self, rows, other: "State") -> None:
        """Overwrite these rows by those of `other`."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.wkv[0].device)
        for field in fields(self):
            for mine, new in zip(getattr(self, field.name), getattr(other, field.name), strict=True):
                mine.index_copy_(0, index, new.to(mine))

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(x.nbytes for field in fields(self) for x in getattr(self, field.name))

    def copy(self) -> "State":
        """A copy of all of it, each tensor without gaps."""
        return self._map(lambda x: x.clone(memory_format=torch.contiguous_format))

    def detach(self) -> "State":
        """The same numbers, cut off from what they were computed from."""
        return self._map(torch.Tensor.detach)

    def repeat(self, n: int) -> "State":
        """Each row n times, one after the other."""
        return self._map(lambda x: x.repeat_interleave(n, 0))


def ending(x: Tensor, last: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The last input of each row (B, D): of x (B, T, D), of its first `lengths` (B,) tokens, or, of none, `last`."""
    last = last.to(x.dtype)
    if lengths is None:
        return x[:, -1] if x.shape[1] else last
    before = torch.cat((last[:, None], x), 1)
    return before.gather(1, lengths.to(x.device)[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]


def beyond(lengths: Tensor, like: Tensor) -> Tensor:
    """Where rows of `like` (B, T, H, N) are padding, (B, T, 1, 1)."""
    places = torch.arange(like.shape[1], device=like.device)
    return (places[None, :] >= lengths.to(like.device)[:, None])[:, :, None, None]


class Borders:
    """Where rows that hold several documents (packed) go from one to the next: there nothing is remembered.

    starts (B, T) bool marks the first token of each document. `first`: the places of these tokens; `last`: those of
    tokens that another document follows; `begins`, `ends` (B, T, 1, 1): the same as masks; `anew` (B,): whether the
    row itself begins with one.
    """

    def __init__(self, starts: Tensor):
        follows = torch.cat((starts[:, 1:], torch.zeros_like(starts[:, :1])), 1)
        self.first, self.last = starts.nonzero(as_tuple=True), follows.nonzero(as_tuple=True)
        self.begins, self.ends, self.anew = starts[..., None, None], follows[..., None, None], starts[:, 0]


def by_document(inputs: tuple[Tensor, ...], memory: Tensor, borders: Borders) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-6 where each document begins without a memory; inputs: r, w, k, v and u.

    What a token reads is the memory before it, so that a document's last token leaves none. Its own part of what it
    reads, which no memory holds, is added again.
    """
    r, w, k, v, u = inputs
    start = memory.masked_fill(borders.anew[:, None, None, None], 0)
    w = w.expand(k.shape).masked_fill(borders.ends, FORGET)
    y, memory = wkv6(r, w, k.masked_fill(borders.ends, 0), v, u, start)
    r, k, v = (x[borders.last] for x in (r, k, v))  # (n, H, N)
    own = (r * u * k).sum(-1, keepdim=True) * v
    return y.index_put(borders.last, own.to(y.dtype), accumulate=True), memory


def channels(n_embd: int) -> Tensor:
    """0, 1, ... n_embd - 1 in fp32: what initial values are formulas of."""
    return torch.arange(n_embd, dtype=torch.float32)


def decays(time_decay: Tensor, time_faaaa: Tensor, rho0: float) -> None:
    """Write the initial decays and bonuses of RWKV-5 and RWKV-6; rho0 is 0 in the first layer and 1 in the last."""
    channel = channels(time_decay.numel())
    place = channel / (len(channel) - 1)
    time_decay.copy_((-6 + 5 * place ** (0.7 + 1.3 * rho0)).view_as(time_decay))
    time_faaaa.copy_((rho0 * (1 - place) + 0.1 * ((channel + 1) % 3 - 1)).view_as(time_faaaa))


class HeadNorm(nn.Module):
    """Scale and offset of heads that are each normalised on their own (group norm with a group a head)."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))


class GatedTimeMix(nn.Module):
    """The part of a block that remembers, as RWKV-5 and RWKV-6 have it.

    A family adds `time_faaaa` (H, N), the bonus, and `read(x, last, places)`: what receptance, key, value and gate read
    of x (B, T, D) and the input before it, without that at `places`; and decays, (H, N) or by token (B, T, H, N).
    """

    def __init__(self, config: RwkvConfig):
        super().__init__()
        D = config.n_embd
        self.head_size = config.head_size
        self.receptance, self.key, self.value, self.output, self.gate = (nn.Linear(D, D, bias=False) for _ in range(5))
        self.ln_x = HeadNorm(D)

    def forward(
        self,
        x: Tensor,
        first: None,
        last: Tensor,
        memory: Tensor,
        lengths: Tensor | None = None,
        borders: Borders | None = None,
    ) -> tuple[Tensor, None, Tensor, Tensor]:
        """x (B, T, D); first: nothing, here; last (B, D) and memory (B, H, N, N): the state.

        Returns what is added to the stream, nothing, and the state after the last token.
        """
        xr, xk, xv, xg, w = self.read(x, last, borders and borders.first)
        last = ending(x, last, lengths)
        r, k, v = through(self.receptance, xr), through(self.key, xk), through(self.value, xv)
        r, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in (r, k, v))
        if lengths is not None:  # what leaves the memory as it is
            padding = beyond(lengths, k)
            w, k = w.expand(k.shape).masked_fill(padding, -torch.inf), k.masked_fill(padding, 0)
        inputs = (r, w, k, v, self.time_faaaa)
        if borders is not None:
            y, memory = by_document(inputs, memory, borders)
        else:
            y, memory = (wkv5 if w.dim() == 2 else wkv6)(*inputs, memory)
        y = gate(y, through(self.gate, xg), self.ln_x.weight, self.ln_x.bias, HEAD_EPS)
        return through(self.output, y), first, last, memory


class GatedChannelMix(nn.Module):
    """The part of a block that works on one token and its predecessor alone, as RWKV-5 and RWKV-6 have it.

    A family adds `shares()`: how much of the token before key and receptance read, each (1, 1, D).
    """

    def __init__(self, config: RwkvConfig):
        super().__init__()
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)
        self.receptance = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(
        self, x: Tensor, last: Tensor, lengths: Tensor | None = None, borders: Borders | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, D) and the input before it; returns what is added to the stream, and the last input."""
        xk, xr = mix(x, last, self.shares(), borders and borders.first)
        value = through(self.value, squared_relu(through(self.key, xk)))
        return sift(through(self.receptance, xr), value), ending(x, last, lengths)
