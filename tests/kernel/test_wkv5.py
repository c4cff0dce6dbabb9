"""The RWKV-5 operator beside the one of RWKV-6."""

from rwkvpipe.kernel.wkv5 import wkv5
from rwkvpipe.kernel.wkv6 import wkv6
from tests.kernel.operators import error, made


def test_it_is_the_operator_of_rwkv6_with_one_decay_for_all_tokens():
    r, w, k, v, u, S = (x.double() for x in made("wkv5", 2, 19, 2, 8))
    for found, wanted in zip(wkv5(r, w, k, v, u, S), wkv6(r, w.expand_as(r), k, v, u, S), strict=True):
        assert error(found, wanted) < 1e-13
