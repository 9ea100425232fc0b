"""Questions after a passage, read by a window and, in chosen layers, from memory.

What is computed is section 3.3 of the paper with ``joint`` fusion: one softmax over memory and
window, memory at position 0 and un-rotated, the window's first token at 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memlong_vllm.probe.backbone import Backbone, LayerPassage
from memlong_vllm.probe.trials import Question


@dataclass(frozen=True)
class Memory:
    """What a layer reads: un-rotated keys and values [kv_heads, tokens, head_dim]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Answers:
    """How each question's answer was predicted, [questions] float64 each.

    Attributes:
        log_probability: of its digits among numbers of their length, nats a digit; ``-ln 10`` is a
            guess. Among all tokens, most of what memory changes would be how likely *any* number
            is, which says nothing of copying.
        likelihood: the same among all tokens.
        accuracy: the share of its tokens that are the most probable numbers; 0.1 is a guess where
            tokens are single digits.
    """

    log_probability: Tensor
    likelihood: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class Context:
    """What of a passage a question's window may reach, by layer: rotated keys, and values,
    [kv_heads, tokens, head_dim] each; the last of the tokens stands before position ``start``."""

    start: int
    layers: tuple[tuple[Tensor, Tensor], ...]


def own_memory(passage: LayerPassage, chunk_ids: Sequence[int], chunk_size: int) -> Memory:
    """A layer's own keys and values of the passage's ``chunk_ids``, copied."""
    rows = torch.cat([torch.arange(c * chunk_size, (c + 1) * chunk_size) for c in chunk_ids])
    rows = rows.to(passage.values.device)
    return Memory(passage.raw_keys[:, rows], passage.values[:, rows])


def window_context(passage: Sequence[LayerPassage], start: int, window: int) -> Context:
    """The last ``window - 1`` tokens before ``start``, copied, so that the passage can be freed."""
    rows = slice(max(0, start - window + 1), start)
    return Context(start, tuple((p.keys[:, rows].clone(), p.values[:, rows].clone()) for p in passage))


class QuestionReader:
    """Runs a batch of questions, each by itself, after the first ``context.start`` tokens of a passage.

    Args:
        token_ids: of each question, one segment.
        window: W. origin: what p(t) counts from: max(0, b + S − W) − 1.
        unread: [questions, memory tokens] of bool: tokens of the memories that a question does
            not read; None: each reads all.
    """

    def __init__(
        self,
        backbone: Backbone,
        context: Context,
        token_ids: Sequence[Sequence[int]],
        window: int,
        origin: int,
        unread: Tensor | None = None,
    ) -> None:
        self.backbone, self.context, self.origin, self.unread = backbone, context, origin, unread
        longest, device = max(map(len, token_ids)), backbone.device
        # Padding follows the question, so causal attention never sees it.
        padded = [[*ids, *[0] * (longest - len(ids))] for ids in token_ids]
        self.token_ids = torch.tensor(padded, device=device)
        self.positions = torch.arange(context.start, context.start + longest, device=device)
        first = context.start - context.layers[0][0].shape[1]
        distance = self.positions[:, None] - torch.arange(first, context.start + longest, device=device)
        self.out_of_window = (distance < 0) | (distance >= window)

    @torch.inference_mode()
    def read(
        self, memories: Mapping[int, Memory], before: Sequence[Tensor] | None = None, first_layer: int = 0
    ) -> list[Tensor]:
        """Hidden states [questions, tokens, hidden] entering each layer, and the last one's output.

        Args:
            memories: by layer; the others attend to the window alone.
            before: a former result whose memories below ``first_layer`` were the same: only the
                layers from there on are computed.
        """
        states = list(before[: first_layer + 1]) if before is not None else [self.backbone.embed(self.token_ids)]
        for layer in range(first_layer if before is not None else 0, self.backbone.num_layers):
            states.append(self._layer(layer, states[-1], memories.get(layer)))
        return states

    def _layer(self, layer: int, hidden: Tensor, memory: Memory | None) -> Tensor:
        query, keys, values = self.backbone.project(layer, hidden)
        past_keys, past_values = self.context.layers[layer]
        rotated, keys = (self.backbone.rotate(states, self.positions) for states in (query, keys))
        local = [self._shared(rotated, past_keys.transpose(-1, -2)), self._own(rotated, keys.transpose(-1, -2))]
        scores = [torch.cat(local, dim=-1).masked_fill(self.out_of_window, float("-inf"))]
        sizes = [past_keys.shape[1], keys.shape[-2]]
        if memory is not None:
            placed = self.backbone.rotate(query, self.positions - self.origin)
            scores.append(self._shared(placed, memory.keys.transpose(-1, -2)))
            if self.unread is not None:
                scores[1] = scores[1].masked_fill(self.unread[:, None, None], float("-inf"))
            sizes.append(memory.keys.shape[1])
        weights = self._softmax(torch.cat(scores, dim=-1)).split(sizes, dim=-1)
        attended = self._shared(weights[0], past_values) + self._own(weights[1], values)
        if memory is not None:
            attended = attended + self._shared(weights[2], memory.values)
        return self.backbone.finish(layer, hidden, attended)

    def _softmax(self, scores: Tensor) -> Tensor:
        return (scores.float() * self.backbone.head_dim**-0.5).softmax(dim=-1).to(self.backbone.dtype)

    def _shared(self, left: Tensor, right: Tensor) -> Tensor:
        """Of [questions, heads, tokens, x] and [kv_heads, x, y] that all questions share."""
        questions, tokens = left.shape[0], left.shape[2]
        rows = left.unflatten(1, (self.backbone.num_kv_heads, -1)).transpose(0, 1).flatten(1, 3)
        product = (rows @ right).unflatten(1, (questions, -1, tokens))
        return product.transpose(0, 1).flatten(1, 2)

    def _own(self, left: Tensor, right: Tensor) -> Tensor:
        """Of [questions, heads, tokens, x] and each question's own [questions, kv_heads, x, y]."""
        rows = left.unflatten(1, (self.backbone.num_kv_heads, -1)).flatten(2, 3)
        return (rows @ right).unflatten(2, (-1, left.shape[2])).flatten(1, 2)


@torch.inference_mode()
def score_answers(backbone: Backbone, output: Tensor, questions: Sequence[Question]) -> Answers:
    """How the answers are predicted from the last layer's output [questions, tokens, hidden]."""
    rows = []
    for row, question in enumerate(questions):
        predicted = backbone.log_probabilities(output[row, [i - 1 for i in question.answer]])
        sums = torch.zeros(3, dtype=torch.float64)
        for scores, index, rivals in zip(predicted, question.answer, question.rivals, strict=True):
            wanted = question.token_ids[index]
            numbers = scores[list(rivals)].log_softmax(dim=0)
            place = rivals.index(wanted)
            right = numbers.argmax() == place
            sums += torch.tensor([numbers[place].item(), scores[wanted].item(), right.item()])
        digits, tokens = len(question.number), len(question.answer)
        rows.append(sums / torch.tensor([digits, digits, tokens]))
    return Answers(*torch.stack(rows).unbind(dim=1))
