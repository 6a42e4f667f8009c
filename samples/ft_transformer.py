"""FT-Transformer (Gorishniy et al., 2021, arXiv 2106.11959): training, prediction and export to ONNX.

Each attribute is one token, `x * w + b` of a number and a row of a table for a category; a class token comes first and
the logits are read from it. Blocks normalise before attention and before the ReGLU feed-forward, except for the first,
which does not normalise before its attention.

We differ from the paper in two places. Numbers are standardised (long-tailed ones after `log(1 + x - low)`) inside the
model instead of mapped to quantiles beforehand: the model reads a table in the table's own units. And the training
hides attribute tokens at random, as PatchDropout (Liu et al., arXiv 2208.07220) does with patches: a network that never
had to do without an attribute guesses when a fix mutes it.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import atpatch_onnx as atp
from atpatch_onnx.discovery import Attribute
from atpatch_onnx.exporters import from_torch
from atpatch_onnx.running.threads import one_thread


@dataclass(frozen=True)
class Recipe:
    """Size and training of a model."""

    layers: int = 3
    width: int = 32
    heads: int = 4
    hidden: int = 48
    """Of the feed-forward, before its gate halves it."""

    epochs: int = 12
    batch: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    attention_dropout: float = 0.1
    dropout: float = 0.1
    """Of the feed-forward."""

    token_dropout: float = 0.15
    """Share of attribute tokens that are hidden from each row in training."""


class Tokens(nn.Module):
    """A table `[rows, features]` to tokens `[rows, 1 + features, width]`, the class token first.

    Args:
        attributes: What the columns are.
        rows: Training rows `[rows, features]`, for the scale of the numbers.
        logarithmic: Names of the numbers that are long-tailed.
        width: Of a token.
    """

    def __init__(
        self, attributes: Sequence[Attribute], rows: NDArray[np.float32], logarithmic: Sequence[str], width: int
    ) -> None:
        super().__init__()
        kinds = [attribute.kind == "categorical" for attribute in attributes]
        numeric = [column for column, categorical in enumerate(kinds) if not categorical]
        codes = [column for column, categorical in enumerate(kinds) if categorical]
        sizes = [len(attributes[column].values) for column in codes]
        low = torch.tensor([attributes[column].low for column in numeric])
        tailed = torch.tensor([attributes[column].name in logarithmic for column in numeric], dtype=torch.bool)
        self.low, self.tailed = nn.Buffer(low), nn.Buffer(tailed)
        self.numeric, self.codes = (nn.Buffer(torch.tensor(places, dtype=torch.int64)) for places in (numeric, codes))
        self.first = nn.Buffer(torch.tensor([0, *np.cumsum(sizes)[:-1]]))
        self.last = nn.Buffer(torch.tensor(sizes) - 1)
        self.order = nn.Buffer(torch.tensor(np.argsort([*numeric, *codes])))
        self.mean, self.scale = nn.Buffer(torch.zeros(len(numeric))), nn.Buffer(torch.ones(len(numeric)))
        seen = self._numbers(torch.from_numpy(rows))
        self.mean, self.scale = nn.Buffer(seen.mean(dim=0)), nn.Buffer(seen.std(dim=0).clamp(min=1e-6))

        def drawn(*shape: int) -> nn.Parameter:  # the paper's: uniform within 1 / sqrt(width)
            return nn.Parameter(torch.empty(shape).uniform_(-1, 1) / math.sqrt(width))

        self.classes, self.bias = drawn(1, 1, width), drawn(len(attributes), width)
        self.weight, self.categories = drawn(len(numeric), width), drawn(sum(sizes), width)

    def forward(self, table: Tensor) -> Tensor:
        """Tokens `[rows, 1 + features, width]`."""
        codes = table[:, self.codes].to(torch.int64) + self.first
        return self._joined(table, functional.embedding(codes, self.categories))

    def between(self, table: Tensor) -> Tensor:
        """The same tokens, and on the way from one category to the next a straight line: categories get gradients."""
        codes = table[:, self.codes]
        below = torch.minimum(codes.detach().to(torch.int64), self.last - 1)
        before, after = (functional.embedding(below + self.first + place, self.categories) for place in (0, 1))
        return self._joined(table, torch.lerp(before, after, (codes - below)[:, :, None]))

    def _joined(self, table: Tensor, categories: Tensor) -> Tensor:
        numbers = self._numbers(table)[:, :, None] * self.weight
        values = torch.cat([numbers, categories], dim=1)[:, self.order] + self.bias
        return torch.cat([self.classes.expand(table.shape[0], -1, -1), values], dim=1)

    def _numbers(self, table: Tensor) -> Tensor:
        numbers = table[:, self.numeric]
        numbers = torch.where(self.tailed, torch.log1p((numbers - self.low).clamp(min=0)), numbers)
        return (numbers - self.mean) / self.scale


class Attention(nn.Module):
    """Multi-head self-attention, written out; hidden tokens are seen by nobody."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """`[rows, tokens, width]` to the same; `hidden` bool `[rows, tokens]`."""

        def split(values: Tensor) -> Tensor:
            return values.reshape(*values.shape[:2], self.heads, -1).transpose(1, 2)

        query, key, value = split(self.query(tokens)), split(self.key(tokens)), split(self.value(tokens))
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        if hidden is not None:
            scores = scores.masked_fill(hidden[:, None, None, :], -torch.inf)
        attention = functional.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return self.out((attention @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each added to what came in."""

    def __init__(self, recipe: Recipe, *, first: bool) -> None:
        super().__init__()
        self.norm_1 = nn.Identity() if first else nn.LayerNorm(recipe.width)
        self.attention = Attention(recipe.width, recipe.heads, recipe.attention_dropout)
        self.norm_2 = nn.LayerNorm(recipe.width)
        self.up, self.down = nn.Linear(recipe.width, 2 * recipe.hidden), nn.Linear(recipe.hidden, recipe.width)
        self.dropout = nn.Dropout(recipe.dropout)

    def forward(self, tokens: Tensor, hidden: Tensor | None) -> Tensor:
        """`[rows, tokens, width]` to the same."""
        tokens = tokens + self.attention(self.norm_1(tokens), hidden)
        value, gate = self.up(self.norm_2(tokens)).chunk(2, dim=-1)
        return tokens + self.down(self.dropout(value * functional.relu(gate)))  # type: ignore[no-any-return]


class FTTransformer(nn.Module):
    """A table `[rows, features]` float32 to logits `[rows, 2]`.

    Args:
        tokens: What turns the table into tokens.
        recipe: The size.
    """

    def __init__(self, tokens: Tokens, recipe: Recipe) -> None:
        super().__init__()
        self.tokens = tokens
        self.layers = nn.ModuleList(Block(recipe, first=number == 0) for number in range(recipe.layers))
        self.norm, self.head = nn.LayerNorm(recipe.width), nn.Linear(recipe.width, 2)

    def forward(self, table: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Logits `[rows, 2]`; `hidden` bool `[rows, 1 + features]`: tokens that nobody sees."""
        return self.answer(self.tokens(table), hidden)

    def answer(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Logits `[rows, 2]` of tokens `[rows, 1 + features, width]`."""
        for layer in self.layers:
            tokens = layer(tokens, hidden)
        return self.head(functional.relu(self.norm(tokens[:, 0])))  # type: ignore[no-any-return]


class WithGradients(nn.Module):
    """The same logits `[rows, 2]`, with gradients with respect to categories as well (see `Tokens.between`)."""

    def __init__(self, model: FTTransformer) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, table: Tensor) -> Tensor:
        """Logits `[rows, 2]`."""
        return self.model.answer(self.model.tokens.between(table))


def build(
    attributes: Sequence[Attribute], rows: NDArray[np.float32], logarithmic: Sequence[str], recipe: Recipe, seed: int
) -> FTTransformer:
    """An untrained model; `rows` `[rows, features]` give the scale of the numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FTTransformer(Tokens(attributes, rows, logarithmic, recipe.width), recipe)


@one_thread()
def train(
    model: FTTransformer,
    rows: NDArray[np.float32],
    labels: NDArray[np.int64],
    recipe: Recipe,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FTTransformer:
    """Train on `rows` `[rows, features]` and `labels` `[rows]` with AdamW on a one-cycle schedule.

    The result depends on the seed only; the caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        table, targets = torch.from_numpy(rows), torch.from_numpy(labels)
        steps = max(1, len(rows) // recipe.batch)
        total = recipe.epochs * steps
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=total)
        model.train()
        for done in range(total):
            if done % steps == 0:
                order = torch.randperm(len(rows))
            chosen = order[done % steps * recipe.batch :][: recipe.batch]
            hidden = torch.rand(len(chosen), rows.shape[1] + 1) < recipe.token_dropout
            hidden[:, 0] = False  # the class token stays
            loss = functional.cross_entropy(model(table[chosen], hidden), targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress(done + 1, total)
    return model.eval()


@one_thread()
def predict(model: nn.Module, rows: NDArray[np.float32], *, batch_size: int = 1024) -> NDArray[np.float32]:
    """Logits `[rows, 2]`."""
    with torch.no_grad():
        parts = [model(torch.from_numpy(rows[at : at + batch_size])).numpy() for at in range(0, len(rows), batch_size)]
    return np.concatenate(parts)


def export_onnx(model: FTTransformer, features: int, path: str | os.PathLike[str]) -> None:
    """Write the model as `table` float32 `[batch, features]` to `logits` `[batch, 2]`, opset 18, in one file."""
    example = torch.zeros(2, features)  # a batch of one would be taken for a constant
    onnx = from_torch(
        model.eval(),
        (example,),
        opset=18,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["table"],
        output_names=["logits"],
    )
    for node in onnx.graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names folders of the machine that exports
    atp.save(onnx, path)
