"""The table of results in README, from the results that are committed: `python -m tests.readme_table`."""

from __future__ import annotations

from pathlib import Path

from bkd_hf.comparison import Comparison, load_comparison

CARDS = Path(__file__).parents[1] / "model_cards"
BUDGETS = {
    15: CARDS / "over_correction" / "cifar100_lt_15_epochs",
    40: CARDS / "over_correction" / "cifar100_lt_40_epochs",
    200: CARDS / "cifar100_lt_200_epochs",
}
ROWS = {  # how a method is shown; its name, and whether its logits are adjusted afterwards
    "`ce`, the teacher": ("ce", False),
    "`ce`, adjusted": ("ce", True),
    "`kd`": ("kd", False),
    "`balanced-softmax`": ("balanced-softmax", False),
    "`bkd` (the paper's)": ("bkd", False),
    "`bkd-calibrated` (the default)": ("bkd-calibrated", False),
}


def to_markdown() -> str:
    """Return the table: methods × lengths, overall and few-shot accuracy."""
    comparisons = {epochs: load_comparison([folder]) for epochs, folder in BUDGETS.items()}
    head = "".join(f" {epochs} epochs: overall | few-shot |" for epochs in BUDGETS)
    rows = [
        " | ".join([title, *(_of(comparison, method, adjusted) for comparison in comparisons.values())])
        for title, (method, adjusted) in ROWS.items()
    ]
    return "\n".join([f"| |{head}", "|---" * (1 + 2 * len(BUDGETS)) + "|", *(f"| {row} |" for row in rows)])


def _of(comparison: Comparison, method: str, adjusted: bool) -> str:
    name = next((name for name in comparison.methods if name.partition(" ")[0] == method), method)
    return " | ".join(str(comparison.estimate(name, metric, adjusted) or "–") for metric in ("overall", "few"))


if __name__ == "__main__":
    print(to_markdown())
