"""What a `Trainer` writes: complete checkpoints, results, figures and card, and one commit to the Hub."""

from __future__ import annotations

import functools
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from .card import build
from .errors import InputError
from .files import as_others_are, replacing, try_json, write_text
from .hub import check_repo_access, publish_folder
from .measure import measure
from .measuring_trainer import MeasuringTrainer
from .models import load_weights_strictly
from .nodes import kept_by_main, on_main_process, sees_main_disk, send_folder
from .plots import save_plots
from .results import RESULTS_NAME, save_json
from .run_folder import check_checkpoint, last_complete_checkpoint, mark_complete
from .sharding import in_bare_type


class PublishingTrainer(MeasuringTrainer):
    """A `Trainer` that publishes its student once, with its results; checkpoints stay local."""

    _has_new_weights = False  # newer than results.json

    # ---- Checkpoints ----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer`."""
        self._note_clock("train")
        if self.saves_shards and not sees_main_disk(Path(self.args.output_dir))[1]:
            raise InputError(
                f"--output_dir {self.args.output_dir} is not on a disk that all machines share, and checkpoints here "
                "are files of each process. Name a folder on one; or with FSDP give --fsdp_config "
                '\'{"state_dict_type": "FULL_STATE_DICT"}\'.'
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _resolved(self, resume_from_checkpoint: str | bool | None) -> str | bool | None:
        """Return the folder of a checkpoint, on this machine; for `True` that of the last complete one."""
        found = (
            on_main_process(self._checkpoint_to_resume) if resume_from_checkpoint is True else resume_from_checkpoint
        )
        return self._of_main_node(found) if isinstance(found, str) else found

    def _checkpoint_to_resume(self) -> str | bool | None:
        """Return the last complete checkpoint, `None` if none is complete, or `True` (refused) if there is none."""
        folder = self.args.output_dir
        return last_complete_checkpoint(folder) or (None if get_last_checkpoint(folder) else True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as `Trainer`, but write `trainer_state.json` last, and delete old checkpoints only after that."""
        run_dir, limit = self._get_output_dir(trial=trial), self.args.save_total_limit
        folder = Path(run_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one from an earlier session
        self._share_buffers()
        self.accelerator.wait_for_everyone()

        def save_last(path: str) -> None:
            with replacing(path) as unfinished:
                type(self.state).save_to_json(self.state, unfinished)
                self._complete_checkpoint(folder)

        self.args.save_total_limit, self.state.save_to_json = None, save_last
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
            del self.state.save_to_json
        if self.args.should_save and limit:
            self._delete_earlier(folder, limit)

    def _complete_checkpoint(self, folder: Path) -> None:
        mark_complete(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        with kept_by_main(Path(output_dir), Path(self.args.output_dir)) as folder:
            super()._save_rng_state(str(folder))
        self.accelerator.wait_for_everyone()  # all processes have written their part

    def _delete_earlier(self, newest: Path, limit: int) -> None:
        """Delete checkpoints until at most `limit` are left; never the newest or the best.

        `Trainer` would go by the times of the folders, which are wrong after a clock is set back. Checkpoints of steps
        that this training has not reached yet come from an earlier one, or are damaged, and are deleted first.
        """
        best, step = Path(self.state.best_model_checkpoint or newest), self.state.global_step
        others = {int(path.name[11:]): path for path in newest.parent.glob("checkpoint-*") if path.name[11:].isdigit()}
        others = {number: path for number, path in others.items() if path not in (newest, best)}
        num_kept = max(0, limit - len({newest, best}))
        for number in sorted(others, key=lambda number: (number < step, number))[: max(0, len(others) - num_kept)]:
            shutil.rmtree(others[number])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer`; the final model is complete even if checkpoints are sharded over processes."""
        super().save_model(output_dir, _internal_call)
        is_final = output_dir in (None, self.args.output_dir)
        if self.is_fsdp_enabled and is_final and self.saves_shards:
            self._save(output_dir, self.accelerator.get_state_dict(self.model))

    @property
    def saves_shards(self) -> bool:
        """Whether each process writes its part of a checkpoint."""
        if self.is_fsdp_enabled:
            return "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        return bool(self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with in_bare_type(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            as_others_are(path for path in folder.iterdir() if path.suffix in (".safetensors", ".py"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_pretrained_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        self.state.best_model_checkpoint = self._of_main_node(self.state.best_model_checkpoint)
        return super()._finalize_training(trial, *args)

    def _of_main_node(self, checkpoint: str | None) -> str | None:
        """Return the path of the main process's checkpoint of this name, and copy it to nodes that lack it."""
        run_folder = Path(self.args.output_dir)
        if sees_main_disk(run_folder)[1]:
            return checkpoint
        path = Path(checkpoint or "")
        name = on_main_process(lambda: path.name if path.parent == run_folder else "")
        if not name:
            return checkpoint
        send_folder(run_folder / name, run_folder)
        return str(run_folder / name)

    def _load_best_model(self) -> None:
        if not self._load_pretrained_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_pretrained_weights(self, checkpoint: str) -> bool:
        """Load a checkpoint as users will; False if only `Trainer` can load this kind of model.

        `Trainer` loads with `strict=False`, which silently skips weights that `save_pretrained` renamed (ViT's).
        """
        ours = isinstance(self.model, PreTrainedModel) and not type(self.model).__module__.startswith("peft.")
        if ours and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            check_checkpoint(checkpoint)
            load_weights_strictly(self.model, checkpoint)
            return True
        return False

    # ---- Results --------------------------------------------------------------------------------------------------

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Save as `Trainer`; a damaged metrics file is replaced."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            save_json(metrics, folder / f"{split}_results.json")
            if combined:
                of_all = folder / "all_results.json"
                save_json({**(try_json(of_all) or {}), **metrics}, of_all)

    def save_results(self, dataset_name: str | None = None, dataset_id: str | None = None) -> dict[str, Any]:
        """Measure student and teacher on `eval_dataset`; write `results.json` and the figures into `output_dir`.

        All processes must call it.

        Args:
            dataset_name: Name of the data set.
            dataset_id: Its id on the Hub, if it has one.

        Returns:
            The content of `results.json` (see `bkd_hf.results`).

        Raises:
            ValueError: As [`bkd_hf.measure.measure`].
        """
        results = measure(self, dataset_name, dataset_id)
        self._has_new_weights = False
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_plots(results, folder / "figures")
            save_json(results, folder / RESULTS_NAME)
        return results

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the model card, `README.md`, from the `results.json` in `output_dir` (see `bkd_hf.card`).

        If there is none, or this trainer has trained since, everything is measured first; then all processes must
        call it.

        Args:
            language: As for `Trainer`.
            license: As for `Trainer`.
            tags: As for `Trainer`.
            model_name: The headline.
            finetuned_from: Id on the Hub of the model that the student started from.
            tasks: Ignored; taken from the results.
            dataset_tags: Id on the Hub of the data; the first of several.
            dataset: Name of the data set.
            dataset_args: Ignored; taken from the results.
        """
        folder = Path(self.args.output_dir)
        if not (folder / RESULTS_NAME).exists() or self._has_new_weights:
            self.save_results(_joined(dataset), _first(dataset_tags))
        if self.is_world_process_zero():
            card = build(
                folder,
                self.hub_model_id or self._repo_id(),
                **_card_options(language, license, tags, model_name, finetuned_from, dataset_tags),
            )
            write_text(folder / "README.md", str(card))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | Future[str] | None:
        """Measure student and teacher, and publish the student: weights, figures, results and card, in one commit.

        Nothing else in `output_dir` is pushed: no checkpoint, no teacher, no `training_args.bin`. All processes must
        call it; the main process pushes, the others return at once.

        Args:
            commit_message: As for `Trainer`.
            blocking: As for `Trainer`.
            token: As for `Trainer`.
            revision: As for `Trainer`.
            private: As for `Trainer`.
            kwargs: For [`~BKDTrainer.create_model_card`].

        Returns:
            The URL of the repository, or a `Future` of it if `blocking=False`; `None` in other processes.

        Raises:
            InputError: If the repository's name or the token is invalid.
            PublishError: If the Hub rejects it.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.save_results(_joined(kwargs.pop("dataset", None)), _first(kwargs.get("dataset_tags")))
        known = {name: value for name, value in kwargs.items() if name not in ("tasks", "dataset_args")}
        if not self.is_world_process_zero():
            return None
        publish = functools.partial(
            publish_folder,
            self.args.output_dir,
            self.hub_model_id or self._repo_id(),
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            **_card_options(**known),
        )
        return publish() if blocking else HfApi().run_as_future(publish)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Find or create the repository, so that a wrong name or token is noticed before training."""
        if self.is_world_process_zero():
            private = self.args.hub_private_repo if private is None else private
            check_repo_access(self._repo_id(), token or self.args.hub_token, private=private)
        self.hub_model_id = self._repo_id()
        self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing: checkpoints hold optimizer states, and a student is published after it is measured."""

    def _repo_id(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name


def _card_options(
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset_tags: str | list[str] | None = None,
) -> dict[str, Any]:
    """Convert the arguments of `Trainer.create_model_card` to those of `bkd_hf.card.build`."""
    return {
        "language": language,
        "license": license,
        "tags": [tags] if isinstance(tags, str) else tags or [],
        "title": model_name,
        "base_model": finetuned_from,
        "dataset_id": _first(dataset_tags),
    }


def _first(names: str | list[str] | None) -> str | None:
    return names if names is None or isinstance(names, str) else next(iter(names), None)


def _joined(names: str | list[str] | None) -> str | None:
    return names if names is None or isinstance(names, str) else ", ".join(names)
