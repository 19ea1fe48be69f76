"""From stored texts to a model's tokens: tokenizers, their lengths, and data sets of token ids."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from transformers import BertTokenizer, DataCollatorWithPadding, PreTrainedConfig, PreTrainedTokenizerBase

from .data import LABEL_COLUMN, class_counts, class_names, hash_of_table, labels_of
from .errors import InputError
from .models import MAX_LENGTH, is_unlimited
from .tasks import TEXT_COLUMN
from .teacher import TEACHER_PREFIX

#: Size of a fresh tokenizer's vocabulary; other words are split into characters.
VOCABULARY_SIZE = 8192
_PROBES = ["The quick brown fox, it jumps: over 13 lazy dogs!", "naïve café\nDON'T  ünïcode 北京"]
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_COUNT_FROM_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


@dataclass
class PadTexts(DataCollatorWithPadding):
    """Batch tokenized texts, padded to the length of the longest, rounded up to a multiple of 8.

    Args:
        teacher_tokenizer: Tokenizer of the inputs whose names begin with `teacher_`, if any.
    """

    pad_to_multiple_of: int | None = 8
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors: B×L, and others with one number or one row per text."""
        of_teacher = self.teacher_tokenizer.model_input_names if self.teacher_tokenizer is not None else []
        names = {f"{TEACHER_PREFIX}{n}": n for n in of_teacher if f"{TEACHER_PREFIX}{n}" in features[0]}
        batch = dict(super().__call__([{n: v for n, v in one.items() if n not in names} for one in features]))
        if names:
            pad = DataCollatorWithPadding(self.teacher_tokenizer, pad_to_multiple_of=self.pad_to_multiple_of)
            theirs = pad([{own: one[n] for n, own in names.items()} for one in features])
            batch |= {f"{TEACHER_PREFIX}{name}": values for name, values in theirs.items()}
        return batch


class TextDataset(torch.utils.data.Dataset):
    """A labelled text data set as model inputs: `{"input_ids": …, "attention_mask": …, "labels": int}`.

    If the teacher's tokenizer gives other tokens, examples also have `"teacher_input_ids"` and so on.

    Args:
        dataset: With the columns `"text"` and `"label"`, as returned by `load_text_dataset`.
        tokenizer: The model's; texts longer than its `model_max_length` are truncated.
        teacher_tokenizer: The teacher's; without effect if it gives the same tokens.
    """

    needs_workers = False  # see ImageDataset

    def __init__(
        self,
        dataset: datasets.Dataset,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.labels, self.class_counts = labels_of(dataset, LABEL_COLUMN), class_counts(dataset, LABEL_COLUMN)
        self.class_names = class_names(dataset)
        if teacher_tokenizer is not None and same_tokens(tokenizer, teacher_tokenizer):
            teacher_tokenizer = None
        self.collator = PadTexts(tokenizer, teacher_tokenizer=teacher_tokenizer)
        tokenizers = {"": tokenizer, **({TEACHER_PREFIX: teacher_tokenizer} if teacher_tokenizer is not None else {})}

        def numbered(texts: list[str]) -> dict[str, Any]:
            return {
                f"{prefix}{name}": values
                for prefix, each in tokenizers.items()
                for name, values in each(texts, truncation=True).items()
            }

        self.tokens = dataset.with_format(None).map(
            numbered, batched=True, input_columns=[TEXT_COLUMN], remove_columns=[TEXT_COLUMN], keep_in_memory=True,
            load_from_cache_file=False, desc="Tokenizing",
        ).rename_column(LABEL_COLUMN, "labels")  # fmt: skip

    @property
    def usual_length(self) -> int:
        """Number of tokens that nine of ten texts do not exceed."""
        return int(np.quantile([len(tokens) for tokens in self.tokens["input_ids"]], 0.9))

    def for_student_alone(self) -> TextDataset:
        """Return the same texts without the teacher's tokens."""
        alone = copy.copy(self)
        of_teacher = [name for name in self.tokens.column_names if name.startswith(TEACHER_PREFIX)]
        alone.tokens = self.tokens.remove_columns(of_teacher)
        return alone

    def describe_views(self) -> dict[str, Any]:
        """Return everything that an example depends on beside its index, for a `LogitsFolder`."""
        return {"tokens": hash_of_table(self.tokens)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Return the examples of these indices."""
        columns = self.tokens[indices]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def fresh_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """Create a tokenizer of the most frequent words of some texts, lower-cased; it splits other words into characters.

    The order of the texts does not matter.
    """
    plain = BertTokenizer(vocab={token: number for number, token in enumerate(_SPECIAL)})
    split, lower = plain.backend_tokenizer.pre_tokenizer, plain.backend_tokenizer.normalizer
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(lower.normalize_str(text)))
    characters = sorted({character for word in words for character in word})
    common = [word for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])) if count > 1]
    spelled = [*characters, *(f"##{character}" for character in characters)]
    tokens = dict.fromkeys([*_SPECIAL, *spelled, *common[:VOCABULARY_SIZE]])
    return BertTokenizer(vocab={token: n for n, token in enumerate(tokens)}, model_max_length=MAX_LENGTH)


def set_max_length(tokenizer: PreTrainedTokenizerBase, name: str, max_length: int | None) -> None:
    """Set the number of tokens after which a tokenizer truncates; `None` for 512, or the most that its model accepts.

    Raises:
        InputError: If the model accepts fewer, or the tokenizer cannot make batches.
    """
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"The tokenizer of {name} has no padding token, so texts of different lengths make no batch: set one "
            "(pad_token), and the model's pad_token_id, and save both in a folder."
        )
    most = tokenizer.model_max_length
    if max_length is not None and max_length > most:
        raise InputError(f"--max_length {max_length}: {name} takes {most} tokens at most. Use that, or leave it out.")
    tokenizer.model_max_length = min(most, max_length or MAX_LENGTH)
    tokenizer.truncation_side, tokenizer.padding_side = "right", "right"


def limit_length(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give a tokenizer without a maximal length that of its model's position embeddings."""
    most = getattr(config, "max_position_embeddings", None)
    if is_unlimited(tokenizer) and isinstance(most, int) and most > 0:
        # RoBERTa and its relatives count positions from behind the padding token's id.
        is_shifted = config.model_type in _COUNT_FROM_PADDING and config.pad_token_id is not None
        tokenizer.model_max_length = most - (config.pad_token_id + 1 if is_shifted else 0)


def same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same token ids for the same text."""
    if first.get_vocab() != second.get_vocab() or first.model_max_length != second.model_max_length:
        return False
    return dict(first(_PROBES)) == dict(second(_PROBES))
