"""Linear maps from the memory layer's keys and values to those of a layer above, in closed form.

``memory_adapter: "linear"`` lets a retrieval layer read W_k[k;v] and W_v[k;v] of what the memory
layer stored. The W that comes nearest to the layer's own keys and values is a ridge regression: a
start for training, and a measure of how much of a layer's memory the stored one holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RidgeError(ValueError):
    """The tokens cannot be fitted. The message says why and what to do."""


class RidgeAccumulator:
    """The sums that fix a linear map, over any number of tokens, so that none need be kept.

    Maps have no bias, as adapters have none. Scoring and fitting are apart: one accumulator's
    maps may be scored on another's tokens, for an R² of tokens that were not fitted.

    Attributes:
        num_tokens: tokens added so far.
        inputs: sum of x xᵀ, [inputs, inputs]. products: sum of x yᵀ, [inputs, targets].
        squares: sum of y², [targets], the diagonal of y yᵀ, which is all that R² needs.
        totals: sum of y, [targets]. All float64.
    """

    def __init__(self, num_inputs: int, num_targets: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.num_tokens = 0
        self.inputs, self.products = zeros(num_inputs, num_inputs), zeros(num_inputs, num_targets)
        self.squares, self.totals = zeros(num_targets), zeros(num_targets)

    @torch.no_grad()
    def add(self, stored: Tensor, targets: Tensor) -> None:
        """Add tokens; the order and the size of batches do not matter.

        Args:
            stored: [tokens, inputs], of any float type; for adapters [k;v], heads concatenated.
            targets: [tokens, targets]; several layers' keys and values may stand side by side.

        Raises:
            RidgeError: if the shapes do not fit each other or this accumulator.
        """
        wanted = [(stored.shape[0], self.inputs.shape[0]), (stored.shape[0], self.squares.shape[0])]
        if [tuple(stored.shape), tuple(targets.shape)] != wanted:
            raise RidgeError(f"got shapes {tuple(stored.shape)} and {tuple(targets.shape)}, need {wanted}")
        x, y = (tensor.to(self.inputs) for tensor in (stored, targets))
        self.num_tokens += x.shape[0]
        self.inputs += x.T @ x
        self.products += x.T @ y
        self.squares += y.square().sum(dim=0)
        self.totals += y.sum(dim=0)

    def fit(self, ridge: float) -> Tensor:
        """The maps W, [targets, inputs] float64, with the least |y − Wx|² + λ|W|² over all tokens.

        Args:
            ridge: λ in units of the mean of Σx² over inputs, so that it depends neither on the
                number of tokens nor on their scale; 0 for least squares.

        Raises:
            RidgeError: for a negative ridge, no tokens, or too few for a unique solution.
        """
        if not ridge >= 0:
            raise RidgeError(f"ridge = {ridge!r}: must be 0 or above")
        if self.num_tokens == 0:
            raise RidgeError("no tokens were added: there is nothing to fit")
        penalty = ridge * self.inputs.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(self.inputs + penalty * torch.eye(len(self.inputs)).to(self.inputs))
        if failed:
            raise RidgeError(
                f"{self.num_tokens} tokens do not determine maps of {len(self.inputs)} inputs with ridge = {ridge!r}: "
                "raise ridge or add tokens"
            )
        return torch.cholesky_solve(self.products, factor).T.contiguous()

    def r_squared(self, maps: Tensor, targets: slice = slice(None)) -> float:
        """1 − |y − Wx|² / |y − mean(y)|² over the tokens added here, pooled over ``targets``.

        Centred: keys have a large constant part, which would flatter a map that finds only that.
        May be negative on tokens that were not fitted.

        Args:
            maps: [targets, inputs], of all targets.
        """
        maps = maps.to(self.inputs)
        explained = 2 * (maps * self.products.T).sum(dim=1) - ((maps @ self.inputs) * maps).sum(dim=1)
        spread = self.squares - self.totals.square() / max(1, self.num_tokens)
        return float(1 - (self.squares - explained)[targets].sum() / spread[targets].sum())
