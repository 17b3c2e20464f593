"""Score against alive weights for several runs: a CSV, a Markdown table, and a plot per task.

python benchmarks/plot_tickets.py --out docs/results/bsd_small global=runs/a layer=runs/b ...
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import matplotlib

from mirl_dist.faults import Fault
from mirl_dist.shelf import open_run
from mirl_dist.ticket import Ticket

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKS = ("o", "s", "^", "v", "D", "P")


def read(arguments: list[str]) -> dict[str, list[Ticket]]:
    """'label=RUN' to the run's tickets."""
    found = {}
    for text in arguments:
        label, _, run = text.partition("=")
        found[label] = open_run(run)[0].tickets()
    return found


def write_csv(runs: dict[str, list[Ticket]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["run", "round", "alive", "total", "sparsity", "score", "psnr", "ssim", "input_psnr", "input_ssim"]
        )
        for label, tickets in runs.items():
            for t in tickets:
                for name, s in t.scores.items():
                    row = [label, t.round, t.alive_total, t.total, f"{t.total_sparsity:.4f}", name]
                    row += [f"{x:.4f}" for x in (s.psnr, s.ssim, s.degraded_psnr, s.degraded_ssim)]
                    writer.writerow(row)


def write_table(runs: dict[str, list[Ticket]], path: Path) -> None:
    names = list(next(iter(runs.values()))[0].scores)
    lines = ["| run | round | alive weights | sparsity | " + " | ".join(f"{n} PSNR / SSIM" for n in names) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(names))
    for label, tickets in runs.items():
        for t in tickets:
            cells = [f"{t.scores[n].psnr:.2f} / {t.scores[n].ssim:.4f}" for n in names]
            lines.append(f"| {label} | {t.round} | {t.alive_total:,} | {t.total_sparsity:.1%} | {' | '.join(cells)} |")
    given = next(iter(runs.values()))[0].scores
    cells = [f"{given[n].degraded_psnr:.2f} / {given[n].degraded_ssim:.4f}" for n in names]
    lines.append(f"| input | | | | {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n")


def write_plot(runs: dict[str, list[Ticket]], path: Path) -> None:
    names = list(next(iter(runs.values()))[0].scores)
    figure, panels = plt.subplots(1, len(names), figsize=(4.6 * len(names), 4), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for mark, (label, tickets) in zip(MARKS, runs.items(), strict=False):
            xs, ys = [t.alive_total for t in tickets], [t.scores[name].psnr for t in tickets]
            panel.plot(xs, ys, marker=mark, label=label)
        dense = next(iter(runs.values()))[0].scores[name].psnr
        panel.axhline(dense, color="grey", linestyle=":", linewidth=1)
        panel.set_xscale("log")
        panel.invert_xaxis()
        panel.set_title(name)
        panel.set_xlabel("alive weights (fewer to the right)")
        panel.set_ylabel("PSNR in dB")
        panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="path without ending")
    parser.add_argument("runs", nargs="+", help="label=RUN")
    given = parser.parse_args()
    try:
        runs = read(given.runs)
    except Fault as fault:
        sys.exit(f"plot_tickets: {fault}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_csv(runs, given.out.with_suffix(".csv"))
    write_table(runs, given.out.with_suffix(".table.md"))
    write_plot(runs, given.out.with_suffix(".png"))
    print(given.out.with_suffix(".table.md").read_text())


if __name__ == "__main__":
    main()
