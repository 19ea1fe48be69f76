"""The table of results in README, made from the committed results: `python -m tests.readme_table`."""

from __future__ import annotations

from pathlib import Path

from bkd_hf.comparison import Comparison, load_comparison

CARDS = Path(__file__).parents[1] / "model_cards"
BUDGETS = {  # epochs, and the folders to search, in this order; the cells of a folder were run together
    15: [CARDS / "over_correction" / f"cifar100_lt_15_epochs{which}" for which in ("_default", "")],
    40: [CARDS / "over_correction" / f"cifar100_lt_40_epochs{which}" for which in ("_default", "")],
    200: [CARDS / f"cifar100_lt_200_epochs{which}" for which in ("", "_methods")],
}
ROWS = {  # title of a row: name of the method, and whether its logits are adjusted afterwards
    "`ce`, the teacher": ("ce", False),
    "`ce`, adjusted": ("ce", True),
    "`kd`": ("kd", False),
    "`balanced-softmax`": ("balanced-softmax", False),
    "`bkd` (the paper's)": ("bkd", False),
    "`bkd-calibrated` (the default)": ("bkd-calibrated", False),
}


def to_markdown() -> str:
    """Return the table: methods × lengths, overall and few-shot accuracy."""
    budgets = [[load_comparison([folder]) for folder in folders] for folders in BUDGETS.values()]
    head = "".join(f" {epochs} epochs: overall | few-shot |" for epochs in BUDGETS)
    rows = [
        " | ".join([title, *(_of(comparisons, method, adjusted) for comparisons in budgets)])
        for title, (method, adjusted) in ROWS.items()
    ]
    return "\n".join([f"| |{head}", "|---" * (1 + 2 * len(BUDGETS)) + "|", *(f"| {row} |" for row in rows)])


def _of(comparisons: list[Comparison], method: str, adjusted: bool) -> str:
    for comparison in comparisons:
        for name in comparison.methods:
            if name.partition(" ")[0] == method:
                return " | ".join(str(comparison.estimate(name, metric, adjusted)) for metric in ("overall", "few"))
    return "– | –"


if __name__ == "__main__":
    print(to_markdown())
