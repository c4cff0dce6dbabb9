"""A language model that reads through all layers in one native call where its matrices lie in panels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rwkvpipe.kernel import build
from rwkvpipe.kernel.read import Form, read
from rwkvpipe.model.language import LanguageModel
from rwkvpipe.model.layers import State


class Panelled(LanguageModel):
    """What families share that have a native function for it; they add its form, and a block's vectors in its order."""

    FORM: Form
    vectors: Callable[[nn.Module], list[Tensor | None]]

    def features(
        self,
        ids: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The stream (B, T, n_embd) before the head, and the state after the ids; natively where matrices lie in
        panels, and nobody asks for gradients."""
        packed = getattr(self, "packed", {})
        if "head" not in packed or torch.is_grad_enabled() or starts is not None or not ids.numel():
            return super().features(ids, state, lengths, starts)
        x, after = self.emb(ids), self.start(len(ids)) if state is None else state.copy()
        if build.native(x, *after.att_x, *after.wkv, *after.ffn_x) is None:
            return super().features(ids, state, lengths, starts)
        vectors = [self.vectors(block) for block in self.blocks]
        names = [[f"blocks.{n}.{name}" if name else "" for name in self.FORM.matrices] for n in range(len(self.blocks))]
        matrices = [[packed.get(name) for name in each] for each in names]
        sizes = [getattr(self.config, name) if name else 0 for name in self.FORM.sizes]
        x = self.blocks[0].ln0(x)
        read(self.FORM.function, sizes, x, (vectors, matrices), (after.att_x, after.wkv, after.ffn_x), lengths)
        return x, after
