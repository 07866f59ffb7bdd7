"""Matching what happens inside: outputs of layers of the student and of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgecomp.compress.distill_losses import attention_loss, feature_loss, relation_loss
from edgecomp.compress.train import first_output
from edgecomp.errors import RecipeError

Match = Literal["feature", "attention", "relation"]
_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "feature": feature_loss,
    "attention": attention_loss,
    "relation": relation_loss,
}


def pairs_of(layers: tuple[str, ...]) -> list[tuple[str, str]]:
    """`student=teacher`, or one name for both, as pairs of dotted module names."""
    pairs = []
    for each in layers:
        student, _, teacher = each.partition("=")
        pairs.append((student.strip(), (teacher or student).strip()))
    return pairs


class Watcher:
    """Keeps the last output of named layers, while its context is open."""

    def __init__(self, module: nn.Module, names: list[str], who: str) -> None:
        known = dict(module.named_modules())
        for name in names:
            if name not in known:
                some = ", ".join([n for n in known if n][:12])
                raise RecipeError(f"layer {name!r} is no part of the {who}; layers are {some} ...")
        self._layers = {n: known[n] for n in names}
        self.seen: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [layer.register_forward_hook(self._keeper(n)) for n, layer in self._layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            self.seen[name] = output[0] if isinstance(output, tuple | list) else output

        return keep


class LayerMatch(nn.Module):
    """The mean loss over pairs of layers, with a learned 1x1 projection where widths differ (FitNets).

    Only features are projected; attention maps and relations compare any widths.
    """

    def __init__(
        self,
        match: Match,
        pairs: list[tuple[str, str]],
        student: nn.Module,
        teacher: nn.Module,
        example: tuple[Tensor, ...],
    ) -> None:
        super().__init__()
        self.match, self.pairs = match, pairs
        self.student = Watcher(student, [s for s, _ in pairs], "student")
        self.teacher = Watcher(teacher, [t for _, t in pairs], "teacher")
        with torch.no_grad(), self.student.watching(), self.teacher.watching():
            first_output(student, example)
            first_output(teacher, example)
        self.projections = nn.ModuleList([self._projection(s, t) for s, t in pairs])

    def _projection(self, student: str, teacher: str) -> nn.Module:
        s, t = self.student.seen[student], self.teacher.seen[teacher]
        if self.match != "feature" or s.shape == t.shape:
            return nn.Identity()
        if s.ndim == 4:
            return nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False)
        return nn.Linear(s.shape[-1], t.shape[-1], bias=False)

    def forward(self) -> Tensor:
        """The loss of what both models computed last."""
        total = torch.zeros(())
        for (student, teacher), project in zip(self.pairs, self.projections, strict=True):
            found = project(self.student.seen[student])
            total = total + _LOSSES[self.match](found, self.teacher.seen[teacher].detach())
        return total / len(self.pairs)
