"""Attention weights drawn with the real tokens: a self-contained HTML page, or a PNG.

The page shows every head of every layer; one is enlarged, with what each token attends to. The picture shows the mean
of all heads with the tokens on its axes, a grid of heads by layer, and, for a chosen token, what it attends to. For an
encoder-decoder the weights from targets to sources are the alignment (Bahdanau et al., 2014, figure 3).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attntune.errors import ReportError
from attntune.report.attention_page import PAGE

#: Outputs of an entry that hold attention weights, one a layer, and what they are called.
KINDS = {"attention": "self-attention", "cross_attention": "alignment"}

#: Tokens beyond which a page gets slow and a picture's labels unreadable.
MAX_TOKENS = 256


@dataclass(frozen=True)
class AttentionMap:
    """What one sequence attended to."""

    kind: str
    """A key of :data:`KINDS`."""
    weights: np.ndarray
    """(layers, heads, queries, keys); rows sum to 1."""
    queries: tuple[str, ...]
    """Tokens that attend."""
    keys: tuple[str, ...]
    """Tokens that are attended to."""

    def __post_init__(self) -> None:
        shape = (len(self.queries), len(self.keys))
        if self.kind not in KINDS or self.weights.ndim != 4 or self.weights.shape[2:] != shape:
            raise ReportError(
                f"expected weights (layers, heads, {shape[0]}, {shape[1]}) of a kind in {sorted(KINDS)}, "
                f"got {self.weights.shape} of {self.kind!r}"
            )
        if max(shape) > MAX_TOKENS:
            raise ReportError(f"expected at most {MAX_TOKENS} tokens in an attention map, got {max(shape)}")

    @property
    def mean(self) -> np.ndarray:
        """Over layers and heads: (queries, keys)."""
        return np.asarray(self.weights.mean(axis=(0, 1)))

    def find(self, token: str) -> int:
        """The query that is ``token``, ignoring case and the marks of word pieces.

        Raises:
            ReportError: naming the tokens there are.
        """
        plain = [_plain(query) for query in self.queries]
        if _plain(token) not in plain:
            raise ReportError(f"expected one of the tokens {list(self.queries)}, got {token!r}")
        return plain.index(_plain(token))

    def top(self, query: int, count: int = 5, *, skip_special: bool = True) -> list[tuple[str, float, tuple[int, int]]]:
        """What ``query`` attends to most: token, mean weight over all heads, and the (layer, head) that does so most.

        Without special tokens such as ``[SEP]``, where heads with nothing to find rest, and without itself.
        """
        row = self.mean[query]
        found = []
        for at in np.argsort(-row, kind="stable"):
            itself = self.kind == "attention" and at == query
            if skip_special and (itself or _is_special(self.keys[at])):
                continue
            heads = self.weights[:, :, query, at]
            layer, head = np.unravel_index(int(heads.argmax()), heads.shape)
            found.append((self.keys[at], float(row[at]), (int(layer), int(head))))
        return found[:count]


def attention_maps(
    outputs: Mapping[str, np.ndarray],
    row: int,
    tokens: Mapping[str, Sequence[str]],
) -> list[AttentionMap]:
    """The maps of one sequence of a batch.

    Args:
        outputs: of an entry, by name; ``attention.0``… and ``cross_attention.0``… (batch, heads, queries, keys) are
            used.
        row: of the batch.
        tokens: ``"attention"`` and ``"cross_attention"``: tokens of the sequence that attends, without padding; and
            ``"source"``: of the one that ``cross_attention`` attends to.

    Raises:
        ReportError: there are no weights among the outputs.
    """
    found = []
    for kind in KINDS:
        layers = [outputs[name] for name in _numbered(outputs, kind)]
        if not layers:
            continue
        queries = tuple(tokens[kind])
        keys = tuple(tokens["source" if kind == "cross_attention" else kind])
        weights = np.stack([layer[row] for layer in layers])[:, :, : len(queries), : len(keys)]
        found.append(AttentionMap(kind, weights.astype(np.float32), queries, keys))
    if not found:
        raise ReportError(f"expected attention weights among the outputs, got {sorted(outputs)}")
    return found


def _numbered(outputs: Mapping[str, np.ndarray], kind: str) -> list[str]:
    names = [name for name in outputs if name.rpartition(".")[0] == kind]
    return sorted(names, key=lambda name: int(name.rpartition(".")[2]))


def write(path: str | Path, maps: Sequence[AttentionMap], *, title: str = "", query: str | None = None) -> Path:
    """Draw ``maps`` to ``path``, by its suffix ``.html`` or ``.png``.

    Args:
        path: of the file.
        maps: all of them on one page; a picture has room for one.
        title: shown above.
        query: token whose attention is shown first.

    Raises:
        ReportError: the suffix is another, ``query`` is not a token, a picture is asked for several maps, the file
            cannot be written, or jinja2 (a page) or matplotlib (a picture) is missing.
    """
    path = Path(path)
    if path.suffix not in (".html", ".png"):
        raise ReportError(f"expected a file .html or .png for attention maps, got {path.name!r}")
    if path.suffix == ".png" and len(maps) != 1:
        raise ReportError(f"expected one attention map for a .png, got {len(maps)}; write a .html instead")
    at = [maps[0].find(query)] if query else []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".html":
            path.write_text(page(maps, title=title, query=at[0] if at else None), encoding="utf-8")
        else:
            _draw(maps[0], path, title, at[0] if at else None)
    except OSError as error:
        raise ReportError(f"cannot write {path}: {error}") from error
    return path


def page(maps: Sequence[AttentionMap], *, title: str = "", query: int | None = None) -> str:
    """A page of its own, scripts and data included: weights are stored in steps of 1/255."""
    try:
        from jinja2 import Environment
    except ImportError:
        raise ReportError("attention pages need jinja2: pip install 'attntune[report]'") from None
    sections: list[dict[str, Any]] = []
    for found in maps:
        layers, heads = found.weights.shape[:2]
        steps = np.rint(np.clip(found.weights, 0.0, 1.0) * 255).astype(np.uint8)
        sections.append(
            {
                "name": KINDS[found.kind],
                "layers": layers,
                "heads": heads,
                "queries": [_plain_mark(token) for token in found.queries],
                "keys": [_plain_mark(token) for token in found.keys],
                "special": [_is_special(token) for token in found.keys],
                "selected": query if query is not None and not sections else 0,
                "weights": base64.b64encode(steps.tobytes()).decode("ascii"),
            }
        )
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    # A closing tag inside a script element would end it, whatever the string it stands in.
    data = json.dumps(sections).replace("<", "\\u003c")
    return str(template.render(title=title or "Attention", sections=sections, data=data))


def _draw(found: AttentionMap, path: Path, title: str, query: int | None) -> None:
    from attntune.report.plots import picture

    layers, heads = found.weights.shape[:2]
    single = layers * heads == 1
    queries = [_plain_mark(token) for token in found.queries]
    side = min(max(3.2, 0.27 * max(len(queries), len(found.keys)) + 1.2), 14.0)
    grid_width = 0.0 if single else max(3.2, 0.55 * heads)
    below = 0.0 if query is None or single else 0.26 * layers + 1.5
    with picture(path, (side + grid_width, side + below)) as figure:
        outer = figure.add_gridspec(2 if below else 1, 1, height_ratios=(side, below) if below else None)
        upper = outer[0].subgridspec(1, 1 if single else 2, width_ratios=None if single else (side, grid_width))
        axes = figure.add_subplot(upper[0])
        _labelled(axes, found.mean, queries, found.keys)
        axes.set_title(KINDS[found.kind] if single else f"{KINDS[found.kind]}, mean of all heads")
        if not single:
            cells = upper[1].subgridspec(layers, heads, wspace=0.05, hspace=0.05).subplots(squeeze=False)
            _grid(cells, found.weights)
        if below and query is not None:
            axes = figure.add_subplot(outer[1])
            rows = found.weights[:, :, query].mean(axis=1)
            _labelled(axes, rows, [f"layer {layer}" for layer in range(layers)], found.keys)
            axes.set_title(f"what “{queries[query]}” attends to, mean of each layer's heads")
        if title:
            figure.suptitle(title, x=0.01, ha="left")


def _labelled(axes: Any, weights: np.ndarray, rows: Sequence[str], keys: Sequence[str]) -> None:
    """Darkest at the largest weight of a token that is not special: those take most, and would pale all others."""
    shown = weights[:, [not _is_special(key) for key in keys]]
    top = max(float((shown if shown.size else weights).max()), 1e-6)
    axes.imshow(weights, cmap="Blues", vmin=0.0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(keys)), [_plain_mark(key) for key in keys], rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=8)
    axes.grid(False)


def _grid(cells: Any, weights: np.ndarray) -> None:
    """Small multiples: layers down, heads across; each scaled to its own largest weight."""
    for layer, row in enumerate(cells):
        for head, axes in enumerate(row):
            axes.imshow(weights[layer, head], cmap="Blues", vmin=0.0, aspect="auto", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            if layer == 0:
                axes.set_title(str(head), fontsize=7, loc="center", pad=2)
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=7)


def _plain(token: str) -> str:
    return _plain_mark(token).removeprefix("##").strip().lower()


def _plain_mark(token: str) -> str:
    """A token without the marks that stand for a space in SentencePiece and byte-level vocabularies."""
    return token.replace("\u2581", " ").replace("\u0120", " ").strip() or token


def _is_special(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in (("[", "]"), ("<", ">"))
