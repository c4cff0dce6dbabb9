"""What an instruction does with numbers of all threads of a block: functions of arrays, by the instruction's name."""

from collections.abc import Callable

import numpy as np

TYPES = {
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits // 8}") for kind, bits in (("u", 16), ("u", 32), ("u", 64))},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (16, 32, 64)},
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (16, 32, 64)},
    "u8": np.dtype("u1"),
    "s8": np.dtype("i1"),
    "b8": np.dtype("u1"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
}
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
HIDDEN = 13  # bits of fp32 that tf32 does not have


def kind(name: tuple[str, ...]) -> np.dtype:
    """The type of an instruction's result: the last that is named."""
    return next(TYPES[part] for part in reversed(name) if part in TYPES)


def rounded(wide: np.ndarray, how: str) -> np.ndarray:
    """fp64 to fp32: rn to the nearest, rm down, rp up, rz to zero."""
    with np.errstate(over="ignore"):
        near = wide.astype(np.float32)
    if how == "rn":
        return near
    down, up = np.float32(-np.inf), np.float32(np.inf)
    lower = np.where(near > wide, np.nextafter(near, down), near)
    upper = np.where(near < wide, np.nextafter(near, up), near)
    return {"rm": lower, "rp": upper, "rz": np.where(wide < 0, upper, lower)}[how]


def _how(name: tuple[str, ...]) -> str:
    return next((part for part in name if part in ("rn", "rm", "rp", "rz")), "rn")


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whole numbers, to zero."""
    b = np.where(b == 0, 1, b)
    found = a // b
    return found + ((a % b != 0) & ((a < 0) != (b < 0))) if a.dtype.kind == "i" else found


def _shifted(a: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
    bits = a.dtype.itemsize * 8
    by = by.astype(a.dtype)
    far = by >= bits
    by = np.where(far, 0, by).astype(a.dtype)
    if left:
        return np.where(far, 0, a << by).astype(a.dtype)
    return np.where(far, a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else 0, a >> by).astype(a.dtype)


def _wide(name: tuple[str, ...]) -> np.dtype:
    of = kind(name)
    return np.dtype(f"{of.kind}{of.itemsize * 2}")


def _float(name: tuple[str, ...], value: Callable) -> Callable:
    how = _how(name)
    ftz, sat = "ftz" in name, "sat" in name

    def of(*words: np.ndarray) -> np.ndarray:
        found = rounded(value(*[word.astype(np.float64) for word in words]), how)
        if ftz:
            found = np.where(np.abs(found) < np.finfo(np.float32).tiny, np.float32(0), found)
        return np.where(found > 0, np.minimum(found, np.float32(1)), np.float32(0)) if sat else found

    return of


FLOATS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": lambda a, b, c: a * b + c,
    "mad": lambda a, b, c: a * b + c,
    "rcp": lambda a: 1.0 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "tanh": np.tanh,
}
WHOLES = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "div": _divided,
    "rem": lambda a, b: a - _divided(a, b) * b,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.bitwise_not,
    "shl": lambda a, by: _shifted(a, by, True),
    "shr": lambda a, by: _shifted(a, by, False),
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "cnot": lambda a: (a == 0).astype(a.dtype),
}


def _inserted(field: np.ndarray, into: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """bfi: the lowest `count` bits of a field, put into 32 bits from bit `first` on."""
    wide = (np.uint64(1) << np.minimum(count, 32).astype(np.uint64)) - np.uint64(1)
    mask = (wide << np.minimum(first, 32).astype(np.uint64)).astype(np.uint32)
    return (into & ~mask) | ((field.astype(np.uint64) << first.astype(np.uint64)).astype(np.uint32) & mask)


def _permuted(a: np.ndarray, b: np.ndarray, how: np.ndarray) -> np.ndarray:
    """prmt: four of the eight bytes of b and a, each by four bits; the highest of them has its sign repeated."""
    bytes_ = [(word >> np.uint32(8 * n)) & np.uint32(255) for word in (a, b) for n in range(4)]
    found = np.zeros_like(a)
    for n in range(4):
        which = (how >> np.uint32(4 * n)) & np.uint32(15)
        taken = np.choose((which & np.uint32(7)).astype(np.int64), bytes_).astype(np.uint32)
        taken = np.where(which & np.uint32(8), np.where(taken & np.uint32(128), np.uint32(255), np.uint32(0)), taken)
        found = found | taken << np.uint32(8 * n)
    return found


LOGIC = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not, "mov": np.copy}


def converted(name: tuple[str, ...], x: np.ndarray, low: np.ndarray | None = None) -> np.ndarray:
    """cvt: to the first type named, of the second; of two numbers `low` is what becomes the lower half."""
    to = next(part for part in name if part in TYPES or part in NARROW)
    if to in NARROW and ("rn" in name or "rna" in name):
        return NARROW[to](x) if low is None else NARROW[to](x, low)
    if to not in TYPES:
        raise ValueError(f"PTX that is not known: {'.'.join(name)}")
    kind_ = TYPES[to]
    if x.dtype.kind != "f" or kind_.kind != "f":
        if x.dtype.kind == "f":
            whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[
                next(part for part in name if part.endswith("i") and part.startswith("r"))
            ](x.astype(np.float64))
            limits = np.iinfo(kind_)
            return np.clip(np.nan_to_num(whole), limits.min, limits.max).astype(kind_)
        return x.astype(kind_)
    for part, function in (("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc)):
        if part in name:
            x = function(x)
    if "sat" in name:
        x = np.where(x > 0, np.minimum(x, 1), 0)
    return x.astype(kind_)


def tf32(x: np.ndarray) -> np.ndarray:
    """The nearest number of eleven bits, half away from zero, as bits."""
    bits = x.view(np.uint32)
    near = (bits + np.uint32(1 << (HIDDEN - 1))) & ~np.uint32((1 << HIDDEN) - 1)
    return np.where(np.isnan(x.view(np.float32)), np.uint32(0x7FFFFFFF), near)


def bf16(x: np.ndarray) -> np.ndarray:
    """The nearest number of eight bits, half to even, as 16 bits."""
    bits = x.view(np.uint32)
    near = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), near).astype(np.uint16)


def _two(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return bf16(high).astype(np.uint32) << np.uint32(16) | bf16(low)


NARROW = {"tf32": tf32, "bf16": bf16, "bf16x2": _two}


def compare(name: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """setp: whether it holds; for floats, those that end in u hold for what is no number, too."""
    how = name[1]
    if a.dtype.kind != "f":
        return COMPARE[how](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if how in ("num", "nan"):
        return nan if how == "nan" else ~nan
    if how.endswith("u") and how[:-1] in COMPARE:
        return COMPARE[how[:-1]](a, b) | nan
    return COMPARE[how](a, b) & ~nan


def plain(name: tuple[str, ...]) -> tuple[Callable, np.dtype, np.dtype]:
    """What an instruction of arithmetic does, the type of what it takes, and of what it gives.

    Raises ValueError for one that is not known.
    """
    what, of = name[0], kind(name)
    if of.kind == "b" and what in LOGIC:
        return LOGIC[what], of, of
    if of.kind == "f" and what in FLOATS:
        return _float(name, FLOATS[what]), of, of
    if of.kind == "f" and what in ("min", "max"):
        pick = (np.minimum if "NaN" in name else np.fmin) if what == "min" else np.maximum if "NaN" in name else np.fmax
        return pick, of, of
    if of.kind == "f" and what in ("neg", "abs"):
        return (np.negative if what == "neg" else np.abs), of, of
    if of.kind == "f" and what == "copysign":  # the sign of the first
        return lambda a, b: np.copysign(b, a), of, of
    if what in ("mul", "mad") and "wide" in name:
        to = _wide(name)
        return lambda a, b, *c: a.astype(to) * b.astype(to) + (c[0] if c else to.type(0)), of, to
    if what == "mul" and "hi" in name:
        to, bits = _wide(name) if of.itemsize < 8 else None, of.itemsize * 8
        if to is None:
            return lambda a, b: _high(a, b), of, of
        return lambda a, b: (a.astype(to) * b.astype(to) >> to.type(bits)).astype(of), of, of
    if what in ("bfi", "prmt") and of.itemsize == 4:
        return (_inserted if what == "bfi" else _permuted), np.dtype("u4"), of
    if what in WHOLES:
        return WHOLES[what], of, np.dtype(np.uint32) if what == "popc" else of
    raise ValueError(f"PTX that is not known: {'.'.join(name)}")


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper 64 bits of products of 64."""
    found = [(int(x) * int(y)) >> 64 for x, y in zip(*np.broadcast_arrays(a, b), strict=True)]
    return np.array([x & (1 << 64) - 1 for x in found], np.uint64).view(a.dtype)


def _places() -> tuple[np.ndarray, ...]:
    """Of m16n8k8 with factors of tf32: rows and columns of what each lane holds of the first, the second, the sums."""
    lane = np.arange(32)
    group, place = lane // 4, lane % 4
    first = [(group + 8 * (n % 2), place + 4 * (n // 2)) for n in range(4)]
    second = [(place + 4 * n, group) for n in range(2)]
    sums = [(group + 8 * (n // 2), 2 * place + n % 2) for n in range(4)]
    return tuple(np.array(each) for each in (first, second, sums))


FIRST, SECOND, SUMS = _places()


def matrices(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """mma.m16n8k8 of all warps: numbers of each thread (threads,); of a and b tensor cores see nineteen bits."""
    warps = len(c[0]) // 32

    def see(x: np.ndarray) -> np.ndarray:
        return (x.view(np.uint32) & ~np.uint32((1 << HIDDEN) - 1)).view(np.float32).reshape(warps, 32)

    first, second, sums = np.empty((warps, 16, 8)), np.empty((warps, 8, 8)), np.empty((warps, 16, 8))
    for n, x in enumerate(a):
        first[:, FIRST[n][0], FIRST[n][1]] = see(x)
    for n, x in enumerate(b):
        second[:, SECOND[n][0], SECOND[n][1]] = see(x)
    for n, x in enumerate(c):
        sums[:, SUMS[n][0], SUMS[n][1]] = x.view(np.float32).reshape(warps, 32)
    found = (first @ second + sums).astype(np.float32)
    return [found[:, SUMS[n][0], SUMS[n][1]].ravel() for n in range(4)]
