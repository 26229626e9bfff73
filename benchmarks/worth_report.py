"""What `worth.py` found, as tables: bits per byte of every arm and swap, and what they differ by.

    python benchmarks/worth_report.py outputs/worth/manuals --markdown --svg manuals

Only text is scored, not the ends of documents. A difference is to the baseline (an arm without neighbors
at equal steps), in percent of its bits per byte; the range beside it holds 95% of 10,000 draws of the
evaluated documents, the same for both sides, and of the seeds of each side, with replacement: what other
seeds would have changed is not in it where there is but one. r and r_seen are those of the data that is
not swapped: of what `retrieval` reads, not a control.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retro_data import RetroDataError
from retro_data.leakage import ALPHAS
from retro_data.leakage_curve import MEASURES, draw_curve

Array = np.ndarray[Any, Any]

EVALUATION = "evaluation.npz"
DRAWS = 10_000
ALL, SERVED = 0, 1
BANDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of r_seen, each up to


@dataclass
class Evaluated:
    """Scores of one arm under one swap, of some seeds.

    Attributes:
        nats: (seeds, 2, E) all and served labels of each chunk.
        about: of each seed.
    """

    nats: Array
    about: list[dict[str, Any]]

    def of_seeds(self, other: Evaluated) -> Array:
        """The nats of the seeds that another evaluation of the arm has, too."""
        seeds = {about["seed"] for about in other.about}
        return self.nats[[about["seed"] in seeds for about in self.about]]


class Results:
    """What a folder holds.

    Attributes:
        scores: (arm, swap) -> its scores; `own` is the swap with what the arm was trained on.
        diverged: arm -> its seeds that did.
        bytes: (2, E) of the text of each evaluated chunk, all and served.
        documents: (E,) number of its document; names: of these; r, r_seen: (E,).
    """

    def __init__(self, folder: Path) -> None:
        with np.load(folder / EVALUATION) as about:
            self.documents, self.names = about["documents"], about["names"].tolist()
            self.r, self.r_seen = about["r"], about["r_seen"]
        self.bytes: Array = np.zeros((2, 0))
        self.diverged: dict[str, list[int]] = defaultdict(list)
        nats: dict[tuple[str, str], list[Array]] = defaultdict(list)
        told: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for path in sorted(folder.glob("[!.]*-*.npz")):
            with np.load(path) as found:
                about = json.loads(str(found["about"]))
                if about["diverged"]:
                    self.diverged[about["arm"]].append(about["seed"])
                    continue
                if nats and not np.array_equal(self.bytes, found["bytes"]):
                    raise RetroDataError(f"{path} is of other evaluated text than those before it.")
                self.bytes = found["bytes"]
                for name in found.files:
                    if name.startswith("nats "):
                        key = about["arm"], name.removeprefix("nats ")
                        nats[key].append(found[name])
                        told[key].append(about)
        self.scores = {
            key: Evaluated(np.stack(parts).astype(float), told[key]) for key, parts in nats.items()
        }

    def own(self, arm: str) -> Evaluated:
        """An arm with what it was trained on."""
        if (arm, "own") not in self.scores:
            there = ", ".join(name for name, swap in self.scores if swap == "own") or "none"
            raise RetroDataError(f"no training of {arm} that did not diverge; there are: {there}.")
        return self.scores[arm, "own"]

    def bits_per_byte(self, nats: Array, way: int = ALL, chosen: Array | None = None) -> Array:
        """Of (…, 2, E) nats, for all labels or served ones, of chosen (E,) chunks: (…)."""
        keep = slice(None) if chosen is None else chosen
        found: Array = nats[..., way, keep].sum(-1) / math.log(2) / self.bytes[way, keep].sum()
        return found

    def difference(
        self, one: Array, base: Array, way: int = ALL, chosen: Array | None = None
    ) -> tuple[float, float, float]:
        """Percent by which the mean over seeds lies above the baseline's, and its 95% range.

        Of (seeds, 2, E) nats each. `one` and `base` of as many seeds share those that are drawn.
        """
        keep = np.ones(len(self.documents), bool) if chosen is None else chosen
        of_document = self.documents[keep]
        one_sums, base_sums = (
            np.stack([np.bincount(of_document, seed[way, keep]) for seed in nats])
            for nats in (one, base)
        )
        present = np.unique(of_document)
        rng = np.random.default_rng(0)
        documents = _drawn(rng, len(present))
        seeds = [_drawn(rng, len(sums)) for sums in (one_sums, base_sums)]
        if len(one_sums) == len(base_sums):
            seeds[1] = seeds[0]
        totals = [
            (documents @ sums[:, present].T * of_seed).sum(1) / len(sums)
            for sums, of_seed in zip((one_sums, base_sums), seeds, strict=True)
        ]
        low, high = np.quantile(totals[0] / totals[1], (0.025, 0.975))
        ratio = one_sums.sum(1).mean() / base_sums.sum(1).mean()
        return 100 * (ratio - 1), 100 * (low - 1), 100 * (high - 1)


def _drawn(rng: np.random.Generator, count: int) -> Array:
    """(DRAWS, count) how often each of so many is drawn, with replacement."""
    return rng.multinomial(count, np.full(count, 1 / count), DRAWS)


# ---- tables --------------------------------------------------------------------------------------


def arms(results: Results, baseline: str) -> list[list[str]]:
    rows = [
        [
            *("arm", "seeds", "parameters", "GFLOP a token", "bits per byte"),
            *("to baseline", "served", "r_seen <= 12.5%", "r <= 12.5%"),
        ]
    ]
    base = results.own(baseline).nats
    for (arm, swap), found in results.scores.items():
        if swap != "own":
            continue
        low = [leak <= ALPHAS[0] for leak in (results.r_seen, results.r)]
        about = found.about[0]
        rows.append(
            [
                *(arm, _seeds(results, arm, found), f"{about['parameters'] / 1e6:.1f}M"),
                f"{about['flops_a_token'] / 1e9:.2f}" if about["flops_a_token"] else "-",
                _of_seeds(results.bits_per_byte(found.nats)),
                _range(results.difference(found.nats, base)),
                _range(results.difference(found.nats, base, SERVED)),
                *(_range(results.difference(found.nats, base, SERVED, chosen)) for chosen in low),
            ]
        )
    for arm, seeds in results.diverged.items():
        if (arm, "own") not in results.scores:
            rows.append([arm, f"0 of {len(seeds)}", *["-"] * (len(rows[0]) - 2)])
    return rows


def swaps(results: Results, arm: str, baseline: str) -> list[list[str]]:
    rows = [["evaluated with", "seeds", "bits per byte", "to baseline", "to its own"]]
    base, own = results.own(baseline).nats, results.own(arm)
    for (name, swap), found in results.scores.items():
        if name == arm:
            rows.append(
                [
                    *(swap, str(len(found.nats))),
                    _of_seeds(results.bits_per_byte(found.nats)),
                    _range(results.difference(found.nats, base)),
                    _range(results.difference(found.nats, own.of_seeds(found))),
                ]
            )
    return rows


def by_leakage(results: Results, arm: str, baseline: str) -> list[list[str]]:
    rows = [
        ["served labels of chunks with", "share of bytes", "baseline", "neighbors", "to baseline"]
    ]
    base, own = results.own(baseline).nats, results.own(arm).nats
    for name, leak in (("r", results.r), ("r_seen", results.r_seen)):
        for alpha in ALPHAS:
            chosen = leak <= alpha
            share = results.bytes[SERVED, chosen].sum() / results.bytes[SERVED].sum()
            rows.append([f"{name} <= {alpha:.1%}", f"{share:.1%}"])
            rows[-1] += [
                f"{results.bits_per_byte(nats, SERVED, chosen).mean():.4f}" for nats in (base, own)
            ]
            rows[-1].append(_range(results.difference(own, base, SERVED, chosen)))
    return rows


def by_band(results: Results, arm: str, baseline: str) -> list[list[str]]:
    """What every arm, and an arm's swaps, differ by from the baseline in each band of r_seen."""
    band = np.searchsorted(BANDS, results.r_seen)
    sizes = np.bincount(band, results.bytes[SERVED], len(BANDS))
    rows = [["served labels, r_seen", *(f"to {edge:.4g}" for edge in BANDS)]]
    rows.append(["share of bytes", *(f"{size / sizes.sum():.1%}" for size in sizes)])
    base = results.own(baseline).nats
    for (name, swap), found in results.scores.items():
        if swap == "own" or name == arm:
            sums, base_sums = (
                np.bincount(band, nats[:, SERVED].mean(0), len(BANDS))
                for nats in (found.nats, base)
            )
            cells = zip(sums, base_sums, strict=True)
            rows.append(
                [f"{name}, {swap}", *(f"{100 * (a / b - 1):+.1f}%" if b else "-" for a, b in cells)]
            )
    return rows


def draw(results: Results, arm: str, baseline: str, measure: str) -> str:
    """Bits per byte of what neighbors can serve, over chunks that leak at most so much, as an SVG."""
    leak = {"r": results.r, "r_seen": results.r_seen}[measure]
    names = {"bits_per_byte_served": arm, "bits_per_byte_served_off": baseline}
    rows = []
    for alpha in ALPHAS:
        row = {"alpha": alpha}
        for name, of_arm in names.items():
            nats = results.own(of_arm).nats
            row[name] = float(results.bits_per_byte(nats, SERVED, leak <= alpha).mean())
        rows.append(row)
    return draw_curve(rows, measure, labels={n: f"{a}, bits per byte" for n, a in names.items()})


def by_source(results: Results, arm: str, baseline: str, most: int = 12) -> list[list[str]]:
    rows = [["source", "documents", "bytes", "baseline", "neighbors", "to baseline"]]
    base, own = results.own(baseline).nats, results.own(arm).nats
    source = np.array([name.partition("/")[0] for name in results.names])[results.documents]
    names, size = np.unique(source), {}
    for name in names:
        size[name] = int(results.bytes[ALL, source == name].sum())
    for name in sorted(names, key=lambda n: -size[n])[:most]:
        chosen = source == name
        documents = len(np.unique(results.documents[chosen]))
        rows.append([str(name), str(documents), f"{size[name]:,}"])
        rows[-1] += [f"{results.bits_per_byte(n, ALL, chosen).mean():.4f}" for n in (base, own)]
        rows[-1].append(_range(results.difference(own, base, ALL, chosen)))
    return rows


def _seeds(results: Results, arm: str, found: Evaluated) -> str:
    lost = len(results.diverged[arm])
    return f"{len(found.nats)} of {len(found.nats) + lost}" if lost else str(len(found.nats))


def _of_seeds(values: Array) -> str:
    spread = f" ± {values.std(ddof=1):.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}"


def _range(difference: tuple[float, float, float]) -> str:
    return "{:+.2f}% ({:+.2f} to {:+.2f})".format(*difference)


def show(title: str, rows: Sequence[Sequence[str]], markdown: bool) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"\n{title}\n"]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
        if markdown and number == 0:
            lines.append("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    sys.stdout.write("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="that worth.py wrote")
    parser.add_argument("--arm", default="retrieval")
    parser.add_argument("--baseline", default="none")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--svg", help="start of the names of the curves' files")
    options = parser.parse_args(arguments)
    results = Results(options.folder)
    arm, baseline = options.arm, options.baseline
    show("Arms", arms(results, baseline), options.markdown)
    show(f"The arm {arm}, evaluated with", swaps(results, arm, baseline), options.markdown)
    show(f"{arm} by leakage", by_leakage(results, arm, baseline), options.markdown)
    show("Beside the baseline", by_band(results, arm, baseline), options.markdown)
    for measure in MEASURES if options.svg else ():
        path = Path(f"{options.svg}-{measure}.svg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(draw(results, arm, baseline, measure), "utf-8")
    show(f"{arm} by source", by_source(results, arm, baseline), options.markdown)


if __name__ == "__main__":
    main()
