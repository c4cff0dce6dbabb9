"""A card that is none: tensors of the processor that say they lie on one, and what PyTorch does not do with a card.

    python -m pytest -p tests.pretend -m "gpu and not large" tests/kernel tests/infer tests/train

Tests marked `gpu` then go all their way without a card, with the GPU's kernels as they are built for the host. Refused
are tensors of both places in one operation, gradients and generators of the wrong one, NumPy, and, while a graph is
recorded, whatever waits for the card. A graph that is recorded computes nothing yet; replayed, it does the same to the
same memory. What a card's own arithmetic is, and what its driver allows, nothing here knows.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rwkvpipe.base import compiler
from rwkvpipe.kernel import gpu
from rwkvpipe.model import language
from tests.kernel.conftest import FLAGS

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
DEVICE = torch._C.TensorBase.device
NAME = "NVIDIA H100, pretended"
SIZES = types.SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448, total_memory=85 << 30)
COPIES = ("copy_", "_to_copy", "_foreach_copy_", "lift_fresh")  # between a card and the processor, which waits for it
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")  # by numbers of the processor, which are copied
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "bincount", "item")
PLAIN = ("_has_compatible_shallow_copy_type",)
NARROW = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__")  # what autocast rounds for, on a card
WIDE = ("layer_norm", "log_softmax", "softmax", "cross_entropy", "logsumexp", "exp", "sum", "pow", "cumsum", "norm")

there: dict[int, StorageWeakRef] = {}  # the memory that lies on the card
asked: list[bool] = []  # the newest says whether what is made now lies there
going: list[bool] = []  # the same of the backward that runs now
recording: list["Graph"] = []


def on_card(x: Tensor) -> bool:
    """Whether a tensor is one of the card's."""
    with torch._C.DisableTorchFunction():
        return x.layout == torch.strided and x.untyped_storage()._cdata in there


def put(x: Tensor) -> Tensor:
    """The same tensor, on the card from now on."""
    with torch._C.DisableTorchFunction():
        memory = x.untyped_storage()
        there[memory._cdata] = StorageWeakRef(memory)
    if len(there) > 10_000:
        for gone in [key for key, weak in there.items() if weak.expired()]:
            del there[gone]
    return x


def tensors(*trees) -> list[Tensor]:
    """All that are in them."""
    return [x for x in tree_leaves(trees) if isinstance(x, Tensor)]


@contextmanager
def making(card: bool) -> Iterator[None]:
    """Inside, what is made lies on the card, or does not."""
    asked.append(card)
    try:
        yield
    finally:
        asked.pop()


def wait(what: str) -> None:
    """The processor waits for the card, or hands it memory of its own: no graph holds that."""
    if recording:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def moved(x: Tensor, card: bool) -> Tensor:
    """A copy in the other place."""
    wait("a copy between card and processor")
    with making(card):
        return torch.clone(x)


class Graph:
    """What was done while it was recorded, to be done again on the same memory."""

    def __init__(self):
        self.steps: list[Callable[[], object]] = []

    def replay(self) -> None:
        """Do it again."""
        for step in self.steps:
            step()

    def add(self, func, args: tuple, kwargs: dict):
        """Record an operation, whose results mean nothing yet."""
        places = list(zip(func._schema.arguments, args, strict=False))
        places += [(each, kwargs[each.name]) for each in func._schema.arguments if each.name in kwargs]
        written = tensors([x for each, x in places if each.alias_info is not None and each.alias_info.is_write])
        before, had = [x.clone() for x in written], {x.untyped_storage()._cdata for x in tensors(args, kwargs)}
        found = func(*args, **kwargs)
        made = [put(x) for x in tensors(found) if x.untyped_storage()._cdata not in had]
        for x in made:
            x.fill_(torch.nan if x.is_floating_point() else 0)
        for x, old in zip(written, before, strict=True):
            x.copy_(old)

        def again():
            with making(True):
                results = tensors(func(*args, **kwargs))
            for x, y in zip(made, results if made else (), strict=True):
                x.copy_(y)

        if made or written:
            self.steps.append(again)
        return found


class Recording:
    """`torch.cuda.graph`."""

    def __init__(self, graph: Graph, pool=None, stream=None, capture_error_mode="global"):
        self.graph = graph

    def __enter__(self):
        recording.append(self.graph)

    def __exit__(self, *error):
        recording.pop()


class Rules(TorchDispatchMode):
    """What operations take, and where their results lie."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        told = kwargs.get("device")
        if told is None or told.type != "cuda":
            return self.run(func, args, kwargs)
        with making(True):
            return self.run(func, args, kwargs | {"device": HOST})

    def run(self, func, args: tuple, kwargs: dict):
        given, name = tensors(args, kwargs), func._schema.name.split("::")[1]
        any_there = any(map(on_card, given))
        if any_there:
            self.check(name, args, given)
        card = asked[-1] if asked else any_there or (not given and bool(going) and going[-1])
        if recording and (card or any_there):
            return recording[-1].add(func, args, kwargs)
        found = func(*args, **kwargs)
        for x in tensors(found) if card else ():
            put(x)
        return found

    def check(self, name: str, args: tuple, given: list[Tensor]) -> None:
        here = [x for x in given if not on_card(x)]
        if name in INDEXED:
            index = [x for x in args[1] if x is not None]
            if here and not (on_card(args[0]) and all(x.dim() == 0 or any(x is each for each in index) for x in here)):
                raise RuntimeError(f"{name}: tensors of the card and of the processor")
            if here or any(x.dtype == torch.bool for x in index):
                wait(name)
        elif name in COPIES:
            if here:
                wait(name)
        elif name not in PLAIN and any(x.dim() for x in here):
            raise RuntimeError(f"Expected all tensors to be on the same device, cuda:0 and cpu: {name}")
        if name in WAITS:
            wait(name)


class Calls(TorchFunctionMode):
    """What Python calls: devices by name, copies from place to place, autocast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        given = tensors(args, kwargs)
        card = bool(given) and on_card(given[0])
        if name in ("to", "cuda", "cpu") and given:
            return self.to(name, args, kwargs)
        if name in ("numpy", "__array__") and card:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "tolist" and card:
            wait(name)
        if card and name in NARROW + WIDE and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda") if name in NARROW else torch.float32
            args, kwargs = tree_map(lambda x: _cast(x, dtype), (args, kwargs))
        told = kwargs.get("device")
        if (stream := kwargs.get("generator")) is not None:
            wanted = card if told is None else torch.device(told).type == "cuda"
            if getattr(stream, "card", False) != wanted:
                raise RuntimeError(f"{name}: a generator of the other device")
        if told is None or torch.device(told).type not in ("cuda", "cpu"):
            return func(*args, **kwargs)
        return self.made(func, name, args, kwargs)

    def made(self, func, name: str, args: tuple, kwargs: dict):
        """What is made where `device` says."""
        card, kwargs = torch.device(kwargs["device"]).type == "cuda", kwargs | {"device": HOST}
        if name in ("tensor", "as_tensor"):
            if isinstance(args[0], Tensor):
                return args[0].to(CARD if card else HOST, kwargs.get("dtype"))
            if card:
                wait("numbers of Python's")
        with making(card):
            found = func(*args, **kwargs)
        return tree_map(lambda x: put(x) if isinstance(x, Tensor) else x, found) if card else found

    def to(self, name: str, args: tuple, kwargs: dict) -> Tensor:
        """A tensor in a place, in a type."""
        x, rest, place = args[0], [], {"cuda": CARD, "cpu": HOST}.get(name)
        kwargs.pop("non_blocking", None)
        for word in (*args[1:], *(kwargs.pop(key) for key in ("device", "other") if key in kwargs)):
            if isinstance(word, Tensor):
                place, rest = word.device, [word.dtype]
            elif isinstance(word, torch.dtype):
                rest = [word]
            elif isinstance(word, str | torch.device) or (isinstance(word, int) and not isinstance(word, bool)):
                place = torch.device(word)
        x = torch.Tensor.to(x, *rest, **kwargs) if rest or kwargs else x
        if place is None or place.type == "meta":
            return x if place is None else torch.Tensor.to(x, place)
        return x if on_card(x) == (place.type == "cuda") else moved(x, place.type == "cuda")


def _cast(x, dtype: torch.dtype):
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x


class Generator(torch._C.Generator):
    """One of a device."""

    def __new__(cls, device="cpu"):
        found = super().__new__(cls)
        found.card = torch.device(device).type == "cuda"
        return found

    def __init__(self, device="cpu"):
        pass


def checked(run: Callable) -> Callable:
    """torch.autograd's `backward` or `grad`, where gradients are to lie where that is which they are of."""

    def backward(outputs, *args, **kwargs):
        given = args[0] if run is _backward and args else kwargs.get("grad_tensors")
        given = args[1] if run is _grad and len(args) > 1 else kwargs.get("grad_outputs", given)
        for x, pull in zip(tensors(outputs), tensors(given), strict=False):
            if pull.dim() and on_card(x) != on_card(pull):
                raise RuntimeError(f"invalid gradient: expected device {x.device} but got {pull.device}")
        going.append(on_card(tensors(outputs)[0]))
        try:
            return run(outputs, *args, **kwargs)
        finally:
            going.pop()

    return backward


_backward, _grad, _checkpoint = torch.autograd.backward, torch.autograd.grad, language.checkpoint
_started = gpu._started


def started(library, function: str, sizes, *given) -> int:
    """`gpu._started`: a kernel reads what lies on the card, and no graph begins it while it is recorded."""
    if not all(map(on_card, tensors(given))):
        return 700  # an illegal address
    if not recording:
        return _started(library, function, sizes, *given)
    recording[-1].steps.append(lambda: _started(library, function, sizes, *given))
    return 0


def checkpoint(block: Callable, *args, **kwargs):
    """What is computed again in a backward is what Python calls, too."""

    def again(*words):
        with torch._C._EnableTorchFunction(), Calls():
            return block(*words)

    return _checkpoint(again, *args, **kwargs)


class Stream:
    """One is as good as another."""

    cuda_stream = 0

    def __init__(self, device=None):
        self.device = CARD

    def wait_stream(self, other: "Stream") -> None:
        """What was begun is done already."""


def begin() -> None:
    """From now on there is a card."""
    Tensor.device = property(lambda x: CARD if on_card(x) else DEVICE.__get__(x))
    Tensor.is_cuda, Tensor.is_cpu = property(on_card), property(lambda x: not on_card(x))
    say = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
    }
    say |= {"get_device_capability": (9, 0), "get_device_properties": SIZES, "is_bf16_supported": True}
    say |= {"mem_get_info": (80 << 30, 85 << 30), "memory_reserved": 0, "memory_allocated": 0, "set_device": None}
    say |= {"max_memory_allocated": 1 << 20, "empty_cache": None, "reset_peak_memory_stats": None}
    for name, value in say.items():
        setattr(torch.cuda, name, lambda *given, value=value, **more: value)
    for name in ("stream", "device", "device_of"):
        setattr(torch.cuda, name, lambda *given: nullcontext())
    torch.cuda.Stream, torch.cuda.current_stream, torch.cuda.synchronize = Stream, Stream, lambda *device: wait("all")
    torch.cuda.CUDAGraph, torch.cuda.graph, torch.cuda.graph_pool_handle = Graph, Recording, lambda: (0, 1)
    torch.Generator, language.checkpoint = Generator, checkpoint
    torch.autograd.backward, torch.autograd.grad = checked(_backward), checked(_grad)
    name = f"gpu-on-host-{gpu.name(*FLAGS)}"
    gpu.compiled = lambda target: compiler.compiled(name, FLAGS, gpu.sources(), "the GPU's kernels for the host")
    gpu._started = started
    Calls().__enter__(), Rules().__enter__()


def pytest_configure(config) -> None:
    """There is a card before any test is looked at."""
    begin()
