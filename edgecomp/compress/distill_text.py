"""Distillation of language models on whole sequences: given text, or text that a model writes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgecomp import registry
from edgecomp.compress.distill_losses import logit_loss, reverse_loss
from edgecomp.compress.train import Training, check, first_output, trained
from edgecomp.errors import DataError, ModelError
from edgecomp.spec import Candidate, Data


@dataclass(frozen=True)
class DistillText(Training):
    """Train a causal language model as a student of the float original, or of the `teacher` named.

    Inputs are token numbers [N, L] int64; the model gives logits [N, L, V] of each next token. A share of
    the batches, `written` (0 to 1), is text that a model goes on with after the first `prompt` tokens of the
    data: `writer` student gives on-policy distillation (Agarwal et al. 2024, GKD; Gu et al. 2024), teacher
    gives sequence-level distillation (Kim and Rush 2016). On every sequence the loss is, over the positions
    after the prompt, `divergence` of the next-token distributions: forward KL(teacher || student), reverse
    KL(student || teacher), or the Jensen-Shannon divergence of both, at `temperature`. Text is sampled at
    `sampling_temperature`, and no gradient goes through the sampling. Needs no labels.
    """

    divergence: Literal["forward", "reverse", "jensen-shannon"] = "forward"
    temperature: float = 1.0
    written: float = 0.5
    writer: Literal["student", "teacher"] = "student"
    prompt: int = 8
    sampling_temperature: float = 1.0
    teacher: str | None = None
    validation: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("forward", "reverse", "jensen-shannon")
        check("divergence", self.divergence, self.divergence in known, ", ".join(known))
        check("writer", self.writer, self.writer in ("student", "teacher"), "student or teacher")
        check("written", self.written, 0 <= self.written <= 1, "a share from 0 to 1")
        check("prompt", self.prompt, self.prompt >= 1, "1 token or more")
        check("temperature", self.temperature, self.temperature > 0, "a positive number")
        check(
            "sampling_temperature", self.sampling_temperature, self.sampling_temperature > 0, "more than zero"
        )

    def __call__(self, candidate: Candidate, data: Data) -> Candidate:
        """Raises ModelError without a teacher, DataError when the data holds no token numbers."""
        teacher = self._teacher(candidate)

        def objective(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor | None) -> Tensor:
            tokens = self._text(module, teacher, inputs[0])
            with torch.no_grad():
                wanted = first_output(teacher, (tokens, *inputs[1:]))
            found = first_output(module, (tokens, *inputs[1:]))
            after = slice(self.prompt - 1, -1)
            return self._divergence(found[:, after], wanted[:, after])

        return trained(candidate, data, self, lambda module: (objective, None), "distill-text")

    def _teacher(self, candidate: Candidate) -> Any:
        if self.teacher is not None:
            return registry.load("models", "load")(self.teacher).eval()
        if candidate.original is None:
            raise ModelError(
                "step 'distill-text' needs a teacher, and the candidate carries no float original; name one "
                "with teacher"
            )
        return candidate.original.eval()

    def _text(self, student: nn.Module, teacher: nn.Module, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point() or tokens.ndim != 2 or tokens.shape[1] <= self.prompt:
            raise DataError(
                f"step 'distill-text' needs token numbers [N, L] with L above prompt ({self.prompt}); the "
                f"data gives {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if float(torch.rand(())) >= self.written:
            return tokens
        writer = student if self.writer == "student" else teacher
        return written(writer, tokens, self.prompt, self.sampling_temperature)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.divergence == "forward":
            return logit_loss(student, teacher, self.temperature)
        if self.divergence == "reverse":
            return reverse_loss(student, teacher, self.temperature)
        return jensen_shannon_loss(student, teacher, self.temperature)


def jensen_shannon_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * mean over positions of (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; at most T^2 ln 2."""
    vocabulary = student.shape[-1]
    q = (student.reshape(-1, vocabulary) / temperature).log_softmax(dim=-1)
    p = (teacher.reshape(-1, vocabulary) / temperature).log_softmax(dim=-1)
    middle = torch.logsumexp(torch.stack([p, q]), dim=0) - torch.log(torch.tensor(2.0))
    spread = (p.exp() * (p - middle)).sum(dim=-1) + (q.exp() * (q - middle)).sum(dim=-1)
    return 0.5 * spread.mean() * temperature**2


@torch.no_grad()
def written(model: nn.Module, tokens: Tensor, prompt: int, temperature: float) -> Tensor:
    """The first `prompt` tokens of each row of `tokens` [N, L], and L - prompt that the model samples.

    The model is causal, so that what stands after a position does not matter; shapes stay as they are.
    """
    was_training = model.training
    model.eval()
    result = tokens.clone()
    for at in range(prompt, tokens.shape[1]):
        logits = first_output(model, (result,))[:, at - 1] / temperature
        result[:, at] = torch.multinomial(logits.float().softmax(dim=-1), 1)[:, 0]
    model.train(was_training)
    return result
